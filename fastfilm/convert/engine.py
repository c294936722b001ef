"""``convert`` and ``restore``: which modules of a model run programs, and what became of its layers."""

from __future__ import annotations

import copy as copying

from torch import nn

from .report import Report
from .state import State, is_converted
from .survey import report_on
from .swap import swap, swappable, unswap
from .trace import CannotTrace


def convert(model: nn.Module, *, copy: bool = False, verbose: bool = True) -> nn.Module:
    """Makes the convolution, norm, activation and dropout groups of an existing model run as fused blocks.

    Parameters and buffers stay the objects that they were, so ``state_dict`` keys and values, optimisers and
    checkpoints are not affected; outputs, gradients and running statistics are the original's up to rounding.
    Groups that something prevents from running as one for the moment (hooks, a dropout of single values in
    training) run layer by layer.

    Args:
        model: any model; layers that are not recognised stay as they are.
        copy: leave ``model`` alone and convert a deep copy.
        verbose: print a summary; ``conversion_report`` has the whole.

    Returns:
        The converted model: ``model`` itself unless ``copy``.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch, fastfilm
        >>> layers = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> model = fastfilm.convert(torch.nn.Sequential(*layers))
        fastfilm: 1 of 1 convolutions fused (1 of 1 with kernel 3)
        >>> model(torch.randn(1, 1, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if copy:
        model = copying.deepcopy(model)
    attach(model, fused=True)
    if verbose:
        print(conversion_report(model).summary())
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``convert``: every module runs its own forward again; returns ``model``.

    Weights that were trained in between keep their values. FiLM that ``condition`` put in stays.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        state: State | None = module.__dict__.get("_fastfilm")
        if state is None:
            continue
        if state.conditioned:
            state.fused = False
        else:
            unswap(module)
    return model


def conversion_report(model: nn.Module) -> Report:
    """What ``convert`` did with every convolution of ``model``."""
    return report_on(model)


def attach(model: nn.Module, fused: bool, conditioned: bool = False) -> None:
    """Gives ``model`` and every module in it that can gain from it its programs.

    Args:
        fused: groups run as one, not layer by layer.
        conditioned: FiLM stands, or will stand, in the groups, which therefore stay whole.
    """
    states: dict[nn.Module, State] = {}
    for module in model.modules():
        if "_fastfilm" in module.__dict__:
            states[module] = module.__dict__["_fastfilm"]
        elif module._modules and swappable(module) is None:
            states[module] = State(type(module))
    gains: set[nn.Module] = set()
    passing: set[nn.Module] = set()
    # children first: a module without groups of its own may still hand maps from child to child
    for module in reversed(list(states)):
        state = states[module]
        state.fused = fused
        state.conditioned = state.conditioned or conditioned
        state.programs.clear()
        state.refused = state.plain = None
        try:
            program = state.build(
                module, state.defaults(), {}, False, lambda m: m in gains or m in passing
            )
        except CannotTrace as reason:
            state.refused = str(reason)
            continue
        if program.passes:
            passing.add(module)
        inside = any(module.get_submodule(c.path) in gains for c in program.children)
        if inside or any(not g.bare for g in program.groups):
            gains.add(module)
    gains |= passing
    for module, state in states.items():
        if (module in gains or module is model) and not is_converted(module):
            swap(module, state)
    if model in states:
        states[model].root = True
    for module in states:
        if module in gains or module is model:
            states[module].prime(module)
