"""Fused share of the convolution FLOPs of every network that is known, after ``fastfilm.convert``."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import fastfilm

from ..measure.providers import one_line
from ..measure.record import FAILED, Row
from ..measure.session import Case, Session
from ..measure.table import align
from ..subjects.zoo.every import EVERY
from ..subjects.zoo.small import Network

LEVELS = (0.95, 0.8)
"""Shares of the FLOPs that networks are counted by."""

HEAD = ("network", "share", "convolutions", "graphs", "first s")


@dataclass(frozen=True)
class Left:
    """A convolution that runs as before: its path, why, and its part of the network's FLOPs."""

    name: str
    reason: str
    share: float


@dataclass(frozen=True)
class Shares:
    """What one call of a converted network came to.

    Attributes:
        share: fused part of the convolution FLOPs, 0 to 1.
        flops: of all its convolutions, two for a multiply-add.
        convolutions: their number.
        fused: number of those that run with other layers as one.
        graphs: that the call was cut into; None where the report does not tell.
        seconds: of the first call, in which graphs are captured and rewritten.
        left: convolutions that run as before, the largest part of the FLOPs first.
    """

    share: float
    flops: int
    convolutions: int
    fused: int
    graphs: int | None
    seconds: float
    left: tuple[Left, ...]

    def reasons(self) -> dict[str, float]:
        """Reason -> part of the FLOPs that is left for it, the largest first."""
        found: dict[str, float] = {}
        for part in self.left:
            found[part.reason] = found.get(part.reason, 0.0) + part.share
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(network: Network, model: nn.Module, device: str = "cpu") -> Shares:
    """Runs a converted copy of ``model`` once in training and reads its report."""
    # networks of one class share their forward's code, for which only so many graphs are kept
    torch.compiler.reset()
    converted = fastfilm.convert(model.to(device), copy=True, verbose=False)
    x = torch.randn(network.shape, generator=torch.Generator().manual_seed(0)).to(device)
    start = time.perf_counter()
    network.outputs(converted.train(), x)
    seconds = time.perf_counter() - start
    report = fastfilm.conversion_report(converted)
    counted = operations(network, model, x)
    flops = sum(counted.values())
    left = [
        Left(c.name, c.reason, counted.get(c.name, 0) / flops if flops else 0.0)
        for c in report.convolutions
        if not c.fused
    ]
    graphs = getattr(report, "graphs", None)
    return Shares(
        share=1.0 - sum(part.share for part in left),
        flops=flops,
        convolutions=len(report.convolutions),
        fused=sum(c.fused for c in report.convolutions),
        graphs=len(graphs) if isinstance(graphs, Sized) else graphs,
        seconds=seconds,
        left=tuple(sorted(left, key=lambda part: -part.share)),
    )


def operations(network: Network, model: nn.Module, x: Tensor) -> Counter[str]:
    """Multiplications and additions of each convolution of an unconverted copy, in one call, by its path.

    The report knows only of convolutions that a graph holds; this counts those that Python calls too.
    """
    found: Counter[str] = Counter()
    twin = copy.deepcopy(model).train()

    def count(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            places = args[0] if module.transposed else output
            channels = module.in_channels if module.transposed else module.out_channels
            found[name] += 2 * places.numel() * module.weight.numel() // channels

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, _ConvNd):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        network.outputs(twin, x)
    return found


def run(session: Session, networks: Iterable[Network] = EVERY) -> None:
    """One row a network, and one with the counts; packages that are not installed are skipped."""
    cells: list[tuple[str, ...]] = [HEAD]
    ends, rows = ["left"], []
    for network in networks:
        if session.budget.spent():
            session.say("shares: no time left for the other networks")
            break
        torch.manual_seed(0)
        try:
            model = network.build()
        except ImportError as error:
            session.say(f"shares: {network.id} left out ({error})")
            continue
        row, line, end = one(session, network, model)
        session.record.add(row)
        rows.append(row)
        cells.append(line)
        ends.append(end)
    counts = {level: sum(r.extra.get("share", 0.0) >= level for r in rows) for level in LEVELS}
    session.record.add(
        session.row(
            Case("shares", "all networks", "training", "float32"),
            "fastfilm",
            note=summary(len(rows), counts),
        )
    )
    lines = zip(align(cells), ends, strict=True)
    print("\n".join(f"{line}  {end}".rstrip() for line, end in lines))
    print(summary(len(rows), counts))


def one(session: Session, network: Network, model: nn.Module) -> tuple[Row, tuple[str, ...], str]:
    """Row of one network, its line and the end of that; a network that cannot run after conversion has FAILED."""
    extra = {"package": network.package, "shape": list(network.shape)}
    case = Case("shares", network.name, "training", "float32", extra=extra)
    try:
        found = measure(network, model, session.device)
    except Exception as error:  # one network that fails leaves the others their rows
        row = session.row(case, "fastfilm", status=FAILED, note=one_line(error))
        session.say(f"shares: {network.id} FAILED ({row.note})")
        return row, (network.id, FAILED, "-", "-", "-"), row.note
    row = session.row(case, "fastfilm")
    row.extra |= {
        "share": found.share,
        "flops": found.flops,
        "convolutions": found.convolutions,
        "fused": found.fused,
        "graphs": found.graphs,
        "first_s": found.seconds,
        "reasons": found.reasons(),
        "left": [[part.name, part.reason, round(part.share, 4)] for part in found.left],
    }
    reasons = "; ".join(f"{why} {part:.1%}" for why, part in found.reasons().items())
    session.say(f"shares: {network.id} {found.share:.1%}")
    line = (
        network.id,
        f"{found.share:.1%}",
        f"{found.fused} of {found.convolutions}",
        "-" if found.graphs is None else str(found.graphs),
        f"{found.seconds:.1f}",
    )
    return row, line, reasons


def summary(networks: int, counts: dict[float, int]) -> str:
    """One line: how many networks reach each of ``LEVELS``."""
    parts = ", ".join(f"at least {level:.0%} in {n}" for level, n in counts.items())
    return f"fused share of the convolution FLOPs of {networks} networks: {parts}"
