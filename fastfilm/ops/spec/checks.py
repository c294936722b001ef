"""Checks of a caller's arguments: errors name the argument, the value expected and the value received.

They look at shapes, types and strings alone, so they run before any kernel is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .names import DEFAULT_SLOPE, FLOAT_DTYPES


def as_tuple(name: str, value: int | Sequence[int], dims: int, minimum: int = 0) -> tuple[int, ...]:
    """``value`` as ``dims`` integers.

    Raises:
        TypeError: not an integer or a sequence of integers.
        ValueError: wrong length or an entry below ``minimum``.
    """
    values = (value,) * dims if isinstance(value, int) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name} must be an integer or {dims} integers, got {value!r}")
    if len(values) != dims or any(v < minimum for v in values):
        raise ValueError(f"{name} must be {dims} integers >= {minimum}, got {value!r}")
    return tuple(values)


def choice(name: str, value: str | None, allowed: Sequence[str]) -> str:
    """``value`` if it is one of ``allowed`` (``None`` means ``"none"``), else ValueError."""
    value = "none" if value is None else value
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def check_feature_map(name: str, x: Tensor) -> int:
    """Spatial dimensions (2 or 3) of a feature map [N, C, *S]; TypeError/ValueError if it is none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() not in (4, 5):
        raise ValueError(
            f"{name} must be [N, C, H, W] or [N, C, D, H, W], got shape {tuple(x.shape)}"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    return x.dim() - 2


def check_number(name: str, value: float) -> None:
    """TypeError/ValueError unless ``value`` is a number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")


def check_same_device(**tensors: Tensor | None) -> None:
    """ValueError naming the first tensor that is not on the device of the first one."""
    present = [(name, t) for name, t in tensors.items() if t is not None]
    first_name, first = present[0]
    for name, t in present[1:]:
        if t.device != first.device:
            raise ValueError(
                f"{name} is on {t.device} but {first_name} is on {first.device}; move them to one device"
            )


def check_channel_vector(name: str, t: Tensor | None, channels: int) -> None:
    """ValueError unless ``t`` is None or a floating point vector [C]."""
    if t is None:
        return
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {got}")
    if t.shape != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {tuple(t.shape)}")


def check_film(name: str, t: Tensor | None, batch: int, channels: int) -> Tensor | None:
    """γ, β or a dropout mask as [N, C] or [1, C]; accepts [C], [1, C] and [N, C].

    Raises:
        TypeError: not a floating point tensor.
        ValueError: another shape.
    """
    if t is None:
        return None
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {got}")
    # compare one size at a time: each comparison with a symbolic size adds a guard
    if t.dim() == 1 and t.shape[0] == channels:
        return t.unsqueeze(0)
    if t.dim() == 2 and t.shape[1] == channels and t.shape[0] in (batch, 1):
        return t
    raise ValueError(
        f"{name} must have shape ({batch}, {channels}), (1, {channels}) or ({channels},), got {tuple(t.shape)}"
    )


def check_slope(act: str, slope: float | Tensor | None, channels: int) -> float:
    """The activation's parameter if it is a number, else 0."""
    if act not in DEFAULT_SLOPE:
        if slope is not None:
            raise ValueError(f"slope has no meaning for activation {act!r}, got {slope!r}")
        return 0.0
    if slope is None:
        return DEFAULT_SLOPE[act]
    if isinstance(slope, Tensor):
        if slope.numel() not in (1, channels) or slope.dim() > 1 or not slope.is_floating_point():
            raise ValueError(
                f"slope must be floating point with 1 or {channels} values, got {slope.dtype} {tuple(slope.shape)}"
            )
        return 0.0
    if not isinstance(slope, (int, float)):
        raise TypeError(f"slope must be a number or a tensor, got {slope!r}")
    return float(slope)
