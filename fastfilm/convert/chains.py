"""Finding, in the graph of a forward, the layers that can run as one group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from . import families, layers
from .group import Group, Member, Path
from .layers import Activation


@dataclass
class Chain:
    """Consecutive nodes and the group that they make."""

    nodes: list[fx.Node]
    group: Group


class Finder:
    """Chains in one graph.

    Args:
        owner: the module whose forward the graph is.
        whole: take in layers that run one by one for the moment: hooked ones, dropouts of single values.
    """

    def __init__(
        self,
        owner: nn.Module,
        graph: fx.Graph,
        whole: bool = False,
    ) -> None:
        self.owner, self.graph, self.whole = owner, graph, whole
        self.taken: set[fx.Node] = set()

    def find(self) -> list[Chain]:
        """Chains that start with a convolution, then what is left of norms with their activations."""
        found = [c for n in self.graph.nodes if (c := self._from_convolution(n)) is not None]
        found += [c for n in self.graph.nodes if (c := self._from_norm(n)) is not None]
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls with one argument, if it does."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        return self.owner.get_submodule(str(node.target))

    def _norm(self, node: fx.Node, module: nn.Module) -> str | None:
        return layers.norm_of(module, self.whole, node.meta.get("base"))

    def _from_convolution(self, node: fx.Node) -> Chain | None:
        conv = self.module(node)
        if conv is None or layers.convolution_dims(conv) is None:
            return None
        base = node.meta.get("base")
        if layers.unfit_convolution(conv, base) is not None and not self.whole:
            return None
        if base is not None:
            padding = node.args[0]
            own = isinstance(padding, fx.Node) and len(padding.users) == 1
            if own and str(padding.target).startswith(f"{node.target}."):  # type: ignore[union-attr]
                return self._follow([padding, node], ["pad", "conv"])  # type: ignore[list-item]
        return self._follow([node], ["conv"])

    def _from_norm(self, node: fx.Node) -> Chain | None:
        norm = self.module(node)
        if node in self.taken or norm is None or self._norm(node, norm) is None:
            return None
        return self._follow([node], ["norm"])

    def _follow(self, nodes: list[fx.Node], roles: list[str]) -> Chain:
        first = nodes[-1]
        activation = Activation("none")
        while True:
            step = self._next(nodes[-1])
            if step is None:
                break
            node, role, acts = step
            if role in ("norm", "act") and role in roles:
                break
            if role == "norm" and not self._norm_fits(first, node):
                break
            if acts is not None:
                activation = acts
            nodes.append(node)
            roles.append(role)
        if "norm" not in roles and "drop" in roles:
            # nothing to fold a dropout into
            keep = roles.index("drop")
            nodes, roles = nodes[:keep], roles[:keep]
            activation = activation if "act" in roles else Activation("none")
        self.taken.update(nodes)
        return Chain(nodes, self._group(nodes, roles, activation))

    def _next(self, node: fx.Node) -> tuple[fx.Node, str, Activation | None] | None:
        """The only user of a node, if it is a layer that a group can hold."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        if user in self.taken:
            return None
        if user.op in ("call_function", "call_method"):
            acts = self._activation_function(user, node)
            return None if acts is None else (user, "act", acts)
        module = self.module(user)
        if module is None:
            return None
        if self._norm(user, module) is not None:
            return user, "norm", None
        if layers.is_dropout(module):
            assert isinstance(module, _DropoutNd)
            single = not layers.is_channel_dropout(module) and module.training and module.p > 0
            alone = single or layers.hooked(module)
            return None if alone and not self.whole else (user, "drop", None)
        found = self._activation_module(user, module)
        return None if found is None else (user, "act", found)

    def activation_at(self, user: fx.Node, node: fx.Node) -> tuple[Activation, Member] | None:
        """The activation that ``user`` is of ``node``, and as a layer; None if it is something else."""
        if user.op in ("call_function", "call_method"):
            found = self._activation_function(user, node)
        else:
            module = self.module(user)
            found = None if module is None else self._activation_module(user, module)
        return None if found is None else (found, _member(user, "act"))

    def _activation_module(self, user: fx.Node, module: nn.Module) -> Activation | None:
        found = families.activation_of(module, self.whole)
        if found is not None and found.name == "prelu":
            return Activation("prelu", path=_path(user))
        return found

    @staticmethod
    def _activation_function(user: fx.Node, node: fx.Node) -> Activation | None:
        table: Mapping[Any, Any] = (
            layers.ACTIVATION_FUNCTIONS if user.op == "call_function" else layers.ACTIVATION_METHODS
        )
        read = table.get(user.target)
        options = dict(user.kwargs)
        args = list(user.args)
        if read is None or (not args and "input" not in options):
            return None
        first = args.pop(0) if args else options.pop("input")
        numbers = [*args, *options.values()]
        if first is not node or not all(isinstance(v, (bool, int, float, str)) for v in numbers):
            return None
        found: Activation = read(first, *args, **options)
        return found

    def _norm_fits(self, first: fx.Node, node: fx.Node) -> bool:
        """Whether a norm has the channels and dimensions of the convolution before it."""
        conv, norm = self.module(first), self.module(node)
        if conv is None or norm is None:
            return False
        channels = getattr(norm, "num_features", getattr(norm, "num_channels", None))
        dims = layers.norm_dims(norm)
        # an instance norm without parameters does not look at its number of channels
        loose = isinstance(norm, _InstanceNorm) and not (norm.affine or norm.track_running_stats)
        same = loose or channels == getattr(conv, "out_channels", None)
        return same and dims in (None, layers.convolution_dims(conv))

    def _group(self, nodes: list[fx.Node], roles: list[str], activation: Activation) -> Group:
        members, kinds, drops = [], {}, []
        conv: Path | None = None
        norm: Path | None = None
        act_at = roles.index("act") if "act" in roles else len(roles)
        norm_at = roles.index("norm") if "norm" in roles else len(roles)
        first = "conv" in roles and act_at < norm_at < len(roles)
        for i, (node, role) in enumerate(zip(nodes, roles, strict=True)):
            members.append(_member(node, role))
            if node.op != "call_module":
                continue
            path, module = _path(node), self.owner.get_submodule(str(node.target))
            kinds[path] = type(module)
            if role == "conv":
                conv = path
                if "base" not in node.meta and not layers.is_plain(module):
                    # no module is of this very class: the layer always runs by itself
                    kinds[path] = nn.Module
            elif role == "norm":
                norm = path
            elif role == "drop":
                last = max(norm_at, act_at if act_at < len(roles) else norm_at)
                drops.append((path, "norm" if i < norm_at else "end" if i > last else "film"))
        return Group(tuple(members), kinds, conv, norm, activation, first, tuple(drops))


def _member(node: fx.Node, role: str) -> Member:
    if node.op == "call_module":
        return Member(role, _path(node), base=node.meta.get("base"))
    options = tuple((k, v) for k, v in node.kwargs.items() if k != "input")
    return Member(role, None, _function(node), tuple(node.args[1:]), options)


def _path(node: fx.Node) -> Path:
    return tuple(str(node.target).split("."))


def _function(node: fx.Node) -> Any:
    if node.op == "call_function":
        return node.target
    return getattr(torch.Tensor, str(node.target))
