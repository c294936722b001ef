"""Sites for FiLM in a model: behind each norm, or each convolution without one, in the order of registration."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from . import decoders

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
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "timm.layers.activations")
_ACTIVATION_NAMES = ("Swish", "MemoryEfficientSwish", "Mish", "SwishMe", "GELU", "GEGLU")


@dataclass(frozen=True)
class Site:
    """A place that FiLM can act at.

    Attributes:
        name: path of the convolution that the norm follows; of the norm where that cannot be told.
        channels: C of the map there.
        layer: the module of that name.
        path: of the module that FiLM follows (see ``before``): the norm, or the convolution without one.
        before: FiLM acts on what the module at ``path`` is given, not on what it gives.
    """

    name: str
    channels: int
    layer: nn.Module
    path: str
    before: bool = False

    @property
    def main(self) -> bool:
        """Not a 1×1 convolution, which in most networks is a shortcut or a gate."""
        kernel = getattr(self.layer, "kernel_size", None)
        return kernel is None or max(kernel) > 1


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of images or volumes."""
    return isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of maps: batch, instance or group."""
    return isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm))


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation."""
    kind = type(module)
    if kind.__name__.startswith(("Softm", "LogSoftmax", "Multihead")):
        return False
    return kind.__module__ in _ACTIVATION_MODULES or kind.__name__ in _ACTIVATION_NAMES


def is_idle(module: nn.Module) -> bool:
    """Whether a module may stand between a norm and its activation."""
    return isinstance(module, (_DropoutNd, nn.Identity))


def find(model: nn.Module) -> dict[str, Site]:
    """All sites of a model by name, in the model's order."""
    modules = dict(model.named_modules())
    found: dict[str, Site] = {}
    paired: set[str] = set()
    for path, module in modules.items():
        if is_norm(module) and not _stands_elsewhere(modules, path):
            conv = _convolution_of(modules, path, paired)
            name = path if conv is None else conv
            paired.add(name)
            at, before = _inside(path, module)
            found[name] = Site(name, _channels(module), modules[name], at, before)
    for path, module in modules.items():
        if is_convolution(module) and path not in paired and _acts_next(modules, path):
            found[path] = Site(path, _channels(module), module, path)
    order = list(modules)
    return {n: found[n] for n in sorted(found, key=order.index)}


def _inside(path: str, norm: nn.Module) -> tuple[str, bool]:
    """The place of FiLM at a norm: behind it, or in front of the activation inside one of timm's norms."""
    act = norm._modules.get("act")
    own = act is not None and not isinstance(act, nn.Identity)
    return (f"{path}.act", True) if own else (path, False)


def _convolution_of(modules: dict[str, nn.Module], path: str, taken: set[str]) -> str | None:
    """Path of the convolution that a norm follows, by names, order and channels; None: not to be told."""
    parent, _, name = path.rpartition(".")
    norm = modules[path]
    while True:
        children = modules[parent]._modules
        names = [n for n in children if children[n] is not None]
        convs = {n: _last_convolution(modules, _join(parent, n)) for n in names}
        if any(convs.values()):
            break
        if not parent:
            return None
        # a box of norm, dropout and activation: the convolution stands beside the box
        parent, _, name = parent.rpartition(".")
    number = re.search(r"\d+$", name)
    numbered = [] if number is None else [n for n in names if _numbered(n, number[0])]
    before = names[: names.index(name)]
    own = next((n for n in numbered if convs[n]), None)
    if own is not None and own not in before:
        # norm, activation, convolution: the norm reads the output of the convolution before
        assert number is not None
        candidates = [n for n in names if convs[n] and _numbered(n, str(int(number[0]) - 1))]
    elif own is not None:
        candidates = [own]
    else:
        # the nearest before it
        candidates = [n for n in reversed(before) if convs[n]][:1]
    for n in candidates:
        found = convs[n]
        if (
            found is not None
            and found not in taken
            and _channels(modules[found]) == _channels(norm)
        ):
            return found
    return None


def _stands_elsewhere(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether a norm belongs to other layers than convolutions, such as an attention's."""
    inside = list(modules[path.rpartition(".")[0]].modules())
    others = [m for m in inside if not m._modules and m is not modules[path]]
    box = all(is_norm(m) or is_idle(m) or is_activation(m) for m in others)
    return bool(path.rpartition(".")[0]) and not box and not any(map(is_convolution, inside))


def _numbered(name: str, number: str) -> bool:
    """Whether a name is that of a convolution with this number, such as conv1."""
    return re.fullmatch(rf"_?conv\w*?_?{number}", name, re.I) is not None


def _last_convolution(modules: dict[str, nn.Module], path: str) -> str | None:
    """Path of the last convolution in a module; None where there is none."""
    inside = modules[path].named_modules() if path in modules else ()
    found = [_join(path, name) for name, m in inside if is_convolution(m)]
    return next((p for p in reversed(found) if p in modules), None)


def _acts_next(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether an activation module follows a convolution in its parent."""
    parent, _, name = path.rpartition(".")
    siblings = list(modules[parent]._modules.items())
    behind = [m for n, m in siblings[[n for n, _ in siblings].index(name) + 1 :] if m is not None]
    following = next((m for m in behind if not is_idle(m)), None)
    if following is None:
        return False
    # a box of dropout and activation counts as one
    inner = [m for m in following.modules() if not m._modules and not is_idle(m)]
    return bool(inner) and is_activation(inner[0])


def activation_behind(model: nn.Module, site: Site) -> str:
    """Path of the module that FiLM follows when it stands behind the activation of a site.

    Raises:
        ValueError: it cannot be told which one that is, or the model calls it at other places too.
    """
    everything = list(model.named_modules(remove_duplicate=False))
    modules = dict(everything)
    if site.before:
        # the norm holds the activation
        return site.path.rpartition(".")[0]
    layer = modules[site.path]
    boxes: Counter[tuple[int, str]] = Counter()
    paths: dict[tuple[int, str], str] = {}
    for path, module in everything:
        if path and module is layer:
            parent, _, name = path.rpartition(".")
            if isinstance(modules[parent], nn.Sequential):
                boxes[id(modules[parent]), name] += 1
                paths[id(modules[parent]), name] = parent
    for (_, name), parent in paths.items():
        children = list(modules[parent]._modules.items())
        at = [n for n, _ in children].index(name)
        behind = next(
            ((n, m) for n, m in children[at + 1 :] if m is not None and not is_idle(m)), None
        )
        if behind is None or not is_activation(behind[1]):
            return site.path
        places = {
            (id(modules[p.rpartition(".")[0]]), p.rpartition(".")[2])
            for p, m in everything
            if m is behind[1] and isinstance(modules[p.rpartition(".")[0]], nn.Sequential)
        }
        if len(places) == 1:
            return _join(parent, behind[0])
    raise ValueError(
        f"the activation behind {site.path!r} is no module of its own in a Sequential:"
        " order='conv-norm-film-act' is possible there"
    )


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
        chosen = _named(model, sites, list(where))
    if not chosen:
        raise ValueError(f"where={where!r} chooses no layer; there are {_listed(sites)}")
    return chosen


def _named(model: nn.Module, sites: dict[str, Site], names: list[str]) -> list[Site]:
    """Sites by their names, by those of their norms, or by names of modules that hold them."""
    modules = dict(model.named_modules())
    every = dict(sites)
    for name in names:
        inside = [s for s in sites.values() if _is_in(s.name, name) or _is_in(s.path, name)]
        layer = modules.get(name)
        if not inside and layer is not None and is_convolution(layer):
            # no registered layer shows whether an activation follows this convolution
            every[name] = Site(name, _channels(layer), layer, name)
        elif not inside:
            raise ValueError(f"where has no layer {name!r}; there are {_listed(sites)}")
    order = list(modules)
    chosen = [
        s for s in every.values() if any(_is_in(s.name, n) or _is_in(s.path, n) for n in names)
    ]
    return sorted(chosen, key=lambda s: order.index(s.name))


def _is_in(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _decoder(model: nn.Module, sites: list[Site], example: Any) -> set[str]:
    """Names of the sites that stand behind the smallest map of the network."""
    if example is not None:
        return _behind_the_smallest(model, sites, example)
    layout = decoders.layout_of(model)
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
        if isinstance(value, int):
            return value
    raise ValueError(f"{type(layer).__name__} does not say how many channels it has")


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name


def _listed(sites: dict[str, Site]) -> str:
    names = list(sites)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
