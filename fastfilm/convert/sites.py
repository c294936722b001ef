"""Where FiLM can stand in a model: one site a group, and how a user chooses among them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .group import Group
from .state import State

WORDS = ("decoder", "encoder", "all")
_DECODER = re.compile(
    r"(^|[._])(decoders?|dec\d*|ups?\d*|up_\w+|up(sample|cat|conv|block|_path|_tr)\w*)([._]|$)",
    re.I,
)
_ENCODER = re.compile(
    r"(^|[._])(encoders?|enc\d*|downs?\d*|down_\w+|down(sample|conv|block|_path)\w*|stem|inc|conv_0"
    r"|input_block|bottleneck|bottom|center|layer\d)([._]|$)",
    re.I,
)


@dataclass(frozen=True)
class Site:
    """A group that FiLM can act in.

    Attributes:
        name: path of its convolution (or of its norm, where no convolution stands before it).
        channels: C of its output.
        layer: the module of that name.
        group: as one of the programs has it.
    """

    name: str
    channels: int
    layer: nn.Module
    group: Group

    @property
    def main(self) -> bool:
        """Not a 1×1 convolution, which in most networks is a shortcut or a gate."""
        kernel = getattr(self.layer, "kernel_size", None)
        return kernel is None or max(kernel) > 1


def find(model: nn.Module) -> dict[str, Site]:
    """All sites of a model by name, in the model's order."""
    groups: dict[nn.Module, Group] = {}
    for module in model.modules():
        state: State | None = module.__dict__.get("_fastfilm")
        for group in () if state is None else state.groups():
            layer = module.get_submodule(".".join(group.name))
            if not group.bare:
                groups.setdefault(layer, group)
    found = {}
    for name, layer in model.named_modules():
        if layer in groups:
            found[name] = Site(name, _channels(layer), layer, groups[layer])
    return found


def choose(
    model: nn.Module,
    sites: dict[str, Site],
    where: str | Iterable[str] | Callable[[str, nn.Module], bool],
    example: Any,
) -> list[Site]:
    """The sites that ``where`` means; see ``fastfilm.condition``.

    Raises:
        ValueError: no site, an unknown name, or a decoder that cannot be told.
    """
    if isinstance(where, str) and where not in WORDS:
        where = [where]
    if isinstance(where, str):
        chosen = [s for s in sites.values() if s.main] or list(sites.values())
        if where != "all":
            late = _decoder(model, chosen, example)
            chosen = [s for s in chosen if (s.name in late) == (where == "decoder")]
    elif callable(where):
        chosen = [s for s in sites.values() if where(s.name, s.layer)]
    else:
        chosen = _named(sites, list(where))
    if not chosen:
        raise ValueError(f"where={where!r} chooses no layer; there are {_listed(sites)}")
    return chosen


def _named(sites: dict[str, Site], names: list[str]) -> list[Site]:
    """Sites by their names, or by names of modules that hold them."""
    for name in names:
        if not any(s == name or s.startswith(f"{name}.") for s in sites):
            raise ValueError(f"where has no layer {name!r}; there are {_listed(sites)}")
    return [
        site
        for site in sites.values()
        if any(site.name == n or site.name.startswith(f"{n}.") for n in names)
    ]


def _decoder(model: nn.Module, sites: list[Site], example: Any) -> set[str]:
    """Names of the sites that stand behind the smallest map of the network."""
    if example is not None:
        return _behind_the_smallest(model, sites, example)
    layout = families.layout_of(model)
    if layout is not None:
        sides = {s.name: layout.is_decoder(s.name) for s in sites}
        if None not in sides.values() and True in sides.values():
            return {name for name, late in sides.items() if late}
    late = {s.name for s in sites if _DECODER.search(s.name)}
    unknown = [s.name for s in sites if s.name not in late and not _ENCODER.search(s.name)]
    if not late or len(unknown) == len(sites) - len(late) > 0:
        raise ValueError(
            "where='decoder' and 'encoder' cannot be told from this model's names; pass example_input,"
            f" or names of layers, or where='all'; there are {_listed({s.name: s for s in sites})}"
        )
    return late


def _behind_the_smallest(model: nn.Module, sites: list[Site], example: Any) -> set[str]:
    order: list[tuple[str, int]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            order.append((name, math.prod(output.shape[2:])))

        return hook

    handles = [s.layer.register_forward_hook(watch(s.name)) for s in sites]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    smallest = min(voxels for _, voxels in order)
    last = max(i for i, (_, voxels) in enumerate(order) if voxels == smallest)
    return {name for name, _ in order[last + 1 :]}


def _channels(layer: nn.Module) -> int:
    for name in ("out_channels", "num_features", "num_channels"):
        value = getattr(layer, name, None)
        if isinstance(value, int) and not isinstance(value, Tensor):
            return value
    raise ValueError(f"{type(layer).__name__} does not say how many channels it has")


def _listed(sites: dict[str, Site]) -> str:
    names = list(sites)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
