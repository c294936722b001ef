"""Prepared weights for inference: copies in autocast's type and in the layout of PyTorch's fastest convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..launchers import available
from ..spec import channels_last_format
from ..spec import dense as dense_operands


class PreparedWeight:
    """Copies of a block's weight for inference, kept for as long as no byte of the weight changes.

    Each call compares the weight with a copy, from which everything here was made: whatever writes to the weight,
    or exchanges it, is noticed. Comparing takes less time than casting, which starts threads. Copies and pickles
    start without any.
    """

    def __init__(self) -> None:
        # tuples, exchanged as a whole: threads may call a block at the same time
        self._cast: tuple[Tensor, Tensor] | None = None
        self._packed: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` on a CPU in another type, channels-last; the same tensor while its values are the same.

        The result has no gradient and must not be written to.
        """
        kept = self._cast
        if kept is not None and kept[1].dtype == dtype and _same(kept[0], weight):
            return kept[1]
        copy = weight.detach().clone()
        order = channels_last_format(weight.dim())
        made = copy.to(dtype, memory_format=order)
        self._cast = copy, made
        return made

    def pack(
        self, weight: Tensor, form: tuple[Any, ...], make: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """The result of ``make`` for a weight, once for each ``form``; None where nothing can be kept.

        Args:
            make: called with the copy that later weights are compared with: another process may write to the
                weight meanwhile.
        """
        own = self._cast is not None and weight is self._cast[1]
        if not own and not dense(weight):
            return None
        kept = self._packed
        # no caller writes to a result of ``cast``
        if kept and kept[1] == form and (kept[0] is weight if own else _same(kept[0], weight)):
            return kept[2]
        copy = weight if own else weight.detach().clone()
        made = make(copy)
        self._packed = copy, form, made
        return made

    def __reduce__(self) -> tuple[type[PreparedWeight], tuple[()]]:
        return PreparedWeight, ()


def dense(weight: Tensor) -> bool:
    """Whether a weight can be prepared: by the C++ extension, its bytes being its values without gaps."""
    order = channels_last_format(weight.dim())
    filled = weight.is_contiguous() or weight.is_contiguous(memory_format=order)
    return filled and dense_operands.values(weight) is weight and available.cpu() is None


def _same(copy: Tensor, weight: Tensor) -> bool:
    """Whether both have the same bytes in the same layout."""
    from ..launchers.cpu import _C

    return (
        copy.dtype == weight.dtype
        and copy.shape == weight.shape
        and copy.stride() == weight.stride()
        and _C.same_bytes(copy.data_ptr(), weight.data_ptr(), copy.nbytes)
    )
