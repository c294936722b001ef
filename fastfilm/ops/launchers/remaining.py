"""A backend without the kernels that FASTFILM_WITHOUT leaves out: PyTorch or Triton does their work instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..settings import forced, left_out
from ..settings.left_out import FAMILIES, PASSES, SM90, why_not
from ..spec import Geometry, Gradient, Output, Source
from . import available, eager, of, plain_convolutions

_GRADIENTS = ("dgrad", "wgrad", f"{SM90}dgrad", f"{SM90}wgrad")


class Remaining:
    """A backend's launchers without those that are left out; everything else is the module's own."""

    def __init__(self, backend: str, module: ModuleType) -> None:
        self._backend, self._module, self._entries = backend, module, left_out.entries

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name == "covers_sources":
            return self._covers_sources
        if name == "gradients":
            return self._gradients
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
            if _is_forced():
                raise NotImplementedError(reason)
            return _instead(self._backend, name, reason)(*args, **options)

        return call

    def _gradients(
        self,
        gradient: Gradient,
        weight: Tensor,
        outputs: Sequence[Output],
        sources: Sequence[Source],
        size: tuple[int, ...],
        geometry: Geometry,
        sums: bool = False,
    ) -> Any:
        """Both gradients, by a call each where a kernel of one is left out."""
        if not any(why_not(self._backend, f, gradient.dy.dtype) for f in _GRADIENTS):
            given = gradient, weight, outputs, sources, size, geometry, sums
            return self._module.gradients(*given)
        found = self.dgrad(gradient, weight, outputs, size, geometry)
        return found, *self.wgrad(gradient, sources, weight, geometry, sums)

    def _covers_sources(self, sources: Any) -> bool:
        """Maps that a convolution would read unwritten are written where one of its kernels is left out."""
        families = () if _is_forced() else ("fprop", "dgrad", "wgrad")
        if any(why_not(self._backend, f, _dtype(sources)) for f in families):
            return False
        return bool(self._module.covers_sources(sources))


_made: dict[str, Remaining] = {}


def remaining(backend: str, module: Any) -> Any:
    """``module``, or what is left of it."""
    if not left_out.entries or backend not in FAMILIES:
        return module
    made = _made.get(backend)
    if made is None or made._entries is not left_out.entries or made._module is not module:
        made = _made[backend] = Remaining(backend, module)
    return made


def _is_forced() -> bool:
    return forced() != (None, None)


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
    if name == "coefficients_backward":
        return lambda *args: _instead(backend, "apply_backward", reason)(*args)[1]
    plain: Callable[..., Any] | None = getattr(eager, name, None)
    if plain is None:
        plain = getattr(plain_convolutions, name, None)
    if plain is None:
        raise NotImplementedError(reason)
    passes = name in (*PASSES["pointwise"], *PASSES["moments"])
    if backend == "cuda" and passes and available.triton() is None:
        return getattr(of("triton"), name)
    return plain
