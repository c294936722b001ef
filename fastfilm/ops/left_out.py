"""Kernels that are left out by name, so that a faulty one costs its own work only.

    FASTFILM_WITHOUT="cuda:joint,triton:dgrad:bfloat16"

An entry is BACKEND, BACKEND:FAMILY or BACKEND:FAMILY:DTYPE. A kernel that is left out never runs. Where nothing is
forced its work is done by the next best way: a convolution by the composed route, the joint gradients by two
kernels, a pass by Triton or PyTorch. Where a backend or a route is forced, the call raises NotImplementedError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import environment, spec

_PASSES = {"pointwise": ("apply", "apply_backward"), "moments": ("moments", "moments_backward")}
_CONVOLUTIONS = {"fprop": ("fprop", "fprop_apply"), "dgrad": ("dgrad",), "wgrad": ("wgrad",)}
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "triton": {
        **_CONVOLUTIONS,
        **_PASSES,
        "taps": ("gather_taps", "gather_taps_backward"),
        "residual": ("residual", "residual_backward"),
        "coefficients": ("block_coefficients", "block_coefficients_backward", "covers_block"),
    },
    "cuda": {
        "fprop": (*_CONVOLUTIONS["fprop"], "fprop_sources", "fprop_finished"),
        "dgrad": ("dgrad", "dgrad_sources"),
        "wgrad": ("wgrad", "wgrad_sources"),
        "joint": ("joint_sources", "covers_joint"),
        "pointwise": (*_PASSES["pointwise"], "coefficients_backward"),
        "moments": _PASSES["moments"],
        "pack": (),
    },
}
"""Backend -> family of kernels -> its launchers. ``pack`` arranges the weights for the other CUDA convolutions."""

_PACKED = ("fprop", "dgrad", "joint")
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


def _wrong(part: str, reason: str) -> ValueError:
    form = "entries BACKEND, BACKEND:FAMILY or BACKEND:FAMILY:DTYPE"
    return ValueError(f"FASTFILM_WITHOUT must hold {form}, got {part!r}: {reason}")


_entries = parse(environment.read("FASTFILM_WITHOUT") or "")


@contextlib.contextmanager
def without(text: str) -> Iterator[None]:
    """Leaves out more kernels inside the block, of the whole process: for tests and measurements."""
    from . import backends, recipe

    global _entries
    before = _entries
    _entries = before | parse(text)
    try:
        backends._choose.cache_clear()
        recipe.forget()
        yield
    finally:
        _entries = before
        backends._choose.cache_clear()
        recipe.forget()


@spec.constant_when_compiled
def why_not(backend: str, family: str | None, dtype: torch.dtype | None) -> str | None:
    """Why a family of kernels is not to be used for a type (None: for any); None if it may be.

    Without a family: why not the backend at all.
    """
    for entry in _entries:
        if entry.backend == backend and entry.family in (None, family):
            alike = dtype is None or entry.dtype in (None, dtype)
            if entry.family is None or alike:
                return f"{entry} is left out by FASTFILM_WITHOUT"
    return None


class Launchers:
    """A backend's launchers without those that are left out; everything else is the module's own."""

    def __init__(self, backend: str, module: ModuleType) -> None:
        self._backend, self._module, self._entries = backend, module, _entries

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name == "covers_sources":
            return self._covers_sources
        for family, names in FAMILIES[self._backend].items():
            if name in names and why_not(self._backend, family, None):
                return self._without(name, family, found)
        return found

    def _without(self, name: str, family: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            reason = why_not(self._backend, family, _dtype((*args, *options.values())))
            if reason is None:
                return launcher(*args, **options)
            if name.startswith("covers"):
                return False
            if _forced():
                raise NotImplementedError(reason)
            return _instead(self._backend, name, reason)(*args, **options)

        return call

    def _covers_sources(self, sources: Any) -> bool:
        """Maps that a convolution would read unwritten are written where one of its kernels is left out."""
        families = () if _forced() else ("fprop", "dgrad", "wgrad")
        if any(why_not(self._backend, f, _dtype(sources)) for f in families):
            return False
        return bool(self._module.covers_sources(sources))


_made: dict[str, Launchers] = {}


def launchers(backend: str, module: Any) -> Any:
    """``module``, or what is left of it."""
    if not _entries or backend not in FAMILIES:
        return module
    made = _made.get(backend)
    if made is None or made._entries is not _entries or made._module is not module:
        made = _made[backend] = Launchers(backend, module)
    return made


def _forced() -> bool:
    from . import backends

    return backends.forced()[:2] != (None, None)


def _dtype(given: Any) -> torch.dtype | None:
    """Type of the first feature map among a launcher's arguments; None if there is none."""
    for value in given:
        if isinstance(value, Tensor) and value.dim() >= 4:
            return value.dtype
        if isinstance(value, tuple | list):
            dtype = _dtype(value)
            if dtype is not None:
                return dtype
    return None


def _instead(backend: str, name: str, reason: str) -> Callable[..., Any]:
    """The function that does a launcher's work where that is left out."""
    from . import fallback
    from .backends import BACKENDS

    if name == "coefficients_backward":
        return lambda *args: _instead(backend, "apply_backward", reason)(*args)[1]
    plain: Callable[..., Any] | None = getattr(fallback, f"_{name}", None)
    if plain is None:
        raise NotImplementedError(reason)
    passes = name in (*_PASSES["pointwise"], *_PASSES["moments"])
    if backend == "cuda" and passes and BACKENDS["triton"].unavailable() is None:
        found: Callable[..., Any] = getattr(BACKENDS["triton"].kernels(), name)
        return found
    return plain
