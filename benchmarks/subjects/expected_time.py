"""Where a network's time should go, by layer, and on several GPUs: the table of ``--suite model --explain``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastfilm.tuning import cost

from ..counted.roofline import Ceilings, Layer, convolution
from . import expected_ddp
from .networks import Network

HEAD = ("layer", "count", "floor ms", "estimate ms", "measured ms", "of floor", "limiter", "route")


@dataclass(frozen=True)
class Line:
    """One distinct layer of a network, with all of its ``count`` occurrences in the seconds.

    Attributes:
        measured: seconds, where it was.
        route: of the two that are estimated the faster one.
        kernels: seconds of each launch by name, estimated.
    """

    layer: Layer
    count: int
    estimate: cost.Estimate
    route: str
    measured: float | None = None

    @property
    def floor(self) -> float:
        """Seconds of all occurrences."""
        return self.count * self.estimate.floor

    @property
    def seconds(self) -> float:
        """Estimated seconds of all occurrences."""
        return self.count * self.estimate.seconds


def lines(
    network: Network,
    mode: str,
    dtype: str,
    ceilings: Ceilings,
    measured: Mapping[Layer, float] | None = None,
    fused: bool = True,
) -> list[Line]:
    """The distinct layers, in the network's order.

    Args:
        measured: seconds of one occurrence.
        fused: whether the device has a fused route.
    """
    found = []
    last = list(network.layers())[-1]
    for layer, count in network.layers().items():
        # nothing but a bias stands behind the last convolution and behind transposed ones
        c = convolution(layer, network.batch, dtype, layer != last and not layer.transposed)
        routes = {
            r: cost.estimate(c, r, mode, dtype, ceilings)
            for r in ("fused", "composed")
            if r == "composed" or (fused and layer.kernel in (1, 3) and not layer.transposed)
        }
        route = min(routes, key=lambda r: routes[r].seconds)
        seconds = (measured or {}).get(layer)
        found.append(
            Line(layer, count, routes[route], route, None if seconds is None else seconds * count)
        )
    return found


def limiter(found: Sequence[Line]) -> str:
    """What most of the estimated time of all lines together goes to."""
    names = (*cost.LIMITERS, "total")
    return cost.added(
        cost.Terms(**{n: line.count * getattr(line.estimate.terms, n) for n in names})
        for line in found
    ).limiter


def rows(found: Sequence[Line]) -> list[tuple[str, ...]]:
    """Cells under ``HEAD``, and a line with the sums."""

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.3f}"

    def share(floor: float, seconds: float | None) -> str:
        return "-" if not seconds else f"{100 * floor / seconds:.0f}%"

    cells = [
        (
            line.layer.label,
            str(line.count),
            ms(line.floor),
            ms(line.seconds),
            ms(line.measured),
            share(line.floor, line.measured),
            line.estimate.limiter,
            line.route,
        )
        for line in found
    ]
    floor, seconds = sum(line.floor for line in found), sum(line.seconds for line in found)
    all_measured = [line.measured for line in found if line.measured is not None]
    measured = sum(all_measured) if len(all_measured) == len(found) else None
    count = str(sum(line.count for line in found))
    total = ("sum", count, ms(floor), ms(seconds), ms(measured), share(floor, measured))
    return [*cells, (*total, limiter(found), "")]


PARALLEL_HEAD = ("GPUs", "step ms", "communication ms", "not hidden ms", "efficiency")


def planned(
    forward: float,
    training: float,
    parameters: int,
    gpus: Sequence[int],
    link: expected_ddp.Link = expected_ddp.NVLINK,
) -> list[expected_ddp.Step]:
    """Steps under DDP from the seconds of a forward pass and of a whole step; gradients are float32."""
    backward = max(training - forward, 0.0)
    return [expected_ddp.step(forward, backward, 4 * parameters, n, link) for n in gpus]


def parallel_rows(steps: Sequence[expected_ddp.Step]) -> list[tuple[str, ...]]:
    """Cells under ``PARALLEL_HEAD``."""
    return [
        (
            str(s.gpus),
            f"{s.seconds * 1e3:.2f}",
            f"{s.communication * 1e3:.2f}",
            f"{s.exposed * 1e3:.2f}",
            f"{100 * s.efficiency:.0f}%",
        )
        for s in steps
    ]
