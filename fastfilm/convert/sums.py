"""The end of a residual block: the sum of two maps, and its activation, in one pass."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastfilm.ops import DeferredMap
from fastfilm.ops.maps import Map, plain
from fastfilm.ops.residual import add_act

from .chains import Finder
from .group import Member, watched
from .layers import Activation

_FUNCTIONS: tuple[Any, ...] = (operator.add, torch.add)
_IN_PLACE: tuple[Any, ...] = (operator.iadd,)
_NONE = Activation("none")


@dataclass(frozen=True)
class Sum:
    """activation(x + residual).

    Attributes:
        act: the activation as the original runs it; None without one.
        kind: its class, where it is a module.
    """

    activation: Activation = _NONE
    act: Member | None = None
    kind: type[nn.Module] | None = None

    __name__ = "sum_of_maps"

    def __call__(self, owner: nn.Module, x: Map, residual: Map) -> Tensor:
        modules: dict[Any, Any] = {}
        seen = False
        if self.kind is not None:
            assert self.act is not None and self.act.path is not None
            modules, seen = watched(owner, {self.act.path: self.kind}, self.activation)
        fused = owner.__dict__["_fastfilm"].fused and not seen and _alike(x, residual)
        if not fused:
            total: Tensor = plain(x) + plain(residual)
            return total if self.act is None else self.act(modules, total)
        slope: float | Tensor | None = self.activation.slope
        if self.activation.path is not None:
            slope = modules[self.activation.path].weight
        return add_act(x, residual, self.activation.name, slope)


def _alike(x: Any, residual: Any) -> bool:
    """Whether one pass can add two values: maps of one form, of which one at least is pending."""
    if not isinstance(x, DeferredMap) and not isinstance(residual, DeferredMap):
        return False
    return (
        hasattr(x, "shape")
        and hasattr(residual, "shape")
        and x.shape == residual.shape
        and x.dtype == residual.dtype
        and x.device == residual.device
    )


def replace(
    graph: fx.Graph,
    finder: Finder,
    owner: fx.Node,
    groups: Collection[fx.Node],
    children: Collection[fx.Node],
) -> set[fx.Node]:
    """Puts a ``Sum`` in place of every addition to a group's or a converted child's output; the new nodes."""
    made: set[fx.Node] = set()
    for node in list(graph.nodes):
        operands = _operands(node, groups, children)
        if operands is None:
            continue
        users = list(node.users)
        found = finder.activation_at(users[0], node) if len(users) == 1 else None
        last, total = node, Sum()
        if found is not None:
            last, (act, member) = users[0], found
            module = finder.module(last)
            kind = None if module is None else type(module)
            total = Sum(act, member, kind)
        with graph.inserting_before(node):
            new = graph.call_function(total, (owner, *operands))
        last.replace_all_uses_with(new)
        for old in (last, node) if last is not node else (node,):
            graph.erase_node(old)
        made.add(new)
    return made


def _operands(
    node: fx.Node, groups: Collection[fx.Node], children: Collection[fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """Both sides of an addition that can run as one pass, or None."""
    method = node.op == "call_method" and node.target in ("add", "add_")
    if not (method or (node.op == "call_function" and node.target in _FUNCTIONS + _IN_PLACE)):
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    x, residual = node.args
    if not isinstance(x, fx.Node) or not isinstance(residual, fx.Node) or x is residual:
        return None
    made = {*groups, *children}
    if x not in made and residual not in made:
        return None
    if node.target in _IN_PLACE or node.target == "add_":
        # what else sees the map that the sum is written to must not miss it
        if x not in made or len(x.users) != 1:
            return None
        # and a child may return what it was given
        if x in children and any(
            len(a.users) != 1 for a in x.all_input_nodes if a.target != "owner"
        ):
            return None
    return x, residual
