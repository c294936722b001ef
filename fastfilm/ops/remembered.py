"""Coefficients of a block that do not depend on its map: computed once while nothing they come from changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Remembered:
    """The coefficients of a block's last call, and what they were computed from.

    They are used again if every tensor is the same object in the same version (in-place changes count), and
    no gradient is asked for. Copies and pickles of a block start without any.
    """

    def __init__(self) -> None:
        self._form: tuple[Any, ...] = ()
        self._tensors: tuple[Tensor | None, ...] = ()
        self._versions: list[int] = []
        self._coef: Tensor | None = None

    def get(
        self,
        form: tuple[Any, ...],
        tensors: Sequence[Tensor | None],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        """The coefficients of ``tensors``; ``form`` is whatever else they depend on."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return compute()
        if any(t is not None and t.is_inference() for t in tensors):
            return compute()  # such tensors have no version
        versions = [t._version for t in tensors if t is not None]
        same = (
            self._coef is not None
            and versions == self._versions
            and form == self._form
            and all(a is b for a, b in zip(tensors, self._tensors, strict=True))
        )
        if not same:
            self._coef = compute()
            self._form, self._tensors, self._versions = form, tuple(tensors), versions
        assert self._coef is not None
        return self._coef

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()
