"""A module's forward rewritten: groups in place of their layers, and maps handed on where that is possible."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastfilm.ops import DeferredMap
from fastfilm.ops.maps import Joined

from . import layers, sums
from .chains import Chain, Finder
from .group import Group, Path
from .trace import Owned, trace

_VIEWS: tuple[Any, ...] = (
    torch.cat,
    torch.concat,
    F.interpolate,
    F.avg_pool2d,
    F.avg_pool3d,
    F.max_pool2d,
    F.max_pool3d,
    torch.max_pool2d,
    torch.max_pool3d,
)
"""Functions that take a map and give one."""

_ASSIGNMENTS = ("iadd", "isub", "imul", "itruediv", "ipow", "setitem")
"""Operators that write to their first operand."""

_VIEW_MODULES = (nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample)


@dataclass(frozen=True)
class ChildCall:
    """How a forward calls a converted child: constants, and a mark for what is computed on the way."""

    path: str
    deferred: bool
    form: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def args(self, computed: Any) -> tuple[Any, ...]:
        """Arguments with ``computed`` in place of maps."""
        return tuple(computed if a is _COMPUTED else a for a in self.form)

    def kwargs(self, computed: Any) -> dict[str, Any]:
        """Keyword arguments with ``computed`` in place of maps."""
        return {k: computed if a is _COMPUTED else a for k, a in self.keywords}


_COMPUTED = object()


@dataclass(frozen=True)
class Program:
    """What a module runs for one kind of call.

    Attributes:
        run: the new forward: (module, module, *args, **kwargs).
        groups: in the order of the forward.
        children: calls of converted children.
        pending: groups whose input may be pending, and the child that it comes from if it does.
        calls: paths of the modules that the original's forward calls.
        gives: what the forward returns may be a map.
        passes: it returns one of its arguments.
        summed: groups whose output is read by one pass that adds it to another pending map.
    """

    run: Callable[..., Any]
    groups: tuple[Group, ...]
    children: tuple[ChildCall, ...]
    pending: Mapping[Group, str]
    calls: frozenset[Path]
    gives: bool
    passes: bool
    summed: frozenset[Group]


class CallChild:
    """Calls a converted child that may take and return maps."""

    __name__ = "call_child"

    def __init__(self, path: str) -> None:
        self.path = tuple(path.split("."))

    def __call__(self, owner: nn.Module, deferred: bool, *args: Any, **kwargs: Any) -> Any:
        child: Any = owner
        for name in self.path:
            child = child._modules[name]
        state = child.__dict__.get("_fastfilm")
        if state is None or layers.hooked(child):
            return child(*[written(a) for a in args], **{k: written(a) for k, a in kwargs.items()})
        return state.call(child, args, kwargs, deferred)


def written(value: Any) -> Any:
    """``value`` with tensors in place of maps, also in lists and tuples."""
    if isinstance(value, (DeferredMap, Joined)):
        return value.tensor()
    if isinstance(value, list):
        return [written(v) for v in value]
    return tuple(written(v) for v in value) if type(value) is tuple else value


def build(
    module: nn.Module,
    arguments: Mapping[str, Any],
    lists: Mapping[str, tuple[type, int]],
    deferred: bool,
    converted: Callable[[nn.Module], bool],
    whole: bool = False,
) -> Program:
    """The program of a module for calls with these constant arguments.

    Args:
        arguments, lists: see ``trace``.
        deferred: what the forward returns may be a map.
        converted: whether a child takes maps.
        whole: layers that could not be fused now belong to groups too; they run one by one.

    Raises:
        CannotTrace: with the reason.
    """
    graph = trace(module, dict(arguments), dict(lists))
    called = [n for n in graph.nodes if n.op == "call_module"]
    paths = frozenset(tuple(str(n.target).split(".")) for n in called)
    finder = Finder(module, graph, whole)
    chains = finder.find()
    passes = next(iter(reversed(graph.nodes))).args[0] in graph.find_nodes(op="placeholder")
    owner = _add_owner(graph)
    for node in graph.nodes:
        if isinstance(node.target, Owned):
            node.args = (owner, *node.args)
    made: dict[fx.Node, Group] = {}
    for chain in chains:
        made[_replace(graph, chain, owner)] = chain.group
    children: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" and converted(module.get_submodule(str(node.target))):
            children[_replace_child(graph, node, owner)] = str(node.target)
    added = sums.replace(graph, finder, owner, made, children)
    lazy = _lazy(graph, module, set(made), set(children), added, deferred)
    pending = {g: _source(n, lazy, made, children) for n, g in made.items()}
    summed = {
        x
        for node in added
        for x, other in itertools.permutations(node.all_input_nodes[1:])
        if x in made and x in lazy and other in lazy and not _bare(other, made)
    }
    result = next(iter(reversed(graph.nodes))).args[0]
    gives = isinstance(result, fx.Node) and result in lazy
    calls = []
    for node, path in children.items():
        form = tuple(
            _COMPUTED if isinstance(a, (fx.Node, list, tuple)) else a for a in node.args[1:]
        )
        words = tuple(
            (k, _COMPUTED if isinstance(a, fx.Node) else a) for k, a in node.kwargs.items()
        )
        calls.append(ChildCall(path, node in lazy, form, words))
        node.args = (node.args[0], node in lazy, *node.args[1:])
    for node in made:
        node.args = (*node.args, node in lazy)
    _plain_arguments(graph, lazy, owner)
    order = tuple(made[n] for n in graph.nodes if n in made)
    return Program(
        _function(graph),
        order,
        tuple(calls),
        {g: s for g, s in pending.items() if s is not None},
        paths,
        gives,
        passes,
        frozenset(made[s] for s in summed),
    )


def _bare(node: fx.Node, made: Mapping[fx.Node, Group]) -> bool:
    return node in made and made[node].bare


def _source(
    node: fx.Node,
    lazy: set[fx.Node],
    groups: Mapping[fx.Node, Group],
    children: Mapping[fx.Node, str],
) -> str | None:
    """The child that a group's pending input comes from; "" for a group of the same forward."""
    found = node.args[1]
    while isinstance(found, fx.Node) and found in lazy:
        if found in groups or found in children:
            return children.get(found, "")
        first = found.args[0]
        found = next(iter(first)) if isinstance(first, (list, tuple)) else first
    return None


def _add_owner(graph: fx.Graph) -> fx.Node:
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        return graph.placeholder("owner")


def _replace(graph: fx.Graph, chain: Chain, owner: fx.Node) -> fx.Node:
    """One call in place of a chain's nodes; where the first of them stood, so that its input is still whole."""
    first, last = chain.nodes[0], chain.nodes[-1]
    with graph.inserting_before(first):
        new = graph.call_function(chain.group, (owner, first.args[0]))
    last.replace_all_uses_with(new)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
    return new


def _replace_child(graph: fx.Graph, node: fx.Node, owner: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_function(
            CallChild(str(node.target)), (owner, *node.args), dict(node.kwargs)
        )
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _lazy(
    graph: fx.Graph,
    module: nn.Module,
    groups: set[fx.Node],
    children: set[fx.Node],
    added: set[fx.Node],
    deferred: bool,
) -> set[fx.Node]:
    """Nodes whose value may be a map, because everything that uses it takes one."""

    def views(node: fx.Node) -> bool:
        if node.op == "call_function":
            # indexing picks a map from a list of them
            return node.target in _VIEWS or node.target is operator.getitem
        if node.op != "call_module":
            return False
        child = module.get_submodule(str(node.target))
        return any(layers.computes_as(child, k) for k in _VIEW_MODULES) and not layers.hooked(child)

    def takes(user: fx.Node, node: fx.Node) -> bool:
        if user in groups:
            target = user.target
            assert isinstance(target, Group)
            return target.takes_maps
        if user in children or user in added:
            return True
        if user.op == "output":
            return deferred
        return views(user) and user in found

    found = groups | children | {n for n in graph.nodes if views(n)}
    order = {n: i for i, n in enumerate(graph.nodes)}
    writes = [order[n] for n in graph.nodes if n not in groups and _writes(n, module)]

    def overtaken(node: fx.Node) -> bool:
        """Whether it may show a tensor that the forward writes to before somebody reads the map."""
        own = node in groups and isinstance(node.target, Group) and node.target.conv is not None
        last = max((order[u] for u in node.users), default=0)
        return not own and any(order[node] < w < last for w in writes)

    found = {n for n in found if not overtaken(n)}
    while True:
        keep = {n for n in found if all(takes(u, n) for u in n.users)}
        if keep == found:
            return found
        found = keep


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node may write to a tensor that it is given; a converted child does not."""
    if node.op == "call_module":
        inner = module.get_submodule(str(node.target)).modules()
        return any(getattr(m, "inplace", False) for m in inner)
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    own = name.strip("_")
    in_place = own in _ASSIGNMENTS or (name.endswith("_") and not name.startswith("__"))
    asked = node.kwargs.get("inplace") is True or any(a is True for a in node.args)
    return in_place or asked or "out" in node.kwargs


def _plain_arguments(graph: fx.Graph, lazy: set[fx.Node], owner: fx.Node) -> None:
    """Writes maps among the forward's arguments that one of their users cannot take."""
    for node in [n for n in graph.nodes if n.op == "placeholder" and n is not owner]:
        users = list(node.users)
        fine = all(
            (isinstance(u.target, Group) and u.target.takes_maps)
            or isinstance(u.target, (CallChild, sums.Sum))
            or u in lazy
            for u in users
        )
        if fine:
            continue
        after = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(after):
            new = graph.call_function(written, (node,))
        for user in users:
            user.replace_input_with(node, new)


def _function(graph: fx.Graph) -> Callable[..., Any]:
    graph.lint()
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<fastfilm.convert>", "exec"), names)
    found: Callable[..., Any] = names["forward"]
    return found
