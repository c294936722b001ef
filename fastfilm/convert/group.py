"""A fused group: layers of an existing model that run as one block, and one by one where they must."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from fastfilm.nn import norms
from fastfilm.ops import DeferredMap, block, spec, vendor
from fastfilm.ops.maps import Joined, Map, plain
from fastfilm.ops.prepared import PreparedWeight
from fastfilm.ops.recipe import Options

from . import film as films
from . import layers
from .layers import Activation

Path = tuple[str, ...]

NORM_FILM_ACT, NORM_ACT_FILM, ACT_NORM_FILM = spec.ORDERS
_IDENTITY = Activation("none")


@dataclass(frozen=True)
class Member:
    """One layer of a group in the original's order: a module, or a function of the map.

    Attributes:
        role: "conv", "norm", "act" or "drop"; "pad" for zeros in front of a convolution.
        path: of the module in the owner; None for a function.
        base: the class whose forward is this part of what the module does.
    """

    role: str
    path: Path | None = None
    function: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    base: Any = None

    def __call__(self, modules: dict[Path, nn.Module], x: Tensor) -> Any:
        if self.base is not None:
            return self.base.forward(modules[self.path], x)  # type: ignore[index]
        if self.path is not None:
            return modules[self.path](x)
        assert self.function is not None
        return self.function(x, *self.arguments, **dict(self.options))


@dataclass(frozen=True)
class Group:
    """Layers that run as one, by their paths in the module that owns them.

    Attributes:
        members: in the order of the original's forward.
        conv, norm: paths; None where the group has none.
        kinds: class of each module at its path when the group was found.
        activation: of the group; "none" if it has none.
        activation_first: it stands between convolution and norm.
        drops: (path, its place in the sequence: "norm", "film" or "end").
    """

    members: tuple[Member, ...]
    kinds: dict[Path, type[nn.Module]] = field(hash=False)
    conv: Path | None
    norm: Path | None
    activation: Activation = _IDENTITY
    activation_first: bool = False
    drops: tuple[tuple[Path, str], ...] = ()

    # fx asks for the name of what a graph calls
    __name__ = "group"

    @property
    def name(self) -> Path:
        """Path of the layer that the group is known by."""
        found = self.norm if self.conv is None else self.conv
        assert found is not None
        return found

    @property
    def bare(self) -> bool:
        """A convolution alone: it gains where its input is pending."""
        return len(self.members) == 1 and self.conv is not None

    @property
    def takes_maps(self) -> bool:
        """Whether its input may have something pending."""
        return self.conv is not None and self.members[0].role != "pad"

    def __call__(self, owner: nn.Module, x: Map, deferred: bool = False) -> Tensor | DeferredMap:
        """The group's output for ``x`` [N, C, *S]; a map for the next layer if ``deferred``."""
        state = owner.__dict__["_fastfilm"]
        modules, seen = watched(owner, self.kinds, self.activation)
        order, gamma, beta = NORM_FILM_ACT, None, None
        film = None
        if state.sites:
            film = state.sites.get(self.name)
            if film is not None:
                gamma, beta = films.now(film.site, x.shape[0])
                order = film.order
        dims = len(modules[self.conv].weight.shape) if self.conv is not None else len(x.shape)
        maps = isinstance(x, (Tensor, DeferredMap, Joined)) and len(x.shape) == dims
        if seen or not state.fused or not maps or dims not in (4, 5) or _foreign(x):
            return self._one_by_one(modules, plain(x), order, gamma, beta)
        if self.bare and isinstance(x, Tensor) and gamma is None:
            found: Tensor = modules[self.name](x)
            return found
        if gamma is None and self._gains_nothing(modules, x):
            return self._one_by_one(modules, plain(x).contiguous(), order, None, None)
        if self.activation_first:
            order = ACT_NORM_FILM
        mask, position = None, "end"
        active = [
            (modules[path], place)
            for path, place in self.drops
            if modules[path].training and modules[path].p > 0
        ]
        if active:
            drop, position = active[0]
            if len(active) > 1 or not self._can_mask(drop, position, order, gamma is not None):
                return self._one_by_one(modules, plain(x), order, gamma, beta)
            mask = (drop.p, position)
        return self._fused(owner, modules, x, order, gamma, beta, mask, deferred)

    def _fused(
        self,
        owner: nn.Module,
        modules: dict[Path, Any],
        x: Map,
        order: str,
        gamma: Tensor | None,
        beta: Tensor | None,
        drop: tuple[float, str] | None,
        deferred: bool,
    ) -> Tensor | DeferredMap:
        norm = None if self.norm is None else modules[self.norm]
        read = norms.NONE
        if norm is not None:
            read = norms.read(norm, _norm_kind(norm, self.kinds[self.norm]))  # type: ignore[index]
        activation, slope = self.activation, self.activation.slope
        learned = None if activation.path is None else modules[activation.path].weight
        conv = None if self.conv is None else modules[self.conv]
        if self.members[0].role == "pad":
            x = self.members[0](modules, plain(x))
        mask, position = None, "end"
        if drop is not None:
            # drawn as PyTorch draws it, so that a seed gives the same masks
            keep, position = 1 - drop[0], drop[1]
            channels = modules[self.name].weight if conv is None else conv
            count = channels.shape[0] if isinstance(channels, Tensor) else channels.out_channels
            noise = torch.empty((x.shape[0], count), dtype=x.dtype, device=x.device)
            noise = noise.bernoulli_(keep).div_(keep)
            mask = noise if noise.dtype == torch.float64 else noise.float()
        options = Options(
            read.kind,
            read.num_groups,
            read.training,
            read.eps,
            activation.name,
            slope,
            order,
            position,
            read.group is not None,
        )
        tensors = (*read.tensors, gamma, beta, mask, learned)
        if conv is None:
            return block.run_on_map(plain(x), options, tensors, read.momentum, deferred)
        padding = conv.padding if isinstance(conv.padding, tuple) else layers.padding_of(conv)
        geometry = (
            conv.stride,
            padding,
            conv.dilation,
            conv.transposed,
            conv.output_padding,
            conv.groups,
        )
        prepared = None
        if not torch.compiler.is_compiling():
            # a compiled graph keeps nothing, and must not depend on what is kept
            kept: dict[Path, PreparedWeight] = owner.__dict__["_fastfilm"].prepared
            prepared = kept.setdefault(self.name, PreparedWeight())
        return block.run(
            x,
            conv.weight,
            conv.bias,
            geometry,
            options,
            tensors,
            read.momentum,
            deferred,
            prepared,
            read.group,
        )

    def _gains_nothing(self, modules: dict[Path, Any], x: Map) -> bool:
        """Whether PyTorch's own layers are the faster ones: wide float32 convolutions, batch norm, ReLU on a CPU.

        They are convolved contiguously (``vendor.long_sums``), and PyTorch's batch norm and ReLU are as fast as
        ours there: what would be left of the fusion is two copies between the layouts.
        """
        if self.conv is None or self.norm is None or not self.activation.homogeneous:
            return False
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        conv, norm = modules[self.conv], modules[self.norm]
        if (
            conv.transposed
            or not isinstance(norm, _BatchNorm)
            or isinstance(norm, nn.SyncBatchNorm)
        ):
            return False
        return vendor.long_sums(x, conv.weight)  # type: ignore[arg-type]

    def _can_mask(self, drop: Any, position: str, order: str, film: bool) -> bool:
        """Whether a dropout in training can be part of the group's coefficients."""
        if not layers.is_channel_dropout(drop) or drop.p >= 1 or self.norm is None:
            return False
        if position == "norm" and self.activation_first:
            return self.activation.homogeneous
        if position == "film" and order == NORM_ACT_FILM:
            return self.activation.homogeneous
        return True

    def _one_by_one(
        self,
        modules: dict[Path, nn.Module],
        x: Any,
        order: str,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> Any:
        """The original's layers in their order, FiLM at its place."""
        last = self._film_behind(order)
        whole = self._whole(modules)
        for i, member in enumerate(self.members):
            if member.path in whole:
                x = modules[member.path](x)
            elif member.path is None or member.path[:-1] not in whole:
                x = member(modules, x)
            if gamma is not None and i == last:
                x = modulated(x, gamma, beta)
        return x

    def _whole(self, modules: dict[Path, nn.Module]) -> set[Path]:
        """Modules of several members that somebody watches: their own forward runs."""
        return {
            m.path
            for m in self.members
            if m.base is not None
            and m.path is not None
            and (layers.hooked(modules[m.path]) or type(modules[m.path]) is not self.kinds[m.path])
        }

    def _film_behind(self, order: str) -> int:
        """Index of the member that FiLM follows."""
        roles = [m.role for m in self.members]
        if self.activation_first or (order == NORM_FILM_ACT and "norm" in roles):
            return roles.index("norm")
        if order == NORM_ACT_FILM and "act" in roles:
            return roles.index("act")
        return roles.index("norm" if "norm" in roles else "conv")


def watched(
    owner: nn.Module, kinds: Mapping[Path, type[nn.Module]], activation: Activation
) -> tuple[dict[Path, Any], bool]:
    """Modules by their paths in ``owner``, and whether they are to run by themselves.

    They are where somebody watches one of them, and where one was replaced or set to compute something else.

    Args:
        kinds: their classes when the program was made.
        activation: that of the one which is an activation, then.
    """
    found: dict[Path, Any] = {}
    seen = bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
    for path, kind in kinds.items():
        m: Any = owner
        for name in path:
            m = m._modules[name]
            if layers.hooked(m):
                seen = True
        if type(m) is not kind and not (kind in layers.NORMS and type(m) in layers.NORMS):
            seen = True
        if layers.differs(m, activation):
            seen = True
        found[path] = m
    return found, seen


def _foreign(x: Map) -> bool:
    """Whether nothing of ours may run: another kind of device, or PyTorch's old tracer."""
    return x.device.type not in ("cpu", "cuda") or torch.jit.is_tracing()


def modulated(x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """γ·x + β in plain PyTorch, in x's dtype; bit for bit x for γ = 1, β = 0."""
    shape = (*gamma.shape, *(1,) * (x.dim() - 2))
    x = x * gamma.to(x.dtype).view(shape)
    return x if beta is None else x + beta.to(x.dtype).view(shape)


def _norm_kind(norm: nn.Module, seen: type[nn.Module]) -> str:
    """A norm's name; of what it was when the group was found if it is of a class of its own."""
    found = layers.NORMS.get(type(norm))
    if found is None:
        found = next(name for kind, name in layers.NORMS.items() if issubclass(seen, kind))
    return found
