"""Vocabulary of the ops and the checks of what a caller passes in.

Everything here is plain Python on shapes and strings, so that an error names the argument, what was
expected and what came before any kernel is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Lets ``torch.compile`` call ``function`` once, of plain numbers and strings, instead of following it.

    ``torch.compiler.assume_constant_result`` sets the same mark, but imports the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


Keep = Callable[[Tensor, tuple[Any, ...], Callable[[Tensor], Tensor]], Tensor | None]
"""Where a caller keeps what is made of a weight: of the weight, the form of what is made, what makes it of a copy.

None where it does not keep anything of this weight."""

ACTIVATIONS = ("none", "relu", "leaky_relu", "prelu", "elu", "silu", "gelu", "gelu_tanh")
"""Activations of a block; ``gelu`` is the erf form, ``gelu_tanh`` the tanh approximation."""

ACTIVATION_CODES = {
    "none": 0,
    "relu": 1,
    "leaky_relu": 2,
    "prelu": 2,
    "elu": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
}
"""The activations' numbers in the C++ and CUDA kernels."""

NORMS = ("none", "batch", "instance", "group", "layer")

ORDERS = ("conv-norm-film-act", "conv-norm-act-film", "conv-act-norm-film")

DROPOUT_POSITIONS = ("end", "film", "norm")
"""Where channel dropout sits: after the whole block, just before FiLM, or just before the norm."""

DEFAULT_SLOPE = {"leaky_relu": 0.01, "prelu": 0.25, "elu": 1.0}
"""Second parameter of an activation where it has one (negative slope; alpha of ELU)."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# rows of a coefficient tensor, float32 [7, N, C]:  v = g * (act(a * (y - p) + b; slope) - q) + s
A, B, G, S, P, Q, SLOPE = range(7)
COEF_ROWS = 7


def channels_last_format(ndim: int) -> torch.memory_format:
    """Channels-last memory format of a feature map with ``ndim`` dimensions (4 or 5)."""
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def channels_last(t: Tensor) -> Tensor:
    """``t`` [N, C, *S] dense in channels-last order; copies only if it is not already."""
    layout = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return t.contiguous(memory_format=layout)


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
    # sizes one by one, N first: a size that is a symbol is compared with nothing that it need not be
    if t.dim() == 1 and t.shape[0] == channels:
        return t.unsqueeze(0)
    if t.dim() == 2 and t.shape[1] == channels and t.shape[0] in (batch, 1):
        return t
    raise ValueError(
        f"{name} must have shape ({batch}, {channels}), (1, {channels}) or ({channels},), got {tuple(t.shape)}"
    )


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] | None = None,
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
) -> list[int]:
    """Spatial size of a convolution's output, as ``torch.nn.functional.conv*`` gives it."""
    dims = len(size)
    dilation = dilation or (1,) * dims
    output_padding = output_padding or (0,) * dims
    if transposed:
        return [
            (i - 1) * s - 2 * p + d * (k - 1) + o + 1
            for i, k, s, p, d, o in zip(
                size, kernel, stride, padding, dilation, output_padding, strict=True
            )
        ]
    return [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def has_idle_taps(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> bool:
    """Whether some tap of a convolution's kernel meets padding alone, wherever the kernel stands."""
    out = conv_output_size(size, kernel, stride, padding, dilation)
    each = zip(size, kernel, stride, padding, dilation, out, strict=True)
    for s, k, t, p, d, count in each:
        for tap in range(k):
            # the first position whose tap is not in front of the map
            first = max(0, -((tap * d - p) // t))
            if first >= count or first * t - p + tap * d >= s:
                return True
    return False
