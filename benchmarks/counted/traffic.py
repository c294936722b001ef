"""Counts the kernels of a piece of code and the feature maps that they read and write.

    with traffic.counted() as launches:
        net(image, metadata).sum().backward()
    sum(k.reads + k.writes for k in launches)

fastfilm's own kernels are counted where their launchers are called, all others where PyTorch's dispatcher calls
them; the code runs as it does without a counter. A kernel reads each map among its arguments once and writes each
among its results once. Exceptions: PyTorch's norms read theirs twice (statistics, normalisation), its
convolution's backward is a kernel for each gradient, and a kernel that writes some channels of a map counts as
that share of it. Caches are not modelled, and a launcher counts as one kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastfilm.ops import choice, launchers
from fastfilm.ops.spec import eager


class Launch(NamedTuple):
    """One kernel, whose it is ("aten" or a backend's name), and the maps it reads and writes, with their bytes."""

    owner: str
    name: str
    reads: float
    writes: float
    bytes: float

    @property
    def passes(self) -> float:
        """Maps that go through memory."""
        return self.reads + self.writes


# operators that move no data
_FREE = (
    "view",
    "expand",
    "reshape",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "empty",
    "empty_like",
    "new_empty",
    "set_",
    "detach",
    "select",
    "slice",
    "split",
    "alias",
    "as_strided",
    "permute",
    "transpose",
    "t",
    "lift",
)


def is_map(t: Any) -> bool:
    """Whether a value is a feature map: [N, C, *S] of more positions than a kernel has."""
    if not isinstance(t, Tensor) or t.dim() not in (4, 5):
        return False
    return math.prod(t.shape[2:]) > 3 ** (t.dim() - 2)


def _size(tensors: list[Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


_collectors: list[list[Launch]] = []


def _add(owner: str, name: str, read: list[Tensor], written: list[Tensor]) -> None:
    _collectors[-1].append(Launch(owner, name, len(read), len(written), _size([*read, *written])))


class _Counting(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _FREE or func.namespace not in ("aten", "fastfilm"):
            return result
        read = [t for t in tree_leaves((args, kwargs)) if is_map(t)]
        written = [t for t in tree_leaves(result) if is_map(t)]
        if name == "convolution_backward":
            dy, x, wanted = args[0], args[1], args[-1]
            if wanted[0]:
                _add("aten", "convolution_dgrad", [dy], written)
            if wanted[1]:
                _add("aten", "convolution_wgrad", [dy, x], [])
            return result
        if name in ("zero_", "fill_", "copy_", "ones_like", "zeros_like", "full_like"):
            read = read[1:]  # overwritten, or looked at for its shape
        # [5] of a batch norm's forward: whether it takes statistics of its input
        if "norm" in name and not ("batch_norm" in name and len(args) > 5 and args[5] is False):
            read = read * 2
        _add("aten", name, read, written)
        return result


_CHOOSING = ("convolution", "convolution_gradients")
"""Launchers that choose whose kernels convolve: what they call is counted in their place."""
_CHOSEN = ("apply", "convolve", "convolve_dgrad", "convolve_wgrad")


class _Watched:
    """A backend's launchers, counted."""

    def __init__(self, owner: str, module: ModuleType) -> None:
        self._owner, self._module = owner, module

    def __getattr__(self, name: str) -> Any:
        launcher = getattr(self._module, name)
        if not callable(launcher) or name.startswith(("covers", "workspace")) or name in _CHOOSING:
            return launcher

        def call(*args: Any, **options: Any) -> Any:
            before = len(_collectors[-1]) if _collectors else 0
            result = launcher(*args, **options)
            # a launcher that autograd has kept may be called when nobody counts any more; one that is borrowed
            # from another backend has been counted there
            if _collectors and all(k.name != name for k in _collectors[-1][before:]):
                if name == "gradients":
                    # (gradient, weight, outputs, sources, …): a kernel for each gradient
                    _collectors[-1] += [
                        self._launch("wgrad", (args[0], args[3]), {}, result[1]),
                        self._launch("dgrad", args[:3], {}, result[0]),
                    ]
                else:
                    _collectors[-1].append(self._launch(name, args, options, result))
            return result

        return call

    def _launch(self, name: str, args: Any, options: Any, result: Any) -> Launch:
        maps = [t for t in tree_leaves((args, options)) if is_map(t)]
        # one kernel may be told of a map twice
        read = list({(t.data_ptr(), t.shape): t for t in maps}.values())
        written = [t for t in tree_leaves(result) if is_map(t)]
        if not name.startswith("gather"):
            return Launch(self._owner, name, len(read), len(written), _size([*read, *written]))
        # a source, and the channels of the joined map that are its own
        if name.endswith("backward"):
            joined, source = read[0], read[1]
            part = source.shape[1] / joined.shape[1]
            view = args[-1].view
            # the gradient of taps alone does not need their map; that of the affine in front does
            needed = result[1] is not None or (view is not None and view.kind == "max")
            sources = [source] if needed else []
            size = _size([joined]) * part + _size([*sources, *written])
            return Launch(self._owner, name, part + len(sources), len(written), size)
        source, joined = read[0], read[-1]
        part = source.shape[1] / joined.shape[1]
        return Launch(self._owner, name, 1, part, _size([source]) + part * _size([joined]))


def _inside(watched: _Watched | None) -> contextlib.AbstractContextManager[Any]:
    """Counts what the C++ launchers of ``_CHOOSING`` call."""
    if watched is None:
        return contextlib.nullcontext()
    room = importlib.import_module("fastfilm.ops.launchers.cpu.convolution")
    return patch.multiple(room, **{name: getattr(watched, name) for name in _CHOSEN})


def of_step(net: nn.Module, image: Tensor, metadata: Tensor) -> dict[str, list[Launch]]:
    """The launches of a network's forward and backward pass in training, and of its forward in inference."""
    found: dict[str, list[Launch]] = {}
    net.train()
    with counted() as found["forward"]:
        out = net(image, metadata)
    gradient = torch.ones_like(out)
    with counted() as found["backward"]:
        out.backward(gradient)
    net.eval()
    with torch.no_grad(), counted() as found["inference"]:
        net(image, metadata)
    return found


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """The kernels launched inside the block, in order; backward passes too, on a CPU."""
    watched = {
        b.name: _Watched(b.name, launchers.of(b.name))
        for b in choice.BACKENDS.values()
        if b.unavailable() is None and b.name != "reference"
    }
    launches: list[Launch] = []
    _collectors.append(launches)
    try:
        with (
            launchers.replaced(watched),
            _inside(watched.get("cpu")),
            eager.observed(),
            _Counting(),
        ):
            yield launches
    finally:
        _collectors.pop()
