"""Rows of the result, the check whether a row may show a speed-up, and the JSON file."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..counted.roofline import Work, ulp
from .harness import quantile

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"

NO_TIME = "no time left"
"""Beginning of the note of a row that the run's end left out."""

EAGER = ("eager", "eager-channels-last")
"""The two layouts of eager PyTorch; ratios are against the faster of them."""

OURS = ("fastfilm", "triton")
"""Beginnings of our providers' names: only their failures fail the run, a peer's is shown."""

ERROR_FACTOR = 1.5
"""How much larger than eager's a provider's error may be, before one ulp is added."""


PLAUSIBLE = {
    "float32": 1e-4,
    "tf32": 1e-2,
    "float16": 1e-2,
    "bfloat16": 5e-2,
    "float64": 1e-10,
}
"""Largest norm-relative error of an eager layout that may serve as the measure of another's."""

GRADIENT_FLOOR = 5e-2
"""Error of a whole network's gradient that a few flipped signs in front of ReLUs explain."""


def wrong_layout(error: float, other: float) -> bool:
    """Whether an eager layout is wrong: an error above 0.1 and ten times the other's."""
    return math.isnan(error) or (error > 0.1 and error > 10 * other)


@dataclass
class Row:
    """One provider on one case. Times in seconds, sizes in bytes; None is "not measured".

    Attributes:
        suite, case, provider, mode, dtype, device: what was measured.
        median_s, p20_s, p80_s: time of a call.
        ratio: median over the rounds of (best eager layout / this), above 1 is faster than eager.
        tflops, gbps: arithmetic and compulsory traffic of the case over the median time.
        floor_s, fraction_of_floor: roofline floor, and floor / median (1 is at the floor).
        peak_bytes: peak memory of a call; saved_bytes: kept for the backward pass.
        error: norm-relative error against float64.
        eager_error: that of eager PyTorch, the larger one of its layouts.
        status: "ok", "FAILED" (error or limit exceeded) or "skipped".
        note: a reason or a remark.
        extra: further keys of a suite, merged into the JSON object.
    """

    suite: str
    case: str
    provider: str
    mode: str
    dtype: str
    device: str
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    floor_s: float | None = None
    fraction_of_floor: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None
    eager_error: float | None = None
    status: str = OK
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def timed(self, seconds: Sequence[float], work: Work | None = None) -> Row:
        """Fills in the times of a call, one a round, and the rates of the work that it did; returns the row."""
        self.median_s = statistics.median(seconds)
        self.p20_s, self.p80_s = quantile(seconds, 0.2), quantile(seconds, 0.8)
        if work is not None:
            self.tflops = work.flops / self.median_s / 1e12
            self.gbps = work.bytes / self.median_s / 1e9
            self.floor_s, self.fraction_of_floor = work.floor_s, work.floor_s / self.median_s
        return self

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in the file: six digits; numbers that JSON cannot hold are None."""
        data = asdict(self)
        extra = data.pop("extra")
        data.update(extra)
        return {k: _rounded(v) if isinstance(v, float) else v for k, v in data.items()}


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def error_passes(error: float, eager_error: float, dtype: str) -> bool:
    """Whether ``error`` is at most 1.5 times eager's plus one ulp; NaN never passes."""
    return error <= ERROR_FACTOR * eager_error + ulp(dtype)


def check(row: Row) -> Row:
    """Marks a row whose error check fails; such a row keeps its times but has no speed-up."""
    if row.error is None or row.eager_error is None or row.status in (SKIPPED, FAILED):
        return row
    gradient, eager_gradient = row.extra.get("grad_error"), row.extra.get("eager_grad_error")
    if row.provider in EAGER:
        return row
    if gradient is not None and eager_gradient is None:
        return row
    if gradient is not None and not gradient <= max(ERROR_FACTOR * eager_gradient, GRADIENT_FLOOR):
        row.status, row.ratio = FAILED, None
        row.note = f"gradient error {gradient:.1e} against eager's {eager_gradient:.1e}"
    elif not error_passes(row.error, row.eager_error, row.dtype):
        row.status, row.ratio = FAILED, None
        row.note = f"error {row.error:.1e} against eager's {row.eager_error:.1e}"
    return row


def relative_error(
    got: Sequence[torch.Tensor | None],
    reference: Sequence[torch.Tensor | None],
    pooled: bool = False,
) -> float:
    """Norm-relative error ‖got − reference‖ / ‖reference‖ in float64.

    Args:
        got, reference: tensors pairwise; a pair with a None on either side is left out.
        pooled: one norm over all tensors together, instead of the worst of their errors.
    """
    differences, norms = [], []
    for g, r in zip(got, reference, strict=True):
        if g is None or r is None:
            continue
        r64 = r.detach().double()
        g64 = g.detach().to(r64.device).double()
        if g64.shape != r64.shape:
            return math.nan
        differences.append(float((g64 - r64).norm()))
        norms.append(float(r64.norm()))
    if pooled:
        differences, norms = [math.hypot(*differences)], [math.hypot(*norms)]
    errors = [d / n if n else d for d, n in zip(differences, norms, strict=True)]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


class Record:
    """The rows of a run; the file is rewritten after each, so that a stopped run loses nothing."""

    def __init__(self, machine: dict[str, Any], path: Path | None = None) -> None:
        self.machine = machine
        self.path = path
        self.rows: list[Row] = []
        self.failed = False

    def resume(self) -> None:
        """Takes over the rows that an earlier process has written."""
        if self.path is None or not self.path.exists():
            return
        fields = set(Row.__dataclass_fields__) - {"extra"}
        for values in json.loads(self.path.read_text(encoding="utf-8"))["rows"]:
            known = {k: v for k, v in values.items() if k in fields}
            self.rows.append(
                Row(**known, extra={k: v for k, v in values.items() if k not in fields})
            )
        self.failed = any(r.status == FAILED and r.provider.startswith(OURS) for r in self.rows)

    def add(self, row: Row) -> None:
        """Checks a row, appends it and writes the file."""
        self.rows.append(check(row))
        self.failed |= row.status == FAILED and row.provider.startswith(OURS)
        self.write()

    def write(self) -> None:
        """Writes the JSON file (to a neighbour first: a reader never sees half a file)."""
        if self.path is None:
            return
        rows = ",\n".join(json.dumps(r.as_json(), ensure_ascii=False) for r in self.rows)
        machine = json.dumps(self.machine, indent=1)
        partial = self.path.with_name(self.path.name + ".part")
        text = f'{{"machine": {machine},\n"rows": [\n{rows}\n]}}\n'
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)
