"""Networks and layers called for the sake of their launches: nothing is computed, no memory is touched.

``hollow()`` leaves every operator's large result as the allocator gives it. The operating system backs a page when
it is first touched, so a network of any size runs on CPU tensors in no time and no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastfilm
from fastfilm import check
from fastfilm.ops.spec import eager
from fastfilm.ops.spec.precision import float32_products

from .blocks import Block
from .layers import LayerStep
from .networks import NETWORKS
from .roofline import Layer
from .step import Step
from .suites.model import METADATA, twin
from .suites.routes import CHECKED, DIRECTIONS, SUBJECTS, step_of

LARGE = 1 << 16
"""Elements from which a tensor is left as it comes."""


class _Hollow(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.is_view or (given and max(t.numel() for t in given) < LARGE):
            return func(*args, **kwargs)
        originals: dict[int, Tensor] = {}

        def shape_of(t: Tensor) -> Tensor:
            like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            originals[id(like)] = t
            return like

        def memory_for(t: Tensor) -> Tensor:
            found = originals.get(id(t))  # an operator in place returns its argument
            return (
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if found is None else found
            )

        shapes, options = tree_map_only(Tensor, shape_of, (args, kwargs))
        if not given or "device" in options:
            options["device"] = "meta"
        if "generator" in options:
            options["generator"] = None
        made = func(*shapes, **options)
        if not given and max(t.numel() for t in tree_leaves(made)) < LARGE:
            return func(*args, **kwargs)
        return tree_map_only(Tensor, memory_for, made)


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Leaves large results as the allocator gives them; fastfilm goes its way of eager mode."""
    with eager.observed(), _Hollow():
        yield


Calls = Iterator[Callable[[], object]]

ROUTES = ("fused", "composed")


def _networks(*routes: str | None) -> Calls:
    """FiLMed U-Nets in bfloat16, training and inference, by the automatic choice or by one route throughout."""
    for network in NETWORKS[:2]:
        model = twin(network.build())
        image = torch.empty(network.batch, network.channels, *network.size)
        upstream = torch.empty(network.batch, network.classes, *network.size)
        metadata = torch.zeros(network.batch, METADATA)
        for mode in ("inference", "training"):
            for route in routes:
                scope = partial(fastfilm.backend, "triton", route)
                yield Step(
                    model, image, metadata, upstream,
                    mode=mode, dtype="bfloat16", layout="channels-last", scope=scope,
                )  # fmt: skip


def _layers() -> Calls:
    """The suite ``routes`` in bfloat16: each layer and the crop of it that is compared, in every direction."""
    for subject in SUBJECTS:
        for sized in (subject, subject.sized(CHECKED[subject.dims])):
            for route in ROUTES:
                for wanted in DIRECTIONS.values():
                    if subject.block.layer.input_grad or "input" not in wanted or len(wanted) > 2:
                        yield step_of(sized, "cpu", "bfloat16", f"triton/{route}", wanted)


def _proof() -> Calls:
    """One small layer by each route, forward."""
    for route in ROUTES:
        scope = partial(fastfilm.backend, "triton", route)
        yield LayerStep(
            Block(Layer(16, 16, (8, 8)), 2), "cpu", "bfloat16", "training", scope
        ).forward


def _check() -> Calls:
    """All that ``fastfilm check`` launches on a GPU."""
    triton = check.BACKENDS["triton"]

    def call(case: check.Case, route: str, dtype: torch.dtype) -> None:
        with float32_products(False):
            check._run(case, 0, "triton", route, dtype, "cpu")

    for case in check.CASES:
        for dtype in triton.dtypes:
            for route in check._routes(triton, case):
                yield partial(call, case, route, dtype)


WORKLOADS: dict[str, Callable[[], Calls]] = {
    "proof": _proof,
    "networks": partial(_networks, None),
    "layers": _layers,
    "check": _check,
    "routes": partial(_networks, *ROUTES),
}
"""By name, the most important first."""
