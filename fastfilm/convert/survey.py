"""What became of a converted model's layers: reads the programs, writes the report."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import layers
from .group import Group
from .report import Convolution, Report
from .state import State
from .swap import swappable
from .trace import CannotTrace, is_sequence, trace


def report_on(model: nn.Module) -> Report:
    """The report of a converted model."""
    groups: dict[nn.Module, Group] = {}
    pending: set[nn.Module] = set()
    summed: set[nn.Module] = set()
    report = Report()
    for path, module in model.named_modules():
        state: State | None = module.__dict__.get("_fastfilm")
        if state is None:
            continue
        for program in state.programs.values():
            for group in () if program is None else program.groups:
                layer = module.get_submodule(".".join(group.name))
                if layer not in groups or len(group.members) > len(groups[layer].members):
                    groups[layer] = group
                child = program.pending.get(group)  # type: ignore[union-attr]
                if group in program.summed:  # type: ignore[union-attr]
                    summed.add(layer)
                if child == "" or (child and _gives(module.get_submodule(child))):
                    pending.add(layer)
        if state.refused is not None and _owns_layers(module):
            report.untouched.append((path, state.refused))
    owners = _owners(model)
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd):
            report.convolutions.append(_convolution(path, module, groups, pending, summed, owners))
        elif module in groups:
            roles = " + ".join(m.role for m in groups[module].members)
            report.norms.append((path, f"{roles} in one pass"))
    return report


def _convolution(
    path: str,
    conv: _ConvNd,
    groups: dict[nn.Module, Group],
    pending: set[nn.Module],
    summed: set[nn.Module],
    owners: dict[nn.Module, nn.Module],
) -> Convolution:
    group = groups.get(conv)
    roles = () if group is None else tuple(m.role for m in group.members)
    if conv in pending:
        roles = ("pending", *roles)
    if conv in summed:
        roles = (*roles, "add")
    if len(roles) > 1:
        return Convolution(path, tuple(conv.kernel_size), roles)
    if layers.convolution_dims(conv) is None:
        reason = f"{type(conv).__name__} has no fused form"
    elif (unfit := layers.unfit_convolution(conv)) is not None:
        reason = unfit
    elif group is not None:
        reason = "nothing to fuse beside it"
    else:
        owner = owners.get(conv)
        reason = "nothing to fuse beside it" if owner is None else _refusal(owner)
    return Convolution(path, tuple(conv.kernel_size), (), reason)


def _refusal(owner: nn.Module) -> str:
    """Why the layers of a module run one by one."""
    state: State | None = owner.__dict__.get("_fastfilm")
    if state is not None:
        return state.refused or "nothing to fuse beside it"
    fixed = swappable(owner)
    if fixed is not None:
        return fixed
    try:
        trace(owner, State(type(owner)).defaults())
    except CannotTrace as reason:
        return str(reason)
    return "nothing to fuse beside it"


def _owners(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For every module the nearest one above it that is more than a sequence."""
    found: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, owner: nn.Module) -> None:
        for child in module.children():
            found.setdefault(child, owner)
            visit(child, owner if is_sequence(child) else child)

    visit(model, model)
    return found


def _gives(child: nn.Module) -> bool:
    state: State | None = child.__dict__.get("_fastfilm")
    return state is not None and any(p is not None and p.gives for p in state.programs.values())


def _owns_layers(module: nn.Module) -> bool:
    """Whether a module calls convolutions or norms itself."""
    for child in module.children():
        if isinstance(child, _ConvNd) or layers.is_norm(child):
            return True
        if is_sequence(child) and "_fastfilm" not in child.__dict__ and _owns_layers(child):
            return True
    return False
