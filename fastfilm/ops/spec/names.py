"""Vocabulary of the operators: norms, activations, orders, and the rows of a coefficient tensor."""

from __future__ import annotations

from collections.abc import Callable
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
"""Cache callback ``keep(weight, layout, make)``: returns ``make(weight)``'s cached result, or None if this weight
is not cached."""

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
"""Activation -> its number in the C++ and CUDA kernels (``csrc/activations.h``) and in the Triton kernels."""

ACTIVATIONS = tuple(ACTIVATION_CODES)
"""Activations of a block; ``gelu`` is the erf form, ``gelu_tanh`` the tanh approximation."""

NORMS = ("none", "batch", "instance", "group", "layer")

SAMPLE_NORMS = ("group", "layer")
"""Norms that take their statistics from each sample itself in every mode: they have no running ones."""

ORDERS = ("conv-norm-film-act", "conv-norm-act-film", "conv-act-norm-film")
"""Their places are the orders' numbers in the C++ and CUDA kernels."""

DROPOUT_POSITIONS = ("end", "film", "norm")
"""Where channel dropout sits: after the whole block, just before FiLM, or just before the norm.

Their places are the positions' numbers in the C++ and CUDA kernels.
"""

DEFAULT_SLOPE = {"leaky_relu": 0.01, "prelu": 0.25, "elu": 1.0}
"""Second parameter of an activation where it has one (negative slope; alpha of ELU)."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The types' numbers in the C++ and CUDA kernels; the latter have no float64."""

# rows of a coefficient tensor, float32 [7, N, C]:  v = g * (act(a * (y - p) + b; slope) - q) + s
A, B, G, S, P, Q, SLOPE = range(7)
COEF_ROWS = 7
