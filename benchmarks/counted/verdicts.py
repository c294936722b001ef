"""The checks of kernels by name, and the verdict on each against float64. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
FAMILIES = {
    "triton": ("fprop", "dgrad", "wgrad", "pointwise", "moments", "taps", "residual", "coefficients"),
    "cuda": (
        "fprop", "dgrad", "wgrad", "pointwise", "moments", "pack", "sm90_fprop", "sm90_dgrad", "sm90_wgrad",
    ),
}  # fmt: skip
"""Those of the variable FASTFILM_WITHOUT, and the CUDA convolutions by warpgroup products."""

SM90 = "sm90_"
"""The families that begin so take the place of those named behind it, on GPUs of compute capability 9.0."""

APART = "BENCHMARKS_WITHOUT"
"""Variable with the checks of such families that are not right, for suites that take one kind or the other."""

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


def without(rows: Sequence[dict[str, Any]], apart: bool = False) -> str:
    """The value of FASTFILM_WITHOUT that leaves out what is not right.

    It knows no families of sm_90: the one whose place such a kernel takes is left out with it. ``apart``: for a
    process that takes one kind or the other by itself and asks ``why_not``; each kind is left out for itself.
    """
    bad = [row["check"] for row in rows if row["status"] in BAD]
    kept = [key for key in bad if not (apart and f":{SM90}" in key)]
    return ",".join(dict.fromkeys(key.replace(f":{SM90}", ":") for key in kept))


def apart(rows: Sequence[dict[str, Any]]) -> str:
    """The value of ``APART``."""
    return ",".join(r["check"] for r in rows if r["status"] in BAD and f":{SM90}" in r["check"])


def why_not(family: str, dtype: str) -> str | None:
    """Why a family of sm_90 is not to be used for a type in this process; None if it may be."""
    key = f"cuda:{SM90}{family}:{dtype}"
    left_out = key in os.environ.get(APART, "").split(",")
    return f"{key} is left out: its check was not right" if left_out else None
