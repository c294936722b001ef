"""What a converted module knows of itself: its class before, and the programs for the calls that came."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfilm.ops import DeferredMap
from fastfilm.ops.maps import Joined
from fastfilm.ops.prepared import PreparedWeight

from . import film, layers
from .film import Film, Given, Split
from .group import Group, Path
from .program import Program, build, written
from .trace import CannotTrace, is_sequence, original, sees_values_alone

_CONSTANTS = (bool, int, float, str, type(None))
_SOME_MAP = torch.empty(0)


class State:
    """Kept in ``module.__dict__["_fastfilm"]``; holds no modules and no tensors of the model.

    Attributes:
        original: the module's class.
        fused: False runs the layers one by one.
        watched: names of the module's attributes that are constants.
        containers: paths of the modules that programs look into: its own and those of its ``Sequential``.
        sites: FiLM by the path of the group that applies it.
        root: the module that ``convert`` or ``condition`` was called with.
        conditioned: FiLM was put into the model.
        conditioner: name of the generator among the children, in the root of a conditioned model.
        split, replica_index: metadata of a batch that is spread over replicas.
        plain: nothing in the module asks for the class of a tensor; None: not known yet.
        refused: why the forward of the usual call cannot be followed.
    """

    def __init__(self, original: type[nn.Module]) -> None:
        self.original = original
        self.fused, self.root, self.conditioned = True, False, False
        self.sites: dict[Path, Film] = {}
        self.prepared: dict[Path, PreparedWeight] = {}
        self.programs: dict[Any, Program | None] = {}
        self.watched: tuple[str, ...] | None = None
        self.containers: tuple[Path, ...] = ()
        self.refused: str | None = None
        self.plain: bool | None = None
        self.conditioner: str | None = None
        self.split: Split | None = None
        self.replica_index: int | None = None

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], deferred: bool
    ) -> Any:
        """The module's forward for these arguments; possibly a map if ``deferred``."""
        key = self._key(module, args, kwargs, deferred)
        program = self.programs.get(key, False)
        if program is False:
            program = self.prepare(module, args, kwargs, deferred)
        if program is None:
            return self.original.forward(
                module, *[written(a) for a in args], **{k: written(v) for k, v in kwargs.items()}
            )
        assert isinstance(program, Program)
        return program.run(module, module, *args, **kwargs)

    def closed(self, module: nn.Module) -> bool:
        """Whether nothing that the forward runs would notice plain tensors in place of a subclass."""
        if self.plain is None:
            self.plain = all(
                sees_values_alone(m, State(original(m)).defaults()) for m in module.modules()
            )
        inside = (m for m in module.modules() if m is not module)
        return self.plain and not any(layers.hooked(m) for m in inside)

    def prepare(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], deferred: bool
    ) -> Program | None:
        """Builds the program for calls like this one; None if its forward cannot be followed."""
        if torch.compiler.is_compiling():
            return None
        if self.watched is None:
            self.watched = tuple(sorted(k for k, v in module.__dict__.items() if _constant(v)))
        self.containers = tuple(_containers(module, ()))
        key = self._key(module, args, kwargs, deferred)
        try:
            constants, lists = self._bound(args, kwargs)
            made: Program | None = self.build(module, constants, lists, deferred, is_converted)
        except CannotTrace:
            made = None
        self._check_sites(module, made)
        self.programs[key] = made
        return made

    def build(
        self,
        module: nn.Module,
        constants: Mapping[str, Any],
        lists: Mapping[str, tuple[type, int]],
        deferred: bool,
        converted: Callable[[nn.Module], bool],
    ) -> Program:
        """``program.build`` for this module."""
        return build(module, constants, lists, deferred, converted, whole=self.conditioned)

    def _check_sites(self, module: nn.Module, program: Program | None) -> None:
        """RuntimeError where a program would leave out FiLM that the module owes."""
        found = {} if program is None else {g.name: g for g in program.groups}
        for path, at in self.sites.items():
            owed = at.direct if program is None else path in program.calls
            roles = tuple(m.role for m in found[path].members) if path in found else ()
            if owed and roles != at.roles:
                raise RuntimeError(
                    f"FiLM at {at.site!r} stands in {' + '.join(at.roles)}, which the forward of"
                    f" {self.original.__name__} does not run that way in this call"
                )

    def prime(self, module: nn.Module) -> None:
        """Programs of the usual calls, in training and evaluation; those of children as this module calls them."""
        required = [p for p in self._parameters() if p.default is p.empty]
        arguments = (_SOME_MAP,) * len(required)
        modes = [(m, m.training) for m in module.modules()]
        here = module.training
        for training in (not here, here):
            for m, mode in modes:
                m.training = mode if training == here else training
            for deferred in (False, True):
                self._prime(module, arguments, {}, deferred)

    def _prime(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], deferred: bool
    ) -> None:
        if self.watched is not None and self._key(module, args, kwargs, deferred) in self.programs:
            return
        program = self.prepare(module, args, kwargs, deferred)
        for call in () if program is None else program.children:
            child = module.get_submodule(call.path)
            state: State = child.__dict__["_fastfilm"]
            state._prime(child, call.args(_SOME_MAP), call.kwargs(_SOME_MAP), call.deferred)

    def defaults(self) -> dict[str, Any]:
        """Arguments of the usual call that are constants."""
        return {
            p.name: p.default
            for p in self._parameters()
            if p.default is not p.empty and isinstance(p.default, _CONSTANTS)
        }

    def groups(self) -> list[Group]:
        """Groups of all programs so far, each once."""
        found: dict[Any, Group] = {}
        for program in self.programs.values():
            for group in () if program is None else program.groups:
                if group.name not in found or len(group.members) > len(found[group.name].members):
                    found[group.name] = group
        return list(found.values())

    def replica(self) -> State:
        """The state of a copy of the module that runs in another thread."""
        made = copy.copy(self)
        made.prepared = {}
        rows = film.given()
        if self.conditioner is not None and rows is not None:
            if self.split is None or self.split.used or self.split.given is not rows:
                self.split = Split(rows)
            made.split, made.replica_index = self.split, self.split.replicas
            self.split.replicas += 1
        return made

    def given(self) -> Given | None:
        """Metadata of a replica's samples, where the replica runs in a thread of its own."""
        if self.split is None or self.replica_index is None:
            return None
        return self.split.rows(self.replica_index)

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.original.forward).parameters.values())[1:]

    def _key(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], deferred: bool
    ) -> Any:
        values = (
            tuple([getattr(module, name, None) for name in self.watched or ()]),
            tuple([_built(module, path) for path in self.containers]),
        )
        if len(args) == 1 and not kwargs and isinstance(args[0], (Tensor, DeferredMap, Joined)):
            return deferred, values
        forms = tuple([_form(a) for a in args]), tuple([(k, _form(v)) for k, v in kwargs.items()])
        return deferred, values, forms

    def _bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, tuple[type, int]]]:
        """Constants, and kinds and lengths of lists, among a call's arguments by name."""
        signature = inspect.signature(self.original.forward)
        try:
            bound = signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise CannotTrace(str(error)) from None
        bound.apply_defaults()
        constants, lists = {}, {}
        for name, value in list(bound.arguments.items())[1:]:
            form = _form(value)
            if isinstance(value, _CONSTANTS):
                constants[name] = value
            elif isinstance(form, tuple):
                lists[name] = form
            elif form is not _MAP:
                raise CannotTrace(f"its argument {name} is a {type(value).__name__}")
        return constants, lists

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(self.__dict__)
        kept |= {"programs": {}, "prepared": {}, "split": None, "replica_index": None}
        return kept


def is_converted(module: nn.Module) -> bool:
    """Whether a module runs a program."""
    return "_fastfilm" in module.__dict__


def _containers(module: nn.Module, path: Path) -> list[Path]:
    """Paths of a module and of the ``Sequential`` ones that its forward is followed into."""
    found = [path]
    for name, child in module._modules.items():
        if child is not None and is_sequence(child):
            found += _containers(child, (*path, name))
    return found


def _built(module: nn.Module, path: Path) -> Any:
    """What of a container decides how its owner's forward is followed."""
    m: Any = module
    for name in path:
        m = m._modules.get(name)
        if m is None or not is_sequence(m):
            return None
    children = tuple([(n, type(c) is nn.Identity) for n, c in m._modules.items()])
    return children, bool(path) and layers.hooked(m)


def _constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_constant(v) for v in value)
    return isinstance(value, _CONSTANTS)


_MAP = "map"


def _form(value: Any) -> Any:
    """What a forward is followed with: a constant itself, a word for a map, kind and length of a list of maps."""
    if isinstance(value, (Tensor, DeferredMap, Joined)):
        return _MAP
    if isinstance(value, _CONSTANTS):
        return ("constant", value)
    if type(value) in (list, tuple) and value and all(_form(v) is _MAP for v in value):
        return type(value), len(value)
    return type(value)
