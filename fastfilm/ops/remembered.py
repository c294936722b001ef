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
        # one tuple, exchanged as a whole: threads may call a block at the same time
        self._kept: tuple[Any, Sequence[Tensor | None], list[int], Tensor] | None = None

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
        kept = self._kept
        if kept is not None:
            old_form, old, old_versions, coef = kept
            if (
                versions == old_versions
                and form == old_form
                and all(a is b for a, b in zip(tensors, old, strict=True))
            ):
                return coef
        coef = compute()
        self._kept = form, tuple(tensors), versions, coef
        return coef

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()
