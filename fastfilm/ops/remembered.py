"""What a block keeps between calls while nothing it comes from changes: coefficients, and a whole finished call.

Tensors are recognised by identity and version, so in-place changes count. Writing through ``.data`` or replaying a
CUDA graph changes values behind PyTorch's back: ``train()`` and ``eval()`` of a block or a converted module
forget everything. Inside the capture of a CUDA graph nothing that is kept is used, and nothing is kept: a replay
computes anew from the values that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, capture, recipe
from .library import direct
from .prepared import PreparedWeight


class Call(NamedTuple):
    """A call without gradients that ended in a finished map.

    Attributes:
        form: all that it depends on beside tensors' values.
        tensors, versions: parameters, statistics, γ and β.
        finished: the rest of the work, of the block's input.
    """

    form: tuple[Any, ...]
    tensors: Sequence[Tensor | None]
    versions: list[int]
    finished: Callable[[Tensor], Tensor]


class Remembered:
    """The coefficients of a block's last call and, without gradients, that call itself.

    They are used again if every tensor is the same object in the same version and no gradient is asked for. Copies
    and pickles of a block start without any.

    Attributes:
        weight: the block's weight, prepared.
    """

    def __init__(self) -> None:
        # tuples, exchanged as a whole: threads may call a block at the same time
        self._kept: tuple[Any, Sequence[Tensor | None], list[int], Tensor] | None = None
        self._call: Call | None = None
        self.weight = PreparedWeight()

    def get(
        self,
        form: tuple[Any, ...],
        tensors: Sequence[Tensor | None],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        """The coefficients of ``tensors``; ``form`` is whatever else they depend on."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or capture.capturing():
            return compute()
        if any(t is not None and t.is_inference() for t in tensors):
            return compute()  # such tensors have no version
        versions = _versions(tensors)
        kept = self._kept
        if kept is not None:
            old_form, old, old_versions, coef = kept
            if versions == old_versions and form == old_form and all(map(is_, tensors, old)):
                return coef
        coef = compute()
        self._kept = form, tuple(tensors), versions, coef
        return coef

    def again(
        self, x: Any, tensors: Sequence[Tensor | None], form: tuple[Any, ...]
    ) -> Tensor | None:
        """The finished map of ``x`` if the last call was of the same form and tensors; else None."""
        call = self._call
        if call is None or not _alone(x):
            return None
        same = (
            call.form == _form(x, form)
            and len(call.tensors) == len(tensors)
            and all(map(is_, tensors, call.tensors))
            and call.versions == _versions(tensors)
        )
        return call.finished(x) if same else None

    def keep(
        self,
        x: Any,
        tensors: Sequence[Tensor | None],
        form: tuple[Any, ...],
        finished: Callable[[Tensor], Tensor],
    ) -> None:
        """``finished`` is what this call came to, for an input like ``x``."""
        if _alone(x) and not any(t is not None and t.is_inference() for t in tensors):
            self._call = Call(_form(x, form), tuple(tensors), _versions(tensors), finished)

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()


def _alone(x: Any) -> bool:
    """Whether nothing but the block's own forms and tensors decides what is done with ``x``, here and now."""
    return (
        not torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and direct(x)
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not capture.capturing()
    )


def _form(x: Tensor, form: tuple[Any, ...]) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, backends.forced(), recipe.epoch(), form


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [t._version for t in tensors if t is not None]
