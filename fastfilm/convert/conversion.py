"""``convert`` and ``restore``: a model whose calls run through TorchDynamo and the backend ``fastfilm``."""

from __future__ import annotations

import copy as copying
import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree

from fastfilm.ops.launchers import triton
from fastfilm.ops.spec import subclasses

from . import backend, closed, functions, polyfills
from .report import Calls, Report

KEY = "_fastfilm"
IGNORED = "__jit_ignored_attributes__"
"""Names of attributes that ``torch.jit.script`` leaves out."""

RECOMPILE_LIMIT = 64
"""Compilations of one function of a model, in all its modes and shapes, before it runs as it is."""

RESHAPES = 24
"""A graph with more changes of shape, such as one of window attention, is compiled for each size anew.

For all sizes at once it would take minutes.
"""

_SETTINGS: dict[str, Any] = {
    # a hook may be registered later
    "skip_nnmodule_hook_guards": False,
    # momentum=None of a batch norm reads its counter
    "capture_scalar_outputs": True,
    "recompile_limit": RECOMPILE_LIMIT,
    "accumulated_recompile_limit": 1024,
}


_SIMPLE = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))
"""Types of arguments in which there is no tensor of a class of its own."""

_ATTRIBUTES = (KEY, "_compiled_call_impl", "_replicate_for_data_parallel")
"""Attributes of a converted module that a restored one does not have."""

_numbers = itertools.count()


def convert(
    model: nn.Module, *, rest: str = "eager", copy: bool = False, verbose: bool = True
) -> nn.Module:
    """Makes the convolution, norm, activation, dropout and FiLM groups of an existing model run as fused blocks.

    The model stays the object that it was, of its own class. Its calls go through TorchDynamo, PyTorch's own
    tracer, which notices whatever a forward reads (attributes, modes, hooks, layers put in place of others)
    and replays what it writes. The first call of each kind compiles, for a second or so.

    Args:
        model: any model; what is not recognised stays as it is.
        rest: what runs the rest of the model: "eager", or "inductor" (PyTorch's compiler).
        copy: leave ``model`` alone and convert a deep copy.
        verbose: print one line at the first call; ``conversion_report`` has the whole.

    Returns:
        The converted model: ``model`` itself unless ``copy``.

    Raises:
        TypeError: ``model`` is not a module. ValueError: an unknown ``rest``.

    Example:
        >>> import torch, fastfilm
        >>> layers = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> model = fastfilm.convert(torch.nn.Sequential(*layers))
        >>> model(torch.randn(1, 1, 16, 16)).shape
        fastfilm: 1 of 1 convolutions fused (1 of 1 with kernel 3)
        torch.Size([1, 8, 16, 16])
    """
    _check(model)
    backend.check(rest, None, None)
    if copy:
        model = copying.deepcopy(model)
    restore(model)
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        kind = type(model).__name__
        raise TypeError(f"a {kind} cannot be converted: convert the module that it was made from")
    model.__dict__[KEY] = Conversion(model, rest, verbose)
    model.__dict__[KEY].install()
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``convert``, for ``model`` and every module in it; returns ``model``.

    Weights that were trained in between keep their values. FiLM that ``condition`` put in stays.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    for module in model.modules():
        made = conversion_of(module)
        if made is not None:
            made.remove()
    return model


def conversion_report(model: nn.Module, *example: Any) -> Report:
    """The report on every convolution of ``model``: the block that ``convert`` made of it, or would make.

    Args:
        example: arguments of a call, which a copy of the model is given; without any, the calls of a converted
            model so far count.

    Raises:
        TypeError: ``model`` is not a module. ValueError: it is not converted and there is no example.
    """
    _check(model)
    made = conversion_of(model)
    if example:
        twin = copying.deepcopy(model)
        convert(twin, rest="eager", verbose=False)
        twin(*copying.deepcopy(example))
        return twin.__dict__[KEY].calls.report(twin)
    if made is None:
        raise ValueError("model is not converted: pass an example input, or convert it first")
    return made.calls.report(model)


def conversion_of(module: nn.Module) -> Conversion | None:
    """The conversion of a module, if it is converted itself."""
    made = module.__dict__.get(KEY)
    return made if isinstance(made, Conversion) and made.module is module else None


class Conversion:
    """The call of a converted module; kept in ``module.__dict__``.

    Copies and pickles of the module come with a conversion of their own, which compiles anew.

    Attributes:
        module: the converted one. rest, verbose: see ``convert``.
        calls: what its graphs held so far.
        fixed: each size of the inputs is compiled anew.
        skipped: what TorchDynamo gave up in the present call, by its code: what not to compile from then on.
    """

    def __init__(self, module: nn.Module, rest: str, verbose: bool) -> None:
        self.module, self.rest, self.verbose = module, rest, verbose
        self.renew()

    def renew(self) -> None:
        """Forgets everything that was compiled."""
        self.calls = Calls()
        self.skipped: dict[types.CodeType, Any] = {}
        self.told, self.fixed = False, False
        self.plain: bool | None = None
        self.compiled: Callable[..., Any] | None = None

    def install(self) -> None:
        """Puts the conversion in front of the module's own call."""
        kept = self.module.__dict__
        kept["_compiled_call_impl"] = self
        kept["_replicate_for_data_parallel"] = Replication(self.module)
        ignored = getattr(self.module, IGNORED, ())
        kept[IGNORED] = [*ignored, *(n for n in _ATTRIBUTES if n not in ignored)]

    def remove(self) -> None:
        """Takes the conversion away."""
        _clean(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # the compiler around us follows the module itself
            return self.module._call_impl(*args, **kwargs)
        if _is_traced() or module_hooks._has_any_global_hook():
            return self.module._call_impl(*args, **kwargs)
        call = self.compiled
        if call is None:
            call = self.compiled = self._compile()
        if not _SIMPLE.issuperset(map(type, args)) or kwargs:
            given = pytree.tree_leaves((args, kwargs))
            if any(isinstance(t, Tensor) and type(t) not in subclasses.PLAIN for t in given):
                return self._of_subclasses(call, given, args, kwargs)
        return self._run(call, *args, **kwargs)

    def _run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            result = call(*args, **kwargs)
        except BaseException:
            # an error of this call is no reason to leave later ones unconverted
            self.skipped.clear()
            raise
        if self.skipped:
            for code, strategy in list(self.skipped.items()):
                torch._C._dynamo.eval_frame.set_code_exec_strategy(code, strategy)
            self.skipped.clear()
        if not self.told:
            self._tell()
        return result

    def _of_subclasses(
        self,
        call: Callable[..., Any],
        given: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call with tensors of classes of their own, which are unwrapped once if nothing inside would notice."""
        origin = subclasses.among(given)
        others = [t for t in given if isinstance(t, Tensor) and type(t) not in subclasses.PLAIN]
        if self.plain is None:
            self.plain = closed.is_closed(self.module)
        if len(origin) != len(others) or not self.plain or closed.is_watched(self.module):
            return self.module._call_impl(*args, **kwargs)
        return self._run(subclasses.through, call, origin, *args, **kwargs)

    def _compile(self) -> Callable[..., Any]:
        # TorchDynamo keeps the compiler for ever, and would keep the model with it
        rest, watch = self.rest, weakref.WeakMethod(self._watch)

        def compiler(graph: Any, inputs: Any) -> Any:
            return backend.compiled(graph, inputs, rest, watcher=watch())

        polyfills.register()
        context: Any = torch._dynamo.optimize(compiler)
        callback = getattr(context, "callback", None)
        if callback is not None:
            context.callback = _configured(callback, self)
        made: Callable[..., Any] = context(_own_code(self.module))
        return made

    def _watch(self, graph: torch.fx.Graph, inputs: dict[Any, Any], found: Any) -> None:
        self.calls.add(self.module, inputs, found)
        self.fixed |= sum(n.target in functions.RESHAPING for n in graph.nodes) > RESHAPES

    def _tell(self) -> None:
        self.told = True
        if self.verbose:
            print(self.calls.report(self.module).summary())

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "rest": self.rest, "verbose": self.verbose}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.renew()
        # copies by ``nn.Module`` lack the compiled call
        self.install()


class Replication:
    """``_replicate_for_data_parallel`` of a converted module: replicas run their own layers unconverted.

    A replica shares the original's attributes, and with them a conversion that is bound to the original.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> Any:
        replica: Any = type(self.module)._replicate_for_data_parallel(self.module)
        _clean(replica)
        return replica


def _clean(module: nn.Module) -> None:
    """Takes away from ``module`` what a conversion put there."""
    kept = module.__dict__
    for name in _ATTRIBUTES:
        kept.pop(name, None)
    ignored = [n for n in kept.pop(IGNORED, ()) if n not in _ATTRIBUTES]
    if ignored != list(getattr(module, IGNORED, ())):
        kept[IGNORED] = ignored


def _configured(callback: Any, conversion: Conversion) -> Any:
    """TorchDynamo's callback for what is not compiled yet, under settings of ours.

    A call that cannot be compiled, because it is wrong or because TorchDynamo fails, runs as it is this time, with
    the errors that it has of its own. Code that TorchDynamo gives up is skipped from the end of the call on.
    """
    from torch._dynamo import exc, trace_rules
    from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy

    faults = (exc.BackendCompilerFailed, exc.InternalTorchDynamoError)

    @functools.wraps(callback)
    def run(frame: Any, *args: Any, **kwargs: Any) -> Any:
        strategy = conversion.skipped.get(frame.f_code)
        if strategy is not None:
            return ConvertFrameReturn(frame_exec_strategy=strategy, apply_to_code=False)
        try:
            settings = _SETTINGS | {"automatic_dynamic_shapes": not conversion.fixed}
            with torch._dynamo.config.patch(**settings), polyfills.unnoticed():
                found = callback(frame, *args, **kwargs)
            given_up = found.guarded_code is None and found.apply_to_code
            if given_up and not trace_rules.check(frame.f_code):
                conversion.skipped[frame.f_code] = found.frame_exec_strategy
                found.apply_to_code = False
            return found
        except Exception as error:
            if isinstance(error, faults):
                if triton.STRICT:
                    raise
                text = str(error).strip().splitlines() or [""]
                warnings.warn(
                    f"a part of the model runs unconverted, because compiling it failed: {text[0]}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        skip = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
        return ConvertFrameReturn(frame_exec_strategy=skip, apply_to_code=False)

    run.__dict__.update(vars(callback))
    return run


def _own_code(module: nn.Module) -> Callable[..., Any]:
    """A function that calls ``module``, of a code object and a name of its own.

    By the code object TorchDynamo keeps and counts what it compiled; by the name it remembers which numbers
    changed.
    """

    def converted(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    name = f"converted_{next(_numbers)}"
    code = converted.__code__.replace(co_name=name)
    return types.FunctionType(code, converted.__globals__, name, closure=converted.__closure__)


def _is_traced() -> bool:
    """Whether somebody follows the forward: PyTorch's older tracers, functional transforms, dispatch modes."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
