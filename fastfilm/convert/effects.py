"""Facts about a graph that decide whether its calls may be moved: memory, writes, grad mode and autocast.

TorchDynamo keeps for every node a fake tensor (``meta["example_value"]``): shape, strides, type and memory of
what the node gives, as they are without conversion.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_CONTEXT = re.compile(r"^_*(set|enter|exit|push|pop|start|stop)_|hooks|^_*lock|^_*unlock")
_ASSIGNMENTS = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.ipow,
    operator.imod,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.setitem,
)
_STATISTICS: dict[Any, tuple[int, ...]] = {F.batch_norm: (1, 2), F.instance_norm: (1, 2)}
_KNOWN = ("torch", "_operator", "math", "builtins", "einops", "fastfilm")


def value(node: Any) -> Any:
    """The fake tensor of a node (or a list, a number …); None where none is known."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def shape(node: Any) -> tuple[Any, ...]:
    """Shape of a node's tensor; () where it is none."""
    found = value(node)
    return tuple(found.shape) if isinstance(found, Tensor) else ()


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; asking adds no condition to the compiled code."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return False


def storages(found: Any) -> Iterator[int]:
    """Names of the memory of all tensors in a value."""
    if isinstance(found, Tensor):
        try:
            yield found.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from storages(part)


def is_context(node: fx.Node) -> bool:
    """Whether a node changes what all later ones do: grad mode, autocast, saved tensor hooks."""
    if node.op != "call_function" or node.target is operator.setitem:
        return False
    name = getattr(node.target, "__name__", "")
    return bool(_CONTEXT.search(name)) and not isinstance(value(node), Tensor)


def is_known(node: fx.Node) -> bool:
    """Whether a node calls a function of PyTorch or Python; others may do anything."""
    if node.op != "call_function":
        return node.op != "call_module"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in ("aten", "prims")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    module = getattr(node.target, "__module__", None) or "torch"
    return module.partition(".")[0] in _KNOWN


@cache
def _inplace_at(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if not is_known(node):
        return list(node.all_input_nodes)
    out = node.kwargs.get("out")
    found = [
        n for n in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(n, fx.Node)
    ]
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if first is None:
        return found
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    own = name.endswith("_") and not name.endswith("__")
    at = None if isinstance(node.target, str) else _inplace_at(node.target)
    asked = node.kwargs.get("inplace", at is not None and len(node.args) > at and node.args[at])
    if own or name == "__setitem__" or asked or node.target in _ASSIGNMENTS:
        found.append(first)
    for i in _STATISTICS.get(node.target, ()):
        statistics = node.args[i] if len(node.args) > i else None
        if isinstance(statistics, fx.Node):
            found.append(statistics)
    return found


def is_written_by_a_reader(node: fx.Node) -> bool:
    """Whether one of the calls that read a node writes to it."""
    return any(node in writes(user) for user in node.users)


class Effects:
    """Side effects of a graph's calls, as the graph was when this was made.

    Attributes:
        order: place of each node.
        region: number of the stretch of nodes with one grad mode, autocast and so on that a node lies in.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.region: dict[fx.Node, int] = {}
        self.written: dict[int, list[int]] = defaultdict(list)
        self.sharing: dict[int, list[fx.Node]] = defaultdict(list)
        region = 0
        for node in graph.nodes:
            region += is_context(node)
            self.region[node] = region
            for name in set(storages(value(node))):
                self.sharing[name].append(node)
            for target in writes(node):
                for name in set(storages(value(target))):
                    self.written[name].append(self.order[node])

    def untouched(
        self, nodes: Iterable[Any], first: fx.Node, last: fx.Node, inside: Collection[int] = ()
    ) -> bool:
        """Whether nothing between two nodes, and not ``inside``, writes to the memory of some others."""
        a, b = self.order[first], self.order[last]
        for node in nodes:
            for name in storages(value(node)):
                if any(a < at < b and at not in inside for at in self.written.get(name, ())):
                    return False
        return True

    def written_after(self, node: fx.Node, at: fx.Node) -> bool:
        """Whether ``at`` or anything behind it writes to a node's memory."""
        start = self.order[at]
        return any(w >= start for name in storages(value(node)) for w in self.written.get(name, ()))
