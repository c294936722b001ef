"""The rewriting of one graph: a block replaces each group, and maps stay deferred where all readers take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastfilm.ops import maps
from fastfilm.ops.spec import Options

from . import calls, functions, layouts
from .effects import Effects, same, shape, value, writes
from .functions import Activation, bind
from .groups import Finder, Group, fit, fits_slope, number, operations

AS_FAST = "PyTorch's own layers, which are as fast here"


@dataclass(frozen=True)
class Found:
    """One convolution of a graph.

    Attributes:
        weight: its node.
        roles: what it runs with; empty if it is left alone.
        reason: why it is left alone; with roles, what runs them instead of a block.
        operations: multiplications and additions of a call.
        kernel: its size.
        module: path of the module that called it, as TorchDynamo writes it.
    """

    weight: Any
    roles: tuple[str, ...]
    reason: str
    operations: int
    kernel: tuple[int, ...]
    module: str


@dataclass
class _Sum:
    """x + residual and the activation behind it."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    last: fx.Node
    activation: Activation


class Rewriter:
    """Rewrites a graph in place.

    Attributes:
        found: its convolutions, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        swishes(graph)
        self.effects = Effects(graph)
        self.finder = Finder(graph, self.effects)
        self.found: list[Found] = []

    def run(self) -> bool:
        """Finds and replaces; whether anything was."""
        groups = {g.last: g for g in self.finder.find()}
        sums = {s.last: s for s in self._sums(groups)}
        lazy = self._lazy(groups, sums)
        self._note(groups, sums, lazy)
        groups = {n: g for n, g in groups.items() if self._worth(g, lazy)}
        if not groups:
            return False
        self._hand_on(lazy)
        made: set[fx.Node] = set()
        self.now: dict[fx.Node, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node in groups:
                new = self._replace_group(groups[node], self._how(node, lazy, sums))
            elif node in sums:
                new = self._replace_sum(sums[node])
            else:
                # calls on views of maps stay: deferred maps implement PyTorch's functions
                continue
            new.meta["example_value"] = value(node)
            node.replace_all_uses_with(new)
            self.now[node] = new
            if node not in lazy:
                made.add(new)
            old = groups[node].members if node in groups else [sums[node].node, node]
            for dead in reversed(dict.fromkeys(old)):
                self.graph.erase_node(dead)
        apart = {g.members[0] for g in self.finder.apart}
        layouts.restore(self.graph, made, apart, self.effects)
        return True

    def _worth(self, group: Group, lazy: set[fx.Node]) -> bool:
        """Whether a group gains from running as one."""
        if group.conv is not None:
            return bool(group.letters) or group.x in lazy or group.last in lazy
        return len(group.letters) > 1 or group.last in lazy

    # sums

    def _sums(self, groups: dict[fx.Node, Group]) -> list[_Sum]:
        """Additions to the output of a group, whole or with the activation that follows."""
        found: list[_Sum] = []
        for node in self.graph.nodes:
            operands = self._operands(node, groups)
            if operands is None:
                continue
            last, activation = node, Activation("none")
            users = list(node.users)
            acts = functions.activation_of(users[0]) if len(users) == 1 else None
            if acts is not None and acts[1] is node and users[0] not in self.finder.taken:
                fits = fits_slope(acts[0], shape(node)[1])
                near = self.effects.region[users[0]] == self.effects.region[node]
                inside = [self.effects.order[users[0]]]
                if fits and near and self.effects.untouched(operands, node, users[0], inside):
                    last, activation = users[0], acts[0]
            self.finder.taken.update((node, last))
            found.append(_Sum(node, operands, last, activation))
        return found

    def _operands(
        self, node: fx.Node, groups: dict[fx.Node, Group]
    ) -> tuple[fx.Node, fx.Node] | None:
        if node.target not in functions.SUMS or node in self.finder.taken:
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        x, residual = node.args
        if not isinstance(x, fx.Node) or not isinstance(residual, fx.Node) or x is residual:
            return None
        a, b, out = value(x), value(residual), value(node)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() not in (4, 5):
            return None
        alike = a.dtype == b.dtype == out.dtype and a.device == b.device and a.dim() == b.dim()
        if not alike or not all(same(m, n) for m, n in zip(a.shape, b.shape, strict=True)):
            return None
        if not any(n in groups and groups[n].letters for n in (x, residual)):
            return None
        if x in writes(node) and (x not in groups or len(x.users) != 1):
            # another call reads the map that the sum is written to
            return None
        return x, residual

    # the maps that stay deferred

    def _lazy(self, groups: dict[fx.Node, Group], sums: dict[fx.Node, _Sum]) -> set[fx.Node]:
        """Nodes whose value may stay unwritten, because everything that uses it takes it so."""
        found = set(groups)
        for node in self.graph.nodes:
            if node.target in functions.VIEWS and self._is_view(node):
                found.add(node)
        starts = {g.members[0]: g for g in groups.values()}
        added = {s.node: s for s in sums.values()}

        def takes(user: fx.Node, node: fx.Node) -> bool:
            if self.effects.region.get(user) != self.effects.region.get(node):
                return False
            if user in starts:
                group = starts[user]
                read = list(user.all_input_nodes).count(node)
                return group.conv is not None and group.x is node and read == 1
            if user in added:
                return node in added[user].operands
            return user in found and user not in groups

        def source(node: fx.Node) -> bool:
            """Whether there is something to hand on: a group, or a view of what is handed on."""
            if node in groups:
                group = groups[node]
                still = group.conv is not None or not self.effects.written_after(group.x, node)
                # a convolution alone has only its bias pending, and the sum is written in any case
                return still and (bool(group.letters) or all(u in added for u in node.users))
            given = node.args[0] if node.target in functions.JOINS else node.args[:1]
            parts: list[fx.Node] = list(given)  # type: ignore[arg-type]
            if any(self.effects.written_after(p, node) for p in parts if p not in found):
                return False
            return any(p in found for p in parts) or _enlarges(node)

        while True:
            keep = {n for n in found if n.users and source(n) and all(takes(u, n) for u in n.users)}
            if keep == found:
                return found
            found = keep

    def _is_view(self, node: fx.Node) -> bool:
        if node.target not in functions.JOINS:
            first = node.args[0] if node.args else None
            if not isinstance(first, fx.Node) or any(
                isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())
            ):
                return False
            return len(shape(first)) in (4, 5) and len(shape(node)) == len(shape(first))
        parts = node.args[0] if node.args else None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, (list, tuple)) or len(shape(node)) not in (4, 5):
            return False
        dims = len(shape(node))
        return dim in (1, 1 - dims) and all(len(shape(p)) == dims for p in parts)

    def _hand_on(self, lazy: set[fx.Node]) -> None:
        """Puts a call in front of enlarged tensors that makes of them maps which have views."""
        for node in list(self.graph.nodes):
            if node in lazy and _enlarges(node) and node.args[0] not in lazy:
                x = node.args[0]
                with self.graph.inserting_before(node):
                    new = self.graph.call_function(maps.unwritten, (x,))
                new.meta["example_value"] = value(x)
                node.replace_input_with(x, new)

    def _how(self, node: fx.Node, lazy: set[fx.Node], sums: dict[fx.Node, _Sum]) -> bool | str:
        if node not in lazy:
            return False
        added = {s.node for s in sums.values()}
        return "always" if all(u in added for u in node.users) else True

    # the new calls

    def _replace_group(self, group: Group, deferred: bool | str) -> fx.Node:
        norm, given = group.norm or (None, {})
        slope = self.now.get(group.activation.slope, group.activation.slope)
        given = {k: self.now.get(v, v) if isinstance(v, fx.Node) else v for k, v in given.items()}
        ordered = fit(group.letters, group.activation.homogeneous)
        assert ordered is not None
        order, place = ordered
        options = Options(
            norm,
            given.get("num_groups"),
            given.get("training", False),
            given.get("eps", 1e-5),
            group.activation.name,
            slope if isinstance(slope, (int, float)) else None,
            order,
            place,
            False,
        )
        # in place of the last member; inputs may be groups that were replaced before
        last = group.last
        with self.graph.inserting_before(last):
            mask = self._mask(group)
            films = [self._flat(n, group) for n in (group.gamma, group.beta)]
            own = self._own(group)
            statistics = [given.get(k) for k in ("running_mean", "running_var")]
            tensors = [given.get("weight"), given.get("bias"), *statistics, *films, mask]
            momentum = given.get("momentum", 0.1)
            learned = slope if isinstance(slope, fx.Node) else None
            weight = own.get("weight")
            prepares = isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr")
            geometry = _geometry(own, group) if group.conv is not None else None
            call = calls.Block(geometry, options, deferred, prepares)
            args = (own["input"], weight, own.get("bias"), momentum, *tensors, learned)
            return self.graph.call_function(call, args)

    def _own(self, group: Group) -> dict[str, Any]:
        """Arguments of the group's first call as they are by now."""
        first = group.members[0]
        if group.conv is None:
            return {"input": first.args[0]}
        form = functions.CONVOLUTIONS[first.target][2]
        own = bind(first, form)
        assert own is not None
        return own | {"padding": group.conv["padding"]}

    def _flat(self, node: fx.Node | None, group: Group) -> Any:
        if node is None:
            return None
        return self.graph.call_method("reshape", (self.now.get(node, node), (-1, group.channels)))

    def _mask(self, group: Group) -> Any:
        if group.drop is None:
            return None
        node, p = group.drop
        first = group.members[0]
        # the mask is drawn in its old place, so that other calls draw the same random numbers
        with self.graph.inserting_before(node):
            args = (first.args[0], group.channels, p, value(node).dtype)
            return self.graph.call_function(calls.draw_channel_mask, args)

    def _replace_sum(self, made: _Sum) -> fx.Node:
        slope = self.now.get(made.activation.slope, made.activation.slope)
        learned = slope if isinstance(slope, fx.Node) else None
        call = calls.Sum(made.activation.name, None if learned is not None else slope)
        with self.graph.inserting_before(made.last):
            args = (*made.node.args, *(() if learned is None else (learned,)))
            return self.graph.call_function(call, args)

    # the report

    def _note(
        self, groups: dict[fx.Node, Group], sums: dict[fx.Node, _Sum], lazy: set[fx.Node]
    ) -> None:
        of = {g.members[0]: g for g in groups.values()}
        apart = {g.members[0]: g for g in self.finder.apart}
        added = {n for s in sums.values() for n in s.operands}
        for node in self.graph.nodes:
            entry = functions.CONVOLUTIONS.get(node.target)
            given = None if entry is None else bind(node, entry[2])
            if entry is None or given is None:
                continue
            roles: tuple[str, ...] = ()
            reason = self.finder.left.get(node, "nothing to fuse beside it")
            group = of.get(node)
            if node in apart:
                roles, reason = apart[node].roles, AS_FAST
            if group is not None and self._worth(group, lazy):
                pending = ("pending",) if group.x in lazy else ()
                roles = (*pending, *group.roles, *(("add",) if group.last in added else ()))
            stack = list(node.meta.get("nn_module_stack", {}).values())
            self.found.append(
                Found(
                    given["weight"],
                    roles,
                    reason if node in apart or not roles else "",
                    operations(node, given, entry[1]),
                    tuple(shape(given["weight"])[2:]),
                    stack[-1][0] if stack else "",
                )
            )


def _geometry(own: dict[str, Any], group: Group) -> Any:
    def each(name: str) -> Any:
        found = own.get(name, 0)
        return (found,) * group.dims if isinstance(found, int) else tuple(found)

    return (
        each("stride"),
        each("padding"),
        each("dilation"),
        group.transposed,
        each("output_padding"),
        own["groups"],
    )


def _enlarges(node: fx.Node) -> bool:
    """Whether a call enlarges a tensor that may as well stay small until a convolution reads it.

    In training it is faster to keep the enlarged one than to make it twice.
    """
    if node.target is not F.interpolate or len(shape(node)) not in (4, 5):
        return False
    if torch.is_grad_enabled() or value(node).device.type != "cpu":
        return False
    before, after = shape(node.args[0])[2:], shape(node)[2:]
    return math.prod(map(number, after)) > math.prod(map(number, before))


def swishes(graph: fx.Graph) -> None:
    """Writes x · sigmoid(x) as the one call that it is."""
    for node in list(graph.nodes):
        if node.target not in functions.PRODUCTS or len(node.args) != 2 or node.kwargs:
            continue
        if node.target in ("mul_",) or getattr(node.target, "__name__", "") == "imul":
            continue
        for x, gate in (node.args, node.args[::-1]):
            if not isinstance(gate, fx.Node) or gate.target not in functions.SIGMOIDS:
                continue
            if gate.args != (x,) or gate.kwargs or len(gate.users) != 1:
                continue
            with graph.inserting_before(node):
                new = graph.call_function(torch.nn.functional.silu, (x,))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            graph.erase_node(gate)
            break
