"""Rows of the result, the check whether a row may show a speed-up, and the JSON file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .roofline import ulp

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"

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
"""Largest norm-relative error that rounding explains. An eager layout beyond it is wrong, and is then
neither the baseline of a ratio nor the measure of an error."""


@dataclass
class Row:
    """One provider on one case. Times in seconds, sizes in bytes; None is "not measured".

    Attributes:
        suite, case, provider, mode, dtype, device: what was measured.
        median_s, p20_s, p80_s: time of a call.
        ratio: median over the rounds of (best eager layout / this), above 1 is faster than eager.
        tflops, gbps: arithmetic and compulsory traffic of the case over the median time.
        floor_s, fraction_of_floor: roofline floor, and floor / median (1 is at the floor).
        peak_bytes: peak device memory of a call; saved_bytes: kept for the backward pass.
        error, eager_error: norm-relative error against float64, and the larger one of eager's layouts.
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

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in the file; numbers that JSON cannot hold become None."""
        data = asdict(self)
        extra = data.pop("extra")
        data.update(extra)
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()
        }


def error_passes(error: float, eager_error: float, dtype: str) -> bool:
    """Whether ``error`` is at most 1.5 times eager's plus one ulp; NaN never passes."""
    return error <= ERROR_FACTOR * eager_error + ulp(dtype)


def check(row: Row) -> Row:
    """Marks a row whose error check fails; such a row keeps its times but has no speed-up."""
    if row.error is None or row.eager_error is None or row.status == SKIPPED:
        return row
    if not error_passes(row.error, row.eager_error, row.dtype):
        row.status, row.ratio = FAILED, None
        row.note = f"error {row.error:.1e} against eager's {row.eager_error:.1e}"
    return row


def relative_error(
    got: list[torch.Tensor | None], reference: list[torch.Tensor | None], pooled: bool = False
) -> float:
    """Norm-relative error ‖got − reference‖ / ‖reference‖ in float64.

    Args:
        got, reference: tensors pairwise; a pair with a None on either side is left out.
        pooled: the worse of the first tensor's error and of one norm over all the others together,
            instead of the worst of all.
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
    if pooled and len(norms) > 1:
        differences = [differences[0], math.hypot(*differences[1:])]
        norms = [norms[0], math.hypot(*norms[1:])]
    errors = [d / n if n else d for d, n in zip(differences, norms, strict=True)]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


class Record:
    """The rows of a run; the file is rewritten after each, so that a stopped run loses nothing."""

    def __init__(self, machine: dict[str, Any], path: Path | None = None) -> None:
        self.machine = machine
        self.path = path
        self.rows: list[Row] = []
        self.failed = False

    def add(self, row: Row) -> None:
        """Checks a row, appends it and writes the file."""
        self.rows.append(check(row))
        self.failed |= row.status == FAILED and row.provider.startswith(OURS)
        self.write()

    def write(self) -> None:
        """Writes the JSON file (to a neighbour first: a reader never sees half a file)."""
        if self.path is None:
            return
        data = {"machine": self.machine, "rows": [r.as_json() for r in self.rows]}
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(partial, self.path)
