"""The figures that the library is judged by, and what a campaign says to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]

FLAT, DEEP = "FiLMedUNet 2D 320×256 b16", "FiLMedUNet 3D 128×128×128 b2"
RESENC = "nnU-Net ResEnc 128×128×128 b2"
"""Cases of the first three of ``networks.NETWORKS``."""

OURS = "fastfilm"


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        figure: what it is.
        least: its bound from below.
        measured: the figure from a campaign's rows; None where a row for it is missing.
        unit: of the figure.
        case, mode: of its network.
    """

    figure: str
    least: float
    measured: Callable[[Rows], float | None]
    unit: str = "×"
    case: str = ""
    mode: str = "training"


def find(rows: Rows, **wanted: Any) -> Iterator[Mapping[str, Any]]:
    """Rows that were measured and have these values."""
    for row in rows:
        if row["status"] == "ok" and all(row.get(k) == v for k, v in wanted.items()):
            yield row


def over(
    key: str,
    peer: str,
    case: str,
    mode: str = "training",
    suite: str = "model",
    dtype: str = "bfloat16",
) -> Callable[[Rows], float | None]:
    """A peer's value over our own, both of one step of the campaign, where they took turns.

    With another ``dtype`` than our bfloat16 they are of two steps.
    """

    def measured(rows: Rows) -> float | None:
        wanted = {"suite": suite, "case": case, "mode": mode}
        for row in find(rows, provider=peer, dtype=dtype, **wanted):
            for own in find(rows, provider=OURS, dtype="bfloat16", **wanted):
                together = row["step"] == own["step"] or dtype != "bfloat16"
                if together and row.get(key) and own.get(key):
                    return float(row[key] / own[key])
        return None

    return measured


def of_ours(key: str, scale: float = 1.0, **wanted: str) -> Callable[[Rows], float | None]:
    """A value of our own row."""

    def measured(rows: Rows) -> float | None:
        for row in find(rows, provider=OURS, dtype="bfloat16", **wanted):
            if row.get(key) is not None:
                return float(row[key]) * scale
        return None

    return measured


def _against(case: str, mode: str, name: str, eager: float, tuned: float) -> list[Target]:
    peers = {
        "eager AMP channels-last": ("eager-channels-last", eager),
        "torch.compile max-autotune": ("compile-max-autotune", tuned),
    }
    return [
        Target(
            f"{name} against {said}",
            least,
            over("median_s", peer, case, mode),
            case=case,
            mode=mode,
        )
        for said, (peer, least) in peers.items()
    ]


def _peaks(case: str, name: str) -> list[Target]:
    figure = f"peak memory of the training step, {name}:"
    return [
        Target(f"{figure} {peer} over fastfilm", least, over("peak_bytes", peer, case), case=case)
        for peer, least in (("eager-channels-last", 2.5), ("compile-max-autotune", 1.67))
    ]


def _of_floor(case: str, mode: str, name: str, least: float) -> Target:
    value = of_ours("fraction_of_floor", 100.0, suite="model", case=case, mode=mode)
    return Target(f"{name}, of the roofline floor", least, value, "%", case, mode)


TARGETS = (
    *_against(FLAT, "training", "FiLMedUNet 2D, training step", 3.0, 2.0),
    _of_floor(FLAT, "training", "FiLMedUNet 2D, training step", 60),
    *_against(FLAT, "inference", "FiLMedUNet 2D, inference", 3.0, 2.0),
    _of_floor(FLAT, "inference", "FiLMedUNet 2D, inference", 70),
    *_against(DEEP, "training", "FiLMedUNet 3D, training step", 2.5, 1.8),
    _of_floor(DEEP, "training", "FiLMedUNet 3D, training step", 60),
    Target("FiLMedUNet 3D, training step", 400,
           of_ours("tflops", suite="model", case=DEEP, mode="training"), "TFLOP/s", DEEP),
    Target("nnU-Net ResidualEncoderUNet 3D, converted, against its compiled default", 2.0,
           over("median_s", "compile-contiguous", RESENC, suite="converted"), case=RESENC),
    *_peaks(FLAT, "2D"),
    *_peaks(DEEP, "3D"),
    Target("FiLMedUNet 2D, training step, against the paper's form", 10,
           over("median_s", "paper", FLAT, dtype="float32"), case=FLAT),
    Target("apply kernel, of the copy bandwidth", 85, of_ours("fraction_of_copy", 100.0, suite="ops"), "%"),
)  # fmt: skip
"""In the order of the report."""


@dataclass(frozen=True)
class Verdict:
    """A target with what was measured."""

    target: Target
    value: float | None

    @property
    def word(self) -> str:
        """ "reached", "short" or "not measured"."""
        if self.value is None:
            return "not measured"
        return "reached" if self.value >= self.target.least else "short"


def verdicts(rows: Rows) -> list[Verdict]:
    """Every target."""
    return [Verdict(t, t.measured(rows)) for t in TARGETS]


OLD, NEW, VENDOR = "fastfilm-cuda-mma", "fastfilm-cuda-wgmma", "vendor"
"""Providers of the suite ``routes``: CUDA convolutions by mma.sync and by wgmma, and the vendor's alone."""


@dataclass(frozen=True)
class Pair:
    """A layer and direction by both kinds of CUDA convolutions, beside the vendor's alone; None: not timed."""

    case: str
    mode: str
    new: Mapping[str, Any]
    old: Mapping[str, Any] | None
    vendor: Mapping[str, Any] | None

    def over(self, peer: Mapping[str, Any] | None) -> float | None:
        """A peer's time over that of the new kernels."""
        seconds = self.new.get("median_s"), None if peer is None else peer.get("median_s")
        return None if not all(seconds) else float(seconds[1] / seconds[0])  # type: ignore[operator]


def pairs(rows: Rows) -> list[Pair]:
    """Every layer and direction that has a row by wgmma."""
    routes = [r for r in rows if r["suite"] == "routes"]
    of = {(r["case"], r["mode"], r["provider"]): r for r in routes}
    return [
        Pair(case, mode, row, of.get((case, mode, OLD)), of.get((case, mode, VENDOR)))
        for (case, mode, provider), row in of.items()
        if provider == NEW
    ]


def slower(
    rows: Rows, suites: Iterable[str] = ("model", "ops", "converted")
) -> list[tuple[str, str, float]]:
    """(case, fastest peer, its time over ours) wherever a peer was faster than our automatic choice."""
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["suite"] in suites and row["status"] == "ok" and row["median_s"]:
            key = row["step"], row["suite"], row["case"], row["mode"], row["dtype"]
            groups.setdefault(key, {})[row["provider"]] = row["median_s"]
    found = []
    for (_, suite, case, mode, dtype), times in groups.items():
        peers = {n: t for n, t in times.items() if not n.startswith(OURS)}
        own = times.get(
            OURS, min((t for n, t in times.items() if n.startswith(OURS)), default=None)
        )
        if own and peers:
            best = min(peers, key=lambda n: peers[n])
            if peers[best] < own:
                found.append((f"{suite}: {case}, {mode}, {dtype}", best, peers[best] / own))
    return found
