"""Arguments of compiled kernels beside checked tensors: the addresses and codes that their launchers hand over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spec import ACTIVATION_CODES


def activation_code(act: str) -> int:
    """The kernels' number of an activation; ValueError for an unknown one."""
    code = ACTIVATION_CODES.get(act)
    if code is None:
        raise ValueError(f"act must be one of {', '.join(ACTIVATION_CODES)}, got {act!r}")
    return code


def address(t: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if t is None else t.data_ptr()


def addresses(*tensors: Tensor | None) -> list[Any]:
    """``address`` of each."""
    return [0 if t is None else t.data_ptr() for t in tensors]
