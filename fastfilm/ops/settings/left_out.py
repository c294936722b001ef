"""Kernels that FASTFILM_WITHOUT leaves out by name, so that of a faulty one nothing but its own work is affected.

    FASTFILM_WITHOUT="cuda:wgrad,triton:dgrad:bfloat16"

An entry is BACKEND, BACKEND:FAMILY or BACKEND:FAMILY:DTYPE. A kernel that is left out never runs. Where nothing is
forced its work is done by the next best way: a convolution by the composed route, a
pass by Triton or PyTorch. Where a backend or a route is forced, the call raises NotImplementedError.
CUDA convolutions by warpgroup products (``sm90_fprop``) leave their work to those of the same backend (``fprop``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..spec import constant_when_compiled
from . import environment

PASSES = {"pointwise": ("apply", "apply_backward"), "moments": ("moments", "moments_backward")}
_CONVOLUTIONS = {"fprop": ("fprop",), "dgrad": ("dgrad",), "wgrad": ("wgrad",)}
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "triton": {
        **_CONVOLUTIONS,
        **PASSES,
        "taps": ("gather", "gather_backward"),
        "residual": ("residual", "residual_backward"),
        "coefficients": ("block_coefficients", "block_coefficients_backward", "covers_block"),
    },
    "cuda": {
        **_CONVOLUTIONS,
        "fprop": ("fprop", "covers_behind"),
        "pointwise": (*PASSES["pointwise"], "coefficients_backward"),
        "moments": PASSES["moments"],
        "pack": (),
        "sm90_fprop": (),
        "sm90_dgrad": (),
        "sm90_wgrad": (),
    },
}
"""Backend -> family of kernels -> its launchers.

``pack`` works for all CUDA convolutions. Those of ``SM90`` are chosen inside the launchers of the others.
"""

SM90 = "sm90_"
"""In front of the family whose place they take: CUDA convolutions by warpgroup products, of capability 9.0."""

_PACKED = ("fprop", "dgrad", "wgrad")
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32)}


class Entry(NamedTuple):
    """A kernel that is left out; ``family`` None: the whole backend, ``dtype`` None: of every type."""

    backend: str
    family: str | None
    dtype: torch.dtype | None

    def __str__(self) -> str:
        parts = [self.backend, self.family, str(self.dtype or "").removeprefix("torch.")]
        return ":".join(p for p in parts if p)


def parse(text: str) -> frozenset[Entry]:
    """The entries of the variable's text.

    Raises:
        ValueError: an unknown backend, family or type; says which there are.
    """
    found = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        backend, family, dtype, *rest = (*part.split(":"), None, None)
        if backend not in FAMILIES or any(rest):
            raise _wrong(part, f"BACKEND must be one of {', '.join(FAMILIES)}")
        if family is not None and family not in FAMILIES[backend]:
            raise _wrong(part, f"FAMILY must be one of {', '.join(FAMILIES[backend])}")
        if dtype is not None and dtype not in _DTYPES:
            raise _wrong(part, f"DTYPE must be one of {', '.join(_DTYPES)}")
        families = (family, *_PACKED) if family == "pack" else (family,)
        found |= {Entry(backend, f, _DTYPES[dtype] if dtype else None) for f in families}
    return frozenset(found)


def said() -> str:
    """The entries now, with what does the work of kernels of sm_90; empty: nothing is left out."""
    texts = []
    for entry in entries:
        by_mma = (entry.family or "").startswith(SM90)
        texts.append(f"{entry} (done by mma)" if by_mma else str(entry))
    return ", ".join(sorted(texts))


def _wrong(part: str, reason: str) -> ValueError:
    form = "entries BACKEND, BACKEND:FAMILY or BACKEND:FAMILY:DTYPE"
    return ValueError(f"FASTFILM_WITHOUT must hold {form}, got {part!r}: {reason}")


entries = parse(environment.read("FASTFILM_WITHOUT") or "")
"""The kernels that are left out now."""


@contextlib.contextmanager
def without(text: str) -> Iterator[None]:
    """Leaves out more kernels inside the block, of the whole process: for tests and measurements."""
    global entries
    before = entries
    entries = before | parse(text)
    try:
        yield
    finally:
        entries = before


@constant_when_compiled
def why_not(backend: str, family: str | None, dtype: torch.dtype | None) -> str | None:
    """Why a family of kernels is not to be used for a type (None: for any); None if it may be.

    Without a family: why not the backend at all.
    """
    for entry in entries:
        if entry.backend == backend and entry.family in (None, family):
            alike = dtype is None or entry.dtype in (None, dtype)
            if entry.family is None or alike:
                return f"{entry} is left out by FASTFILM_WITHOUT"
    return None
