"""Counts the kernel launches of one block by name: fastfilm's own, and PyTorch's casts, copies and fills.

    python -m benchmarks.counted.launches

The block is a 3×3 convolution with norm, ReLU and FiLM inside a network: its input is the map that a block before
it has left unwritten, and so is its output. Calls run on CPU tensors: the CUDA kernels emulated, Triton's
interpreted. An operator of PyTorch that moves data counts as one launch; memory and views are none.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import fastfilm
from fastfilm.ops.maps import DeferredMap
from fastfilm.ops.spec import Plan, eager

from . import python_calls

ROUTES = ("cuda/fused", "triton/fused", "triton/composed")
NORMS = ("instance", "batch")
CASTS = ("bfloat16", "autocast")
"""Parameters and maps in bfloat16, or parameters in float32 under autocast."""
MODES = ("forward", "backward", "inference")

CHANNELS, BATCH, SIZE = 16, 2, (8, 8)

_FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_")
"""Operators that move no data and are no views."""


class _Operators(TorchDispatchMode):
    """PyTorch's own operators, into a list of names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = func.is_view or name in ("detach", "alias", "_unsafe_view", "lift_fresh")
        if name == "convolution_backward":
            wanted = zip(("dgrad", "wgrad"), args[-1], strict=False)
            self.names += [f"aten.convolution_{said}" for said, want in wanted if want]
        elif func.namespace == "aten" and not views and name not in _FREE:
            self.names.append(f"aten.{name}")
        return result


@contextlib.contextmanager
def counted(extension: ModuleType | None = None) -> Iterator[list[str]]:
    """Names of the kernels launched inside, with their owner: "cuda.", "triton." or "aten."; those of "cuda" last.

    Args:
        extension: the emulated CUDA kernels, where these are to be counted.
    """
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        names.append(f"triton.{self.fn.__name__}")
        # what the interpreter does with tensors is not PyTorch's work on a GPU
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **options)

    if extension is not None:
        extension.launches()
    with patch.object(InterpretedFunction, "run", noted), eager.observed(), _Operators(names):
        yield names
    if extension is not None:
        names += [f"cuda.{name}" for name in extension.launches()]


def _block(dtype: torch.dtype) -> dict[str, Tensor]:
    """The block's tensors by the names of ``conv_norm_film``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(to)

    return {
        "weight": draw(CHANNELS, CHANNELS, 3, 3),
        "bias": draw(CHANNELS),
        "norm_weight": draw(CHANNELS),
        "norm_bias": draw(CHANNELS),
        "gamma": draw(BATCH, CHANNELS),
        "beta": draw(BATCH, CHANNELS),
    }


class Counts(NamedTuple):
    """Launches of a call by name, and the Python calls of the package where they were counted."""

    launches: list[str]
    python: python_calls.Calls | None


def of_block(
    route: str, norm: str, cast: str, extension: ModuleType | None = None, python: bool = True
) -> dict[str, Counts]:
    """Counts of a block's forward and backward pass in training, and of its forward in inference.

    Args:
        route: "backend/route".
        norm: "instance" or "batch", the latter with running statistics.
        cast: one of ``CASTS``.
        extension: the emulated CUDA kernels; with them "cuda/fused" must be served (``emulation.serving``).
        python: count Python calls too, by calls of their own; Triton's interpreter is slow under a profiler.
    """
    brain, single = torch.bfloat16, torch.float32
    tensors = _block(brain if cast == "bfloat16" else single)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    running = {}
    if norm == "batch":
        running = {"running_mean": torch.zeros(CHANNELS), "running_var": torch.ones(CHANNELS)}
    raw = torch.randn(BATCH, CHANNELS, *SIZE).to(brain, memory_format=torch.channels_last)
    coef = torch.rand(7, BATCH, CHANNELS)

    def called(training: bool) -> Any:
        x = DeferredMap(raw, coef, "relu", Plan.of(route))
        options = {"norm": norm, "activation": "relu", "training": training}
        autocast = torch.autocast("cpu", brain, enabled=cast == "autocast")
        with autocast, fastfilm.backend(*route.split("/")):
            done = fastfilm.conv_norm_film(
                x, padding=1, deferred=True, order="conv-norm-act-film",
                **options, **leaves, **running,
            )  # fmt: skip
            return (done.raw, done.coef) if isinstance(done, DeferredMap) else (done,)

    for t in (raw, coef):
        t.requires_grad_()
    inputs = (raw, coef, *leaves.values())
    found: dict[str, Counts] = {}

    def count(mode: str, call: Callable[[], Any]) -> Any:
        with counted(extension) as names:
            result = call()
        found[mode] = Counts(names, python_calls.counted(call)[0] if python else None)
        return result

    for _ in range(2):  # what is computed once is there the second time
        results = count("forward", lambda: called(True))
        upstream = [torch.ones_like(r) for r in results]
        count(
            "backward", partial(torch.autograd.grad, results, inputs, upstream, retain_graph=True)
        )
        with torch.no_grad():
            count("inference", lambda: called(False))
    return found


def figures(extension: ModuleType | None) -> Iterator[tuple[str, Counts]]:
    """The counts of all routes, named "route norm cast: mode"; "cuda/fused" with its emulated kernels only."""
    from . import emulation

    for route in ROUTES:
        if extension is None and route.startswith("cuda"):
            continue
        scope = contextlib.nullcontext() if extension is None else emulation.serving(extension)
        with scope:
            for norm in NORMS:
                for cast in CASTS:
                    for mode, counts in of_block(route, norm, cast, extension).items():
                        yield f"{route} {norm} {cast}: {mode}", counts


def main() -> None:
    """Prints a line for each figure."""
    from . import emulation

    with tempfile.TemporaryDirectory() as folder:
        extension = emulation.load(emulation.build(Path(folder)))
        for said, (names, python) in figures(extension):
            assert python is not None
            each = ", ".join(f"{n} × {k}" if n > 1 else k for k, n in Counter(names).items())
            print(f"{said:<44} {len(names):2}, Python calls {python.calls:3}: {each}")


if __name__ == "__main__":
    main()
