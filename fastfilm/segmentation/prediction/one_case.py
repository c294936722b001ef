"""One case through a model: windows, tasks, flips, dropout samples; on the file's grid, plane by plane."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfilm.nn import ConvNormFiLM2d, ConvNormFiLM3d

from ..images.preprocessing import (
    AXES,
    Geometry,
    Preprocessed,
    resample,
)
from ..models.folder import LoadedModel
from ..support.errors import UserError
from .averaging import (
    Prior,
    missing_keys,
    weighted,
)
from .windows import Timing, sliding_windows

Plane = Literal["sagittal", "coronal", "axial"]


@dataclass(frozen=True)
class Options:
    """How a case is predicted.

    Attributes:
        overlap: of neighbouring windows, as a share of their size.
        batch: windows that go through the network at once; None: 16 slices or 1 volume.
        flips: the case is also predicted mirrored across these planes (all combinations), and the mean is taken.
        samples: with n > 0 the mean over n draws of the dropout masks, which also give the uncertainty.
        seed: of the draws.
        missing: a case without a value of a key is predicted as "unknown", or as the mean over its values.
        prior: the weights of such values; a key that is not there has those of its frequency in training.
    """

    overlap: float = 0.5
    batch: int | None = None
    flips: tuple[Plane, ...] = ()
    samples: int = 0
    seed: int = 0
    missing: Literal["unknown", "average"] = "unknown"
    prior: Prior = ()


@dataclass
class Predicted:
    """One case on the grid of its file.

    Attributes:
        masks: bool [K, X, Y, Z], one a label. In output mode "classes" they exclude each other.
        strongest: int16 [X, Y, Z]: 1 + the label of the highest probability among those that are on; 0: none.
        probabilities: float32 [K, X, Y, Z] if asked for.
        entropy: float32 [X, Y, Z]: entropy in bits of the mean prediction, highest over the labels.
        information: float32 [X, Y, Z]: mutual information in bits of prediction and dropout mask.
        metadata_entropy: float32 [X, Y, Z]: mutual information in bits of prediction and missing metadata value,
            highest over the labels; None where no value was missing, or a missing one is "unknown".
        timing: seconds in and around the network.
    """

    masks: NDArray[np.bool_]
    strongest: NDArray[np.int16]
    probabilities: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None
    information: NDArray[np.float32] | None = None
    metadata_entropy: NDArray[np.float32] | None = None
    timing: Timing = field(default_factory=Timing)


@torch.no_grad()
def predict(
    model: LoadedModel,
    case: Preprocessed,
    values: Mapping[str, Any],
    options: Options | None = None,
    *,
    probabilities: bool = False,
) -> Predicted:
    """Masks of one case under its metadata.

    The network's probabilities are never kept for the whole volume: planes are brought to the file's grid, turned
    into masks and dropped as they become final. Besides input and result, memory is that of one window's depth.

    Args:
        case: from ``model.preprocess``.
        values: metadata, key -> value.
        probabilities: keep them, float32.

    Raises:
        MetadataError (a UserError): metadata that the model cannot take.
        UserError: dropout samples of a network without dropout.
    """
    options = options or Options()
    timing = Timing()
    labels = len(model.info.labels)
    geometry = case.geometry
    uncertain = options.samples > 0
    network = CaseNetwork(model, values, options)
    turned = tuple(geometry.shape[a] for a in geometry.axes)
    maps = labels if probabilities else 0
    kept = np.zeros((maps + 2 * uncertain + network.averaged, *turned), np.float32)
    masks = np.zeros((labels, *turned), bool)
    strongest = np.zeros(turned, np.int16)
    image = torch.from_numpy(np.ascontiguousarray(case.image)).to(model.device)
    planes = windows(model, image, network, options, timing)
    (d0, _), (h0, h1), (w0, w1) = geometry.crop
    exclusive = model.info.output == "classes"
    for first, p in regridded(planes, geometry):
        at = (slice(d0 + first, d0 + first + p.shape[1]), slice(h0, h1), slice(w0, w1))
        every = (slice(None), *at)
        # plane by plane, as argmax and the comparisons make copies
        for i, on in enumerate(masks[every].swapaxes(0, 1)):
            on[...], strongest[at][i] = decide(p[:labels, i], exclusive)
        if maps:
            kept[:maps][every] = p[:labels]
        if uncertain:
            h = entropy(p[:labels], exclusive)
            kept[maps][at] = h
            kept[maps + 1][at] = np.maximum(h - p[labels], 0)
        if network.averaged:
            kept[maps][at] = p[labels]
    kept = _to_file(kept, geometry)
    return Predicted(
        _to_file(masks, geometry),
        _to_file(strongest[None], geometry)[0],
        kept[:maps] if probabilities else None,
        kept[maps] if uncertain else None,
        kept[maps + 1] if uncertain else None,
        kept[maps] if network.averaged else None,
        timing,
    )


def windows(
    model: LoadedModel,
    image: Tensor,
    network: CaseNetwork,
    options: Options,
    timing: Timing | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Probabilities of ``image`` [C, D, H, W] as planes (first, [K, n, H, W]), from ``sliding_windows``."""
    return sliding_windows(
        image,
        model.info.patch_size,
        network,
        overlap=options.overlap,
        batch=options.batch or (16 if model.info.spatial_dims == 2 else 1),
        timing=timing,
    )


def decide(p: NDArray[np.float32], exclusive: bool) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
    """Masks and the strongest label (from 1; 0: none) for probabilities [K, …].

    Args:
        exclusive: the labels and the background exclude each other: the most probable one is taken. Otherwise
            every label of 1/2 or more.
    """
    best = p.argmax(0)
    highest = np.take_along_axis(p, best[None], 0)[0]
    background = 1 - p.sum(0) if exclusive else np.float32(0.5)
    # a tie goes to the background where labels are exclusive, as argmax over (background, labels) has it
    on = highest > background if exclusive else highest >= background
    strongest = np.where(on, best + 1, 0).astype(np.int16)
    if exclusive:
        return strongest == np.arange(1, len(p) + 1).reshape(-1, *[1] * best.ndim), strongest
    return p >= 0.5, strongest


def entropy(p: NDArray[np.float32], exclusive: bool) -> NDArray[np.float32]:
    """In bits, [K, …] -> […]: over background and labels, or the highest of K yes-or-no entropies."""
    bits = _bits(torch.from_numpy(np.ascontiguousarray(p))[None], exclusive)
    return np.asarray(bits[0, 0].numpy())


def _bits(p: Tensor, exclusive: bool) -> Tensor:
    """The same for [N, K, …] -> [N, 1, …]."""
    return _entropies(p, exclusive).amax(1, keepdim=True)


def _entropies(p: Tensor, exclusive: bool) -> Tensor:
    """In bits, [N, K, …] -> [N, 1, …] over background and labels, or [N, K, …], yes or no for each label."""
    rest = (1 - p.sum(1, keepdim=True)).clamp_min(0) if exclusive else 1 - p
    if exclusive:
        whole = torch.cat([p, rest], 1)
        return -torch.xlogy(whole, whole).sum(1, keepdim=True) / np.log(2)
    return (-torch.xlogy(p, p) - torch.xlogy(rest, rest)) / np.log(2)


def check_options(model: LoadedModel, options: Options) -> list[str]:
    """The planes across which the model's windows can be mirrored, in the order of their axes.

    Raises:
        UserError: a plane that is none of them; dropout samples of a network without dropout.
    """
    first = model.info.preprocessing.slice_axis
    order = [int(first), *(a for a in range(3) if a != first)]
    axes = [AXES[a] for a in order][3 - model.info.spatial_dims :]
    for plane in options.flips:
        if plane not in axes:
            raise UserError(
                f"the model takes {AXES[order[0]]} slices: flips must be {' or '.join(axes)}, got {plane}"
            )
    if options.samples and not droppable(model.network):
        raise UserError("uncertainty needs a network with dropout; this one has none")
    if options.samples and options.missing == "average":
        raise UserError(
            "dropout samples and the mean over missing metadata (--samples, --missing average) do not go together"
        )
    if options.prior and options.missing != "average":
        raise UserError("--prior is for --missing average")
    return axes


def averaged_keys(model: LoadedModel, values: Mapping[str, Any], options: Options) -> list[str]:
    """The keys over whose values the mean is taken for a case."""
    return missing_keys(model, values) if options.missing == "average" else []


def completed(
    model: LoadedModel, values: Mapping[str, Any], options: Options
) -> list[tuple[float, dict[str, Any]]]:
    """What a case is predicted under, each with its weight: its metadata, or every completion of them.

    Raises:
        UserError: missing values over which there is no mean (``averaging.weighted``).
    """
    if averaged_keys(model, values, options):
        return weighted(model, values, options.prior)
    return [(1.0, dict(values))]


class CaseNetwork:
    """Windows [N, C, *S] -> probabilities [N, K, *S] under one case's metadata.

    γ and β are computed once. With dropout samples there is one more channel: the mean entropy of the samples.
    With the mean over missing metadata there is one more, too: H(Σ w p) - Σ w H(p) over the values, highest over
    the labels, the mutual information of prediction and value. It is taken here, so that it holds nothing of what
    windows that overlap disagree about.

    Attributes:
        averaged: the case has missing metadata over whose values the mean is taken.
    """

    def __init__(self, model: LoadedModel, values: Mapping[str, Any], options: Options) -> None:
        self.model, self.options = model, options
        tasks: Sequence[str | None] = model.tasks() or [None]
        self.averaged = bool(averaged_keys(model, values, options))
        cases = completed(model, values, options)
        self.weights = [weight for weight, _ in cases]
        # γ and β [values][tasks]
        self.film = [self._film([model.encode(v, t) for t in tasks]) for _, v in cases]
        axes = check_options(model, options)
        dims = [2 + axes.index(p) for p in options.flips]
        self.flips = [c for n in range(len(dims) + 1) for c in itertools.combinations(dims, n)]

    def _film(self, rows: Sequence[NDArray[np.float32]]) -> list[Any]:
        if not self.model.encoder.size:
            return [None] * len(rows)
        modulate = getattr(self.model.network, "modulate", None)
        placed = [torch.from_numpy(r).to(self.model.device) for r in rows]
        return [r if modulate is None else modulate(r) for r in placed]

    def __call__(self, x: Tensor) -> Tensor:
        if self.averaged:
            return self._over_values(x)
        if not self.options.samples:
            return self._mean(x, self.film[0])
        exclusive = self.model.info.output == "classes"
        total = None
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), dropping(self.model.network):
            for i in range(self.options.samples):
                # what is drawn depends on the seed alone, not on the windows before
                torch.manual_seed(self.options.seed + i)
                p = self._mean(x, self.film[0])
                p = torch.cat([p, _bits(p, exclusive)], 1)
                total = p if total is None else total + p
        assert total is not None
        return total / self.options.samples

    def _over_values(self, x: Tensor) -> Tensor:
        exclusive = self.model.info.output == "classes"
        mean: Tensor | None = None
        within: Tensor | None = None
        for weight, film in zip(self.weights, self.film, strict=True):
            p = self._mean(x, film)
            h = weight * _entropies(p, exclusive)
            p = weight * p
            mean, within = (p, h) if mean is None or within is None else (mean + p, within + h)
        assert mean is not None and within is not None
        # weights add up to 1 but for rounding
        mean = mean.clamp_max(1)
        information = (_entropies(mean, exclusive) - within).amax(1, keepdim=True).clamp_min(0)
        return torch.cat([mean, information], 1)

    def _mean(self, x: Tensor, film: Sequence[Any]) -> Tensor:
        total: Tensor | None = None
        for dims in self.flips:
            p = self._once(x.flip(dims) if dims else x, film)
            p = p.flip(dims) if dims else p
            total = p if total is None else total + p
        assert total is not None
        return total / len(self.flips)

    def _once(self, x: Tensor, film: Sequence[Any]) -> Tensor:
        model = self.model
        outs = [
            model.activate(model.network(x) if f is None else model.network(x, f)) for f in film
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def droppable(network: nn.Module) -> list[nn.Module]:
    """The modules that drop something in training."""
    return [
        m
        for m in network.modules()
        if (isinstance(m, ConvNormFiLM2d | ConvNormFiLM3d) and m.dropout > 0)
        or (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
    ]


@contextlib.contextmanager
def dropping(network: nn.Module) -> Iterator[None]:
    """Dropout is on inside, and nothing else of training mode."""
    modules = droppable(network)
    for m in modules:
        if isinstance(m, ConvNormFiLM2d | ConvNormFiLM3d):
            m.dropout_in_evaluation = True
        else:
            m.train()
    try:
        yield
    finally:
        for m in modules:
            if isinstance(m, ConvNormFiLM2d | ConvNormFiLM3d):
                m.dropout_in_evaluation = False
            else:
                m.eval()


def regridded(
    planes: Iterator[tuple[int, Tensor]], geometry: Geometry
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Planes [K, n, H, W] of the network's grid -> planes of the crop before resampling, numpy, in order.

    Linear, as ``Geometry.from_network`` does it for a whole volume, with one plane kept from call to call.
    """
    depth, (h, w) = geometry.cropped[0], geometry.cropped[1:]
    if geometry.grid == geometry.cropped:
        for first, p in planes:
            yield first, p.cpu().numpy()
        return
    # centres of the wanted planes in the coordinates of those that come
    where = (np.arange(depth) + 0.5) * geometry.grid[0] / depth - 0.5
    where = where.clip(0, geometry.grid[0] - 1)
    wanted = 0
    last: NDArray[np.float32] | None = None
    for first, p in planes:
        have = resample(p.cpu().numpy(), (p.shape[1], h, w))
        if last is not None:
            have, first = np.concatenate([last, have], 1), first - 1
        end = first + have.shape[1] - 1
        while wanted < depth and where[wanted] <= end:
            low = min(int(where[wanted]), end)
            t = np.float32(where[wanted] - low)
            high = min(low + 1, end)
            yield wanted, ((1 - t) * have[:, low - first] + t * have[:, high - first])[:, None]
            wanted += 1
        last = have[:, -1:].copy()


def _to_file(array: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """[K, *turned] -> [K, X, Y, Z], a view."""
    array = np.flip(array, tuple(1 + np.flatnonzero(geometry.flips)))
    return array.transpose(0, *(1 + i for i in np.argsort(geometry.axes)))
