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
        least: bound, from below if ``above``, else from above.
        measured: the figure from a campaign's rows; None where a row for it is missing.
        unit: of the figure.
        case, mode: of its network.
    """

    figure: str
    least: float
    measured: Callable[[Rows], float | None]
    unit: str = "×"
    above: bool = True
    case: str = ""
    mode: str = "training"

    def met(self, value: float) -> bool:
        """Whether a value reaches the bound."""
        return value >= self.least if self.above else value <= self.least


def find(rows: Rows, **wanted: Any) -> Iterator[Mapping[str, Any]]:
    """Rows that were measured and have these values."""
    for row in rows:
        if row["status"] == "ok" and all(row.get(k) == v for k, v in wanted.items()):
            yield row


def speed_up(
    peer: str, case: str, mode: str, suite: str = "model", dtype: str = "bfloat16"
) -> Callable[[Rows], float | None]:
    """The peer's time over ours, both of one step of the campaign (they took turns there)."""

    def measured(rows: Rows) -> float | None:
        wanted = {"suite": suite, "case": case, "mode": mode, "dtype": dtype}
        for row in find(rows, provider=peer, **wanted):
            for own in find(rows, provider=OURS, step=row["step"], **wanted):
                if row["median_s"] and own["median_s"]:
                    return float(row["median_s"] / own["median_s"])
        return None

    return measured


def of_ours(
    key: str, case: str, mode: str, suite: str = "model", scale: float = 1.0
) -> Callable[[Rows], float | None]:
    """A value of our own row."""

    def measured(rows: Rows) -> float | None:
        for row in find(rows, suite=suite, case=case, mode=mode, provider=OURS, dtype="bfloat16"):
            if row.get(key) is not None:
                return float(row[key]) * scale
        return None

    return measured


def memory(peer: str, case: str) -> Callable[[Rows], float | None]:
    """Our peak over the peer's, of a training step."""

    def measured(rows: Rows) -> float | None:
        peaks = {}
        for name in (OURS, peer):
            wanted = {"suite": "model", "case": case, "mode": "training", "dtype": "bfloat16"}
            for row in find(rows, provider=name, **wanted):
                if row.get("peak_bytes"):
                    peaks[name] = row["peak_bytes"]
        return peaks[OURS] / peaks[peer] if len(peaks) == 2 else None

    return measured


def against_the_paper(case: str) -> Callable[[Rows], float | None]:
    """The paper's form in float32 over ours in bfloat16: two steps of a campaign, not interleaved."""

    def measured(rows: Rows) -> float | None:
        wanted = {"suite": "model", "case": case, "mode": "training"}
        theirs = [r["median_s"] for r in find(rows, provider="paper", dtype="float32", **wanted)]
        ours = [r["median_s"] for r in find(rows, provider=OURS, dtype="bfloat16", **wanted)]
        return theirs[0] / ours[0] if theirs and ours and theirs[0] and ours[0] else None

    return measured


def _against(case: str, mode: str, name: str, eager: float, tuned: float) -> list[Target]:
    peers = {
        "eager AMP channels-last": ("eager-channels-last", eager),
        "torch.compile max-autotune": ("compile-max-autotune", tuned),
    }
    return [
        Target(f"{name} against {said}", least, speed_up(peer, case, mode), case=case, mode=mode)
        for said, (peer, least) in peers.items()
    ]


def _peaks(case: str, name: str) -> list[Target]:
    figure = f"peak memory of the training step, {name}, to"
    return [
        Target(f"{figure} {peer}", bound, memory(peer, case), above=False, case=case)
        for peer, bound in (("eager-channels-last", 0.4), ("compile-max-autotune", 0.6))
    ]


def of_copy(rows: Rows) -> float | None:
    """Bandwidth of the apply kernel over the copy's, in %."""
    for row in find(rows, suite="ops", provider=OURS):
        if row.get("fraction_of_copy"):
            return 100 * float(row["fraction_of_copy"])
    return None


def _of_floor(case: str, mode: str, name: str, least: float) -> Target:
    value = of_ours("fraction_of_floor", case, mode, scale=100.0)
    return Target(f"{name}, of the roofline floor", least, value, "%", case=case, mode=mode)


TARGETS = (
    *_against(FLAT, "training", "FiLMedUNet 2D, training step", 3.0, 2.0),
    _of_floor(FLAT, "training", "FiLMedUNet 2D, training step", 60),
    *_against(FLAT, "inference", "FiLMedUNet 2D, inference", 3.0, 2.0),
    _of_floor(FLAT, "inference", "FiLMedUNet 2D, inference", 70),
    *_against(DEEP, "training", "FiLMedUNet 3D, training step", 2.5, 1.8),
    _of_floor(DEEP, "training", "FiLMedUNet 3D, training step", 60),
    Target("FiLMedUNet 3D, training step", 400, of_ours("tflops", DEEP, "training"), "TFLOP/s", case=DEEP),
    Target("nnU-Net ResidualEncoderUNet 3D, converted, against its compiled default", 2.0,
           speed_up("compile-contiguous", RESENC, "training", suite="converted"), case=RESENC),
    *_peaks(FLAT, "2D"),
    *_peaks(DEEP, "3D"),
    Target("FiLMedUNet 2D, training step, against the paper's form", 10, against_the_paper(FLAT), case=FLAT),
    Target("apply kernel, of the copy bandwidth", 85, of_copy, "%"),
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
        return "reached" if self.target.met(self.value) else "short"


def verdicts(rows: Rows) -> list[Verdict]:
    """Every target."""
    return [Verdict(t, t.measured(rows)) for t in TARGETS]


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
