"""FLOP formulas of the convolution operators: ``FlopCounterMode`` counts what it counts for PyTorch's own.

``torch.utils.flop_counter`` is heavy to import (it brings Triton) and few programs need it, so the formulas are
registered when it is imported, before any counter can be made.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


# positions are those of the schemas in ``convolution.py``
def _conv(x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    return _count(x, weight, out_shape[0], rest[8])


def _conv_apply(x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    return _count(x, weight, out_shape, rest[8])


def _conv_backward(
    dy: Any, dstats: Any, x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any
) -> int:
    stride, padding, dilation, transposed, output_padding, groups, _plan, *wanted = rest[6:]
    formula = sys.modules[_COUNTER].conv_backward_flop
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    return int(formula(dy, x, weight, None, *geometry, [*wanted, False], out_val=out_shape))


def _count(x: Any, weight: Any, out: Any, transposed: bool) -> int:
    return int(sys.modules[_COUNTER].conv_flop_count(x, weight, out, transposed=transposed))


def register(counter: ModuleType) -> None:
    """Registers the formulas with ``torch.utils.flop_counter``."""
    ops = torch.ops.fastfilm
    for op, formula in ((ops.conv, _conv), (ops.conv_apply, _conv_apply)):
        counter.register_flop_formula(op)(formula)
    counter.register_flop_formula(ops.conv_backward)(_conv_backward)


class _Registering(importlib.abc.Loader):
    """The loader of ``torch.utils.flop_counter``, and ``register`` behind it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register(module)


class _Watching(importlib.abc.MetaPathFinder):
    """Notices the first import of ``torch.utils.flop_counter``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def watch() -> None:
    """Registers the formulas now if the counter is there, else when it is imported."""
    counter = sys.modules.get(_COUNTER)
    if counter is None:
        sys.meta_path.insert(0, _Watching())
    else:
        register(counter)
