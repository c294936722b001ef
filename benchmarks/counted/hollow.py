"""Networks and layers called for the sake of their launches: nothing is computed, no memory is touched.

``hollow()`` leaves every operator's large result as the allocator gives it. The operating system backs a page when
it is first touched, so a network of any size runs on CPU tensors in no time and no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastfilm.ops.spec import eager

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
