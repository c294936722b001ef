"""The forward of one module as a graph of calls, or the reason why it cannot be one.

Only the module's own forward is followed: its children are single calls, ``Sequential`` ones are followed
through. What a trace cannot carry over (context managers, drawn numbers, attributes that the forward sets) is
refused rather than lost.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import families, layers
from .film import Conditioner

_lock = threading.RLock()


class CannotTrace(Exception):
    """Why a forward cannot be followed."""


class Owned:
    """Calls a method or a function kept in an attribute of the module whose forward runs."""

    __name__ = "owned"

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)


def original(module: nn.Module) -> type[nn.Module]:
    """A module's class before it was converted."""
    state = module.__dict__.get("_fastfilm")
    return type(module) if state is None else state.original


def is_sequence(module: nn.Module) -> bool:
    """Whether a module's forward is nothing but its children's one after another."""
    return original(module).forward is nn.Sequential.forward


def _surroundings() -> tuple[Any, ...]:
    """What a ``with`` statement in a forward could change."""
    modes = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *modes,
        id(_get_current_dispatch_mode()),
        hooks is None,
        torch.is_anomaly_enabled(),
    )


@contextlib.contextmanager
def _proxies_are_tensors() -> Iterator[None]:
    """A forward that asks whether its input is a tensor is told so; ``fx`` itself is told the truth.

    Without it a branch such as ``if isinstance(skip, torch.Tensor)`` would silently go the wrong way.
    """
    asked = builtins.isinstance

    def answer(value: Any, kinds: Any) -> bool:
        if asked(value, kinds):
            return True
        if type(value) is not fx.Proxy:
            return False
        caller = sys._getframe(1).f_globals.get("__name__", "")
        wanted = kinds if type(kinds) is tuple else (kinds,)
        outside = caller.partition(".")[0] not in ("torch", "fastfilm")
        return Tensor in wanted and (outside or caller in ("torch", "torch._jit_internal"))

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = asked


class _Tracer(fx.Tracer):
    """Follows a forward and its ``Sequential`` children, and refuses what it would lose."""

    def __init__(
        self, lists: dict[str, tuple[type, int]], functions: tuple[Callable[..., Any], ...]
    ) -> None:
        super().__init__(autowrap_functions=functions)
        self.traced_func_name = "_fastfilm_original_forward"
        self.expected, self.lists = _surroundings(), lists
        # fx watches every module's calls and attributes; those of other threads are none of our business
        self.thread = threading.get_ident()

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            name = arg.node.target if type(arg) is fx.Proxy else None
            if name in self.lists:
                kind, length = self.lists[name]
                args[i] = kind(arg[k] for k in range(length))
        return function, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_sequence(m) or layers.hooked(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if is_sequence(m) and not layers.hooked(m) and not kwargs and len(args) == 1:
            found = args[0]
            for child in m._modules.values():
                if not isinstance(child, Conditioner):
                    found = child(found)  # type: ignore[misc]
            return found
        found = parts(m) if len(args) == 1 and not kwargs else None
        if found is None:
            return super().call_module(m, forward, args, kwargs)
        path, x = self.path_of_module(m), args[0]
        for name, base in found:
            if base is None:
                x = m.get_submodule(name)(x)
            else:
                x = self.create_proxy("call_module", path, (x,), {})
                x.node.meta["base"] = base
        return x

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self.expected:
            raise CannotTrace("its forward changes autograd or autocast on the way")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        known = isinstance(a, nn.Parameter) or (
            isinstance(a, Tensor) and any(a is b for b in self.root.buffers())
        )
        if isinstance(a, Tensor) and not known:
            raise CannotTrace("its forward makes tensors of its own")
        return super().create_arg(a)


def trace(
    module: nn.Module, arguments: dict[str, Any], lists: dict[str, tuple[type, int]] | None = None
) -> fx.Graph:
    """The graph of ``module``'s original forward.

    Args:
        arguments: constants among the forward's arguments by name.
        lists: kind and length of the arguments that are lists or tuples of tensors; the others are tensors.

    Raises:
        CannotTrace: with the reason.
    """
    with _lock:
        return _trace(module, arguments, lists or {})


_TENSORS = ("torch", "fastfilm", "monai", "timm", "segmentation_models_pytorch", "ivadomed")
"""Packages with layers and networks of tensors of any class."""

_ASKING = {"isinstance", "type", "hasattr", "getattr"}


def sees_values_alone(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a module's own forward reads nothing of its tensors that a plain one has not.

    Args:
        arguments: constants among the forward's arguments by name.
    """
    kind = original(module)
    if kind.__module__.partition(".")[0] in _TENSORS:
        return True
    code = getattr(kind.forward, "__code__", None)
    if code is None or _ASKING & set(code.co_names):
        return False
    try:
        graph = trace(module, arguments)
    except CannotTrace:
        return False
    return all(_plain_node(node) for node in graph.nodes)


def _plain_node(node: fx.Node) -> bool:
    if node.op == "call_method":
        return hasattr(Tensor, str(node.target))
    if node.op != "call_function":
        return True
    if node.target is getattr:
        return hasattr(Tensor, node.args[1])  # type: ignore[arg-type]
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return package in ("torch", "_operator", "operator", "builtins", "math")


def _trace(
    module: nn.Module, arguments: dict[str, Any], lists: dict[str, tuple[type, int]]
) -> fx.Graph:
    kind = original(module)
    signature = inspect.signature(kind.forward)
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature.parameters.values()):
        raise CannotTrace("its forward takes any arguments")
    if is_sequence(module):
        return _sequence(module)
    own = {name: getattr(module, name) for name in _owned(module)}
    fixed = {name: module.__dict__.get(name) for name in own}
    for name, function in own.items():
        module.__dict__[name] = _stand_in(name, function)
    before = dict(module.__dict__)
    children = dict(module._modules)
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()
    holder = type(module)
    added = "_fastfilm_original_forward" not in holder.__dict__
    if added:
        holder._fastfilm_original_forward = kind.forward  # type: ignore[attr-defined]
    try:
        with _proxies_are_tensors():
            functions = families.functions() if module.training else ()
            graph = _Tracer(lists, functions).trace(module, concrete_args=arguments)
    except CannotTrace:
        raise
    except Exception as error:  # whatever a forward does with something that is not a tensor
        text = (str(error).strip().splitlines() or [""])[0]
        raise CannotTrace(
            f"its forward cannot be followed: {type(error).__name__}: {text}"
        ) from None
    finally:
        if added:
            del holder._fastfilm_original_forward  # type: ignore[attr-defined]
        changed = any(before.get(k, before) is not v for k, v in module.__dict__.items())
        changed = changed or module._modules != children
        if changed:
            module.__dict__.clear()
            module.__dict__.update(before)
        for name, value in fixed.items():
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
        draws = _put_back(*drawn)
    if changed:
        raise CannotTrace("its forward sets attributes")
    if draws:
        raise CannotTrace("its forward draws random numbers")
    _drop_checks(graph)
    _name_arguments(graph, list(signature.parameters.values())[1:])
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view" and not _views_type(node):
            # maps are channels-last behind fused groups, where a view is not always possible
            node.target = "reshape"
    return graph


def parts(m: nn.Module) -> list[tuple[str, type[nn.Module] | None]] | None:
    """What a layer that is several in one does: names of its own layers, and the class whose forward is the rest.

    None for an ordinary layer; an identity does nothing.
    """
    if layers.unfit(m) is not None:
        return None
    if type(m) is nn.Identity:
        return []
    family = families.family_of(type(m))
    name = type(m).__name__
    if family is None:
        return None
    if name in family.norm_acts:
        base = next((k for k in layers.NORMS if isinstance(m, k)), None)
        drop, act = m._modules.get("drop"), m._modules.get("act")
        known = type(act) is nn.Identity or (act is not None and families.activation_of(act))
        if base is not None and type(drop) is nn.Identity and known:
            return [("", base), ("act", None)]
    padding = family.padded.get(name)
    if padding is not None and isinstance(m._modules.get(padding), (nn.ZeroPad2d, nn.Identity)):
        base = next((k for k in layers.CONVOLUTIONS if isinstance(m, k)), None)
        if base is not None and layers.unfit_convolution(m, base) is None:
            return [(padding, None), ("", base)]
    return None


def _owned(module: nn.Module) -> list[str]:
    """Names of methods and attributes of ``module`` that are called as they are."""
    names = {k.__name__ for k in type(module).__mro__}
    found = [
        method
        for f in families.FAMILIES
        for kind, method in f.methods
        if kind in names and f.has(original(module))
    ]
    return found + [
        name
        for name, value in module.__dict__.items()
        if isinstance(value, functools.partial)
        and isinstance(getattr(value.func, "__self__", None), nn.Module)
    ]


def _stand_in(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = next((a for a in (*args, *kwargs.values()) if type(a) is fx.Proxy), None)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", Owned(name), args, kwargs)

    return call


def _put_back(seed: Tensor, python: Any, arrays: Any) -> bool:
    """Sets the states of the random number generators; whether they had moved."""
    moved = not torch.equal(seed, torch.get_rng_state())
    moved = moved or python != random.getstate()
    now: Any = np.random.get_state()
    moved = moved or not np.array_equal(arrays[1], now[1]) or arrays[2:] != now[2:]
    if moved:
        torch.set_rng_state(seed)
        random.setstate(python)
        np.random.set_state(arrays)
    return moved


def _sequence(module: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    node = graph.placeholder("input")

    def run(m: nn.Module, prefix: str, node: fx.Node) -> fx.Node:
        for name, child in m._modules.items():
            assert child is not None
            if isinstance(child, Conditioner):
                continue
            node = call(child, f"{prefix}{name}", node)
        return node

    def call(m: nn.Module, path: str, node: fx.Node) -> fx.Node:
        if is_sequence(m) and not layers.hooked(m):
            return run(m, f"{path}.", node)
        found = parts(m)
        if found is None:
            return graph.create_node("call_module", path, (node,))
        for name, base in found:
            if base is None:
                node = call(m.get_submodule(name), f"{path}.{name}", node)
            else:
                node = graph.create_node("call_module", path, (node,))
                node.meta["base"] = base
        return node

    graph.output(run(module, "", node))
    return graph


def _views_type(node: fx.Node) -> bool:
    return len(node.args) == 2 and isinstance(node.args[1], torch.dtype)


def _drop_checks(graph: fx.Graph) -> None:
    """Removes what ``fx`` adds to compare constants with what a call brings: calls are told apart before."""
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node.users:
            continue
        name = getattr(node.target, "__name__", "")
        compares = node.target is operator.eq and getattr(node.args[0], "op", "") == "placeholder"
        if compares or name in ("_assert_is_none", "_assert"):
            graph.erase_node(node)


def _name_arguments(graph: fx.Graph, parameters: list[inspect.Parameter]) -> None:
    """Gives the graph the forward's own argument names and constant defaults."""
    defaults = False
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    for node, parameter in zip(nodes, parameters, strict=True):
        node.target = parameter.name
        defaults = defaults or parameter.default is not parameter.empty
        node.args = (None,) if defaults else ()
        if parameter.default is None or isinstance(parameter.default, (bool, int, float, str)):
            node.args = (parameter.default,)
