"""Groups: consecutive calls of a graph that one block computes, found by their order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastfilm.ops import spec
from fastfilm.ops.vendor import convolutions as vendor

from . import functions
from .effects import Effects, same, shape, value
from .functions import Activation, bind

_NORM_FIRST, _FILM_LAST, _ACT_FIRST = spec.ORDERS
_SLOTS = {
    # letters: n norm, a activation, f FiLM; the digits are the places of a channel dropout
    _NORM_FIRST: "0n1fa2",
    _FILM_LAST: "0na1f2",
    _ACT_FIRST: "a0n1f2",
}
_PLACES = ("norm", "film", "end")
_WIDTHS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}


def fit(letters: str, homogeneous: bool) -> tuple[str, str] | None:
    """The order and the place of the dropout (letter d) that compute steps one after another; None for no such.

    Args:
        homogeneous: the activation passes a factor ≥ 0 through, so that it changes places with a dropout.
    """
    found = _fit(letters)
    if found is None and homogeneous:
        found = _fit(letters.replace("da", "ad")) or _fit(letters.replace("ad", "da"))
    return found


def _fit(letters: str) -> tuple[str, str] | None:
    for order, slots in _SLOTS.items():
        at, place, ok = -1, "end", True
        for letter in letters:
            if letter == "d":
                # without a norm there is no place in front of it
                digits = "12" if "n" not in letters else "012"
                places = [i for i in range(at + 1, len(slots)) if slots[i] in digits]
                place = _PLACES[int(slots[places[0]])] if places else place
                next_at = places[0] if places else -1
            else:
                next_at = slots.find(letter, at + 1)
            if next_at < 0:
                ok = False
                break
            at = next_at
        if ok:
            return order, place
    return None


@dataclass
class Group:
    """Calls that run as one block.

    Attributes:
        x: input of the first of them.
        dims: spatial dimensions. channels: C of the output.
        dtype: of the raw map.
        conv: the convolution, with its arguments by name, None for a group of an existing map.
        members: all of its nodes in their order.
        letters: its steps, see ``fit``.
        norm: name and arguments. gamma, beta: nodes. drop: its node and p.
    """

    x: fx.Node
    dims: int
    channels: int
    dtype: torch.dtype
    conv: dict[str, Any] | None = None
    transposed: bool = False
    members: tuple[fx.Node, ...] = ()
    letters: str = ""
    norm: tuple[str, dict[str, Any]] | None = None
    activation: Activation = functions.NONE
    gamma: fx.Node | None = None
    beta: fx.Node | None = None
    drop: tuple[fx.Node, float] | None = None

    @property
    def last(self) -> fx.Node:
        """The last of its nodes: the result of the block takes its place."""
        return self.members[-1]

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of its steps, for the report."""
        names = {"n": "norm", "a": "act", "f": "film", "d": "dropout"}
        conv = () if self.conv is None else ("conv",)
        return (*conv, *(names[letter] for letter in self.letters))

    def inputs(self) -> list[fx.Node]:
        """Nodes of all tensors that the block reads."""
        given: list[Any] = [self.x, self.gamma, self.beta, self.activation.slope]
        for arguments in (self.conv, self.norm[1] if self.norm else None):
            given += [] if arguments is None else [v for k, v in arguments.items() if k != "input"]
        return [n for n in given if isinstance(n, fx.Node)]


class Finder:
    """Groups in one graph.

    Attributes:
        left: why a convolution is in no group.
        apart: groups that PyTorch's own layers compute as fast, on contiguous maps.
    """

    def __init__(self, graph: fx.Graph, effects: Effects) -> None:
        self.graph, self.effects = graph, effects
        self.taken: set[fx.Node] = set()
        self.left: dict[fx.Node, str] = {}
        self.apart: list[Group] = []

    def find(self) -> list[Group]:
        """Groups that start with a convolution, then with a norm, then with an activation, each in order."""
        found: list[Group] = []
        for start in (self._convolution, self._norm, self._activation):
            for node in self.graph.nodes:
                if node in self.taken or node.op not in ("call_function", "call_method"):
                    continue
                group = start(node)
                if group is not None:
                    self.taken.update(group.members)
                    found.append(group)
        return found

    def _convolution(self, node: fx.Node) -> Group | None:
        entry = functions.CONVOLUTIONS.get(node.target)
        if entry is None:
            return None
        dims, transposed, form = entry
        given = bind(node, form)
        reason, group = "it is called with unknown arguments", None
        if given is not None:
            reason, group = self._of_convolution(node, given, dims, transposed)
        if group is None:
            self.left[node] = reason
            return None
        self._extend(group)
        if self._gains_nothing(group):
            self.apart.append(group)
            self.taken.update(group.members)
            return None
        return group

    def _of_convolution(
        self, node: fx.Node, given: dict[str, Any], dims: int, transposed: bool
    ) -> tuple[str, Group | None]:
        x, weight = given["input"], given["weight"]
        if len(shape(x)) != dims + 2 or len(shape(weight)) != dims + 2:
            return "its input is not a batch of maps", None
        own, out = value(weight), value(node)
        if not isinstance(out, Tensor) or out.dtype not in _WIDTHS:
            return f"maps of {getattr(out, 'dtype', None)} have no fused form", None
        if out.device.type not in ("cpu", "cuda"):
            return f"there are no kernels on {out.device.type}", None
        if not all(isinstance(n, int) for n in own.shape):
            return "the shape of its weight changes", None
        padding = _padding(given, tuple(own.shape[2:]))
        if padding is None:
            return "padding='same' is not symmetric for its kernel", None
        given["padding"] = padding
        channels = own.shape[1] * given["groups"] if transposed else own.shape[0]
        return "", Group(x, dims, channels, out.dtype, given, transposed, (node,))

    def _norm(self, node: fx.Node) -> Group | None:
        return self._of_map(node) if node.target in functions.NORMS else None

    def _activation(self, node: fx.Node) -> Group | None:
        found = functions.activation_of(node)
        if found is None:
            return None
        # a block pays only where convolutions apply the norm while they load
        users = list(node.users)
        if any(u.target not in functions.CONVOLUTIONS or u.args[0] is not node for u in users):
            return None
        return self._of_map(node)

    def _of_map(self, node: fx.Node) -> Group | None:
        """A group that starts with a norm or an activation of a map that exists."""
        x = node.args[0] if node.args else None
        size, map_ = shape(x), value(x)
        if not isinstance(x, fx.Node) or len(size) not in (4, 5) or not isinstance(size[1], int):
            return None
        if map_.dtype not in _WIDTHS or map_.device.type not in ("cpu", "cuda"):
            return None
        group = Group(x, len(size) - 2, size[1], map_.dtype)
        if self.effects.written_after(x, node) or not self._take(group, x, node):
            return None
        self._extend(group)
        return group if group.members else None

    def _extend(self, group: Group) -> None:
        """Takes in what follows, as long as one block computes it and its value has the raw map's type."""
        kept = vars(group).copy()
        while group.members:
            node = group.last
            if value(node).dtype == group.dtype or self._only_convolved(node):
                kept = vars(group).copy()
            users = list(node.users)
            if len(users) != 1 or users[0] in self.taken or users[0].op == "output":
                break
            if self.effects.region[users[0]] != self.effects.region[group.members[0]]:
                break
            if not self._take(group, node, users[0]):
                break
        vars(group).update(kept)

    def _only_convolved(self, node: fx.Node) -> bool:
        """Whether all that reads a map casts it anyway: convolutions under autocast."""
        readers = all(u.target in functions.CONVOLUTIONS and u.args[0] is node for u in node.users)
        device = value(node).device.type
        return bool(node.users) and readers and torch.is_autocast_enabled(device)

    def _take(self, group: Group, node: fx.Node, user: fx.Node) -> bool:
        """Adds ``user``, which reads ``node``, to a group if it can be its next step."""
        if list(user.all_input_nodes).count(node) != 1 or value(user) is None:
            return False
        before = vars(group).copy()
        letter = self._step(group, node, user)
        if letter is None:
            return False
        group.members += (user,)
        if letter and not (letter == "f" and group.letters.endswith("f")):
            group.letters += letter
        inside = {self.effects.order[m] for m in group.members}
        first = group.members[0]
        if fit(group.letters, group.activation.homogeneous) and self.effects.untouched(
            group.inputs(), first, user, inside
        ):
            return True
        vars(group).update(before)
        return False

    def _step(self, group: Group, node: fx.Node, user: fx.Node) -> str | None:
        """The name of the next step, after its arguments were put into the group; "" if there is none."""
        if functions.idle_dropout(user) is node or self._is_idle_cast(group, node, user):
            return ""
        if user.target in functions.NORMS and "n" not in group.letters:
            return self._take_norm(group, node, user)
        activation = functions.activation_of(user)
        if activation is not None and activation[1] is node and "a" not in group.letters:
            group.activation = activation[0]
            return "a" if fits_slope(group.activation, group.channels) else None
        if user.target in functions.CHANNEL_DROPOUTS and "d" not in group.letters:
            dims, form = functions.CHANNEL_DROPOUTS[user.target]
            given = bind(user, form)
            if given is None or given["input"] is not node or dims != group.dims:
                return None
            if not isinstance(given["p"], (int, float)) or not given["p"] < 1:
                return None
            group.drop = user, given["p"]
            return "d"
        return self._take_film(group, node, user)

    def _take_norm(self, group: Group, node: fx.Node, user: fx.Node) -> str | None:
        name, form = functions.NORMS[user.target]
        given = bind(user, form)
        if given is None or given["input"] is not node:
            return None
        if not isinstance(given["eps"], (int, float)) or given.get("momentum", 0.1) is None:
            return None
        if not isinstance(given.get("training", False), bool):
            return None
        group.norm = name, given
        return "n"

    def _take_film(self, group: Group, node: fx.Node, user: fx.Node) -> str | None:
        if "f" in group.letters and not group.letters.endswith("f"):
            return None
        args = user.args
        if user.target in functions.ADDED_PRODUCTS and len(args) == 3 and not user.kwargs:
            shift, a, b = args
            scale = b if a is node else a
            free = group.gamma is None and group.beta is None and shift is not node
            if not free or not self._is_film(group, scale) or not self._is_film(group, shift):
                return None
            group.gamma, group.beta = scale, shift  # type: ignore[assignment]
            return "f"
        if len(args) != 2 or user.kwargs:
            return None
        other = args[1] if args[0] is node else args[0]
        if not self._is_film(group, other) or group.beta is not None:
            return None
        if user.target in functions.PRODUCTS and group.gamma is None:
            group.gamma = other  # type: ignore[assignment]
        elif user.target in functions.SUMS:
            group.beta = other  # type: ignore[assignment]
        else:
            return None
        return "f"

    def _is_film(self, group: Group, node: Any) -> bool:
        """Whether a node is one number per channel, of each sample or of all."""
        size, found = shape(node), value(node)
        if len(size) not in (group.dims + 1, group.dims + 2) or not found.is_floating_point():
            return False
        *batch, channels = size[: len(size) - group.dims]
        alone = all(same(n, 1) for n in size[len(size) - group.dims :])
        if all(same(n, 1) for n in shape(group.x)[2:]):
            # with maps of one voxel the node may be the sum or the product of two maps
            return False
        fits = not batch or same(batch[0], 1) or same(batch[0], shape(group.x)[0])
        return alone and fits and same(channels, group.channels)

    @staticmethod
    def _is_idle_cast(group: Group, node: fx.Node, user: fx.Node) -> bool:
        """Whether a call gives the map's values in a type that holds them all."""
        if user.target not in functions.CASTS or user.args[:1] != (node,):
            return False
        before, after = value(node), value(user)
        if not isinstance(after, Tensor) or after.device != before.device:
            return False
        width = _WIDTHS.get(after.dtype, 0)
        wider = width > _WIDTHS[group.dtype] and group.dtype != torch.float32
        return after.dtype == group.dtype or wider

    def _gains_nothing(self, group: Group) -> bool:
        """Whether PyTorch's own layers are the faster ones: wide float32 convolutions, batch norm, ReLU on a CPU.

        PyTorch's batch norm and ReLU are as fast as ours on contiguous maps: what would be left of the fusion is
        to copy maps or weights between the layouts.
        """
        assert group.conv is not None
        x = value(group.x)
        if group.norm is None or group.norm[0] != "batch" or group.transposed:
            return False
        if group.letters not in ("n", "na", "an") or x.device.type != "cpu":
            return False
        if group.activation.name != "none" and not group.activation.homogeneous:
            return False
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if not torch.is_grad_enabled():
            # in these cases a block keeps its weight in oneDNN's layout
            return False
        weight = value(group.conv["weight"])
        return weight.shape[1] >= vendor.WIDE and weight.is_contiguous()


def fits_slope(activation: Activation, channels: Any) -> bool:
    """Whether the slope of an activation is none, a number, or one number of each channel or of all."""
    if isinstance(activation.slope, fx.Node):
        size = shape(activation.slope)
        return len(size) == 1 and size[0] in (1, channels)
    return activation.slope is None or isinstance(activation.slope, (int, float))


def _padding(given: dict[str, Any], kernel: Iterable[int]) -> Any:
    """``padding`` in numbers; None if it is not the same on both sides."""
    padding, kernel = given["padding"], tuple(kernel)
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        spread = given["dilation"]
        spread = (spread,) * len(kernel) if isinstance(spread, int) else tuple(spread)
        total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return padding


def operations(node: fx.Node, given: dict[str, Any], transposed: bool) -> int:
    """Multiplications and additions of one call of a convolution."""
    out, x, weight = shape(node), shape(given["input"]), shape(given["weight"])
    places = x if transposed else out
    return 2 * math.prod(map(number, (places[0], *places[2:], *weight)))


def number(size: Any) -> int:
    """A size, or what it was when the graph was made; asking adds no condition to the compiled code."""
    return size if isinstance(size, int) else int(size.node.hint or 0)
