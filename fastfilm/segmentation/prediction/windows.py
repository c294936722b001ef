"""Sliding windows that hand out finished planes: memory grows with a window's depth, not with the volume's.

The windows are visited from the first plane
to the last, and planes that no later window reaches are divided by their weight and handed on. The weights of all
windows are a product of one factor an axis, so that no map of them is needed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


@dataclass
class Timing:
    """Seconds: of the network, and of everything around it in ``sliding_windows``."""

    network: float = 0.0
    around: float = 0.0

    @property
    def overhead(self) -> float:
        """Time around the network as a share of the network's."""
        return self.around / self.network if self.network else 0.0


def starts(size: int, window: int, overlap: float) -> list[int]:
    """Where the windows along one axis begin: evenly spread, overlapping by at least ``overlap``."""
    if size <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    n = int(np.ceil((size - window) / step)) + 1
    return [round(x) for x in np.linspace(0, size - window, n)]


def gaussian(window: int) -> Tensor:
    """Weights of a window's voxels along one axis [window]: deviation window / 8, at most 1, at least 0.1 %."""
    x = torch.arange(window, dtype=torch.float32) - (window - 1) / 2
    return torch.exp(-0.5 * (x / (window / 8)) ** 2).clamp_min(1e-3)


def _total(size: int, begins: Sequence[int], weight: Tensor) -> Tensor:
    """Sum of the windows' weights at each position of an axis."""
    total = torch.zeros(size)
    for b in begins:
        total[b : b + len(weight)] += weight
    return total


def sliding_windows(
    image: Tensor,
    patch_size: Sequence[int],
    network: Network,
    *,
    overlap: float = 0.5,
    batch: int = 1,
    timing: Timing | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Weighted means of the network's outputs over overlapping windows, plane by plane.

    Args:
        image: [C, D, H, W]; smaller than a window, it is padded with zeros on both sides.
        patch_size: (H, W): windows within one plane, given to ``network`` as [N, C, H, W]; or (D, H, W):
            [N, C, D, H, W].
        network: windows -> [N, K, *patch_size].
        overlap: of neighbouring windows, as a share of their size, 0 <= overlap < 1.
        batch: N at most.
        timing: what is added up; on CUDA the device is waited for, to measure.

    Yields:
        (first plane, planes [K, n, H, W]), float32 on the image's device, in order and without gaps. The planes
        are overwritten when the next ones are asked for.

    Raises:
        ValueError: sizes or overlap that do not fit.
    """
    flat = len(patch_size) == 2
    if image.dim() != 4 or len(patch_size) not in (2, 3):
        raise ValueError(
            f"image must be [C, D, H, W] and patch_size two or three numbers, got {tuple(image.shape)}"
            f" and {list(patch_size)}"
        )
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    clock = _Clock(image.device, timing or Timing())
    size = list(image.shape[1:])
    patch = [1, *patch_size] if flat else list(patch_size)
    before = [max(0, p - n) // 2 for p, n in zip(patch, size, strict=True)]
    after = [max(0, p - n) - b for p, n, b in zip(patch, size, before, strict=True)]
    if any(before + after):
        pads = [x for pair in zip(reversed(before), reversed(after), strict=True) for x in pair]
        image = torch.nn.functional.pad(image, pads)
    full = list(image.shape[1:])
    begins = [starts(n, p, overlap) for n, p in zip(full, patch, strict=True)]
    weights = [torch.ones(1) if p == 1 else gaussian(p) for p in patch]
    totals = [_total(n, b, w) for n, b, w in zip(full, begins, weights, strict=True)]
    device = image.device
    weight = (weights[0][:, None, None] * weights[1][None, :, None] * weights[2][None, None, :]).to(
        device
    )
    scale = (1 / (totals[1][:, None] * totals[2][None, :])).to(device)
    inner = list(itertools.product(begins[1], begins[2]))
    # planes that are worked on together: a window's depth, or as many slices as fill a batch
    together = max(1, batch // len(inner)) if flat else 1
    rows = [begins[0][i : i + together] for i in range(0, len(begins[0]), together)]
    buffer: Tensor | None = None
    low = 0  # first plane in the buffer
    for r, row in enumerate(rows):
        places = [(d, h, w) for d in row for h, w in inner]
        for i in range(0, len(places), batch):
            part = places[i : i + batch]
            stacked = torch.stack([image[:, d : d + patch[0], h : h + patch[1], w : w + patch[2]]
                                   for d, h, w in part])  # fmt: skip
            with clock.network():
                out = network(stacked.squeeze(2) if flat else stacked)
            out = (out.unsqueeze(2) if flat else out).float()
            if buffer is None:
                buffer = out.new_zeros(out.shape[1], patch[0] + together - 1, full[1], full[2])
            for (d, h, w), p in zip(part, out, strict=True):
                d -= low
                buffer[:, d : d + patch[0], h : h + patch[1], w : w + patch[2]] += p * weight
        assert buffer is not None
        following = rows[r + 1][0] if r + 1 < len(rows) else full[0]
        done = following - low
        planes = buffer[:, :done]
        planes *= scale
        planes /= totals[0][low:following].to(device)[None, :, None, None]
        first = max(low, before[0])
        last = min(following, before[0] + size[0])
        if last > first:
            rest = [slice(b, b + n) for b, n in zip(before[1:], size[1:], strict=True)]
            clock.stop()
            yield first - before[0], planes[:, first - low : last - low, rest[0], rest[1]]
            clock.start()
        kept = buffer.shape[1] - done
        # one output channel at a time: a copy of all of them would be half a window more
        for channel in buffer:
            if kept > 0:
                channel[:kept] = channel[done:].clone()
            channel[max(kept, 0) :] = 0
        low = following
    clock.stop()


class _Clock:
    def __init__(self, device: torch.device, timing: Timing) -> None:
        self.device, self.timing = device, timing
        self.start()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.begun = self._now()

    def stop(self) -> None:
        self.timing.around += self._now() - self.begun

    def network(self) -> _Pause:
        return _Pause(self)


class _Pause:
    """The time inside is the network's."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.clock.stop()
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.timing.network += self.clock._now() - self.begun
        self.clock.start()
