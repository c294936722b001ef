"""The checks of kernels by name, and the verdict on each against float64. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
FAMILIES = {
    "triton": ("fprop", "dgrad", "wgrad", "pointwise", "moments", "taps", "residual", "coefficients"),
    "cuda": (
        "fprop", "dgrad", "wgrad", "pointwise", "moments", "pack", "sm90_fprop", "sm90_dgrad", "sm90_wgrad",
    ),
}  # fmt: skip
"""Those of the variable FASTFILM_WITHOUT."""

SM90 = "sm90_"
"""The families that begin so take the place of those named behind it, on GPUs of compute capability 9.0."""

RIGHT, WRONG, DIED, HUNG, SKIPPED = "right", "WRONG", "DIED", "HUNG", "skipped"
BAD = (WRONG, DIED, HUNG)

TOLERANCE = {"float32": 5e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Norm-relative error: well above what rounding gives, well below what a wrong index or a missing sum gives."""


def keys(backends: Sequence[str], dtypes: Sequence[str] = DTYPES) -> list[str]:
    """All checks, "BACKEND:FAMILY:DTYPE"."""
    return [
        f"{b}:{f}:{d}"
        for b in backends
        for f in FAMILIES[b]
        for d in dtypes
        if not (f.startswith(SM90) and d == "float32")
    ]


def judged(key: str, check: Callable[[str], float | None]) -> dict[str, Any]:
    """The row of one check, run here."""
    dtype = key.rpartition(":")[2]
    try:
        error = check(dtype)
    except Exception as failure:
        text = " ".join(f"{type(failure).__name__}: {failure}".split())
        return {"check": key, "status": WRONG, "note": text[:200]}
    if error is None:
        return {"check": key, "status": SKIPPED, "note": "there is no such kernel here"}
    status = RIGHT if error <= TOLERANCE[dtype] else WRONG  # a NaN is above every bound
    return {"check": key, "status": status, "error": error, "allowed": TOLERANCE[dtype]}


def without(rows: Sequence[dict[str, Any]]) -> str:
    """The value of FASTFILM_WITHOUT that leaves out what is not right."""
    return ",".join(row["check"] for row in rows if row["status"] in BAD)
