"""Feature maps that modules hand to each other without writing them: ``DeferredMap`` and ``Joined``.

A consumer of ours reads the raw map and applies what is pending while loading; ordinary code that treats one as
a tensor gets the tensor, written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import launchers, reference
from ..operators import pointwise
from ..spec import Plan, Source, direct, layout_of, subclasses, views
from ..spec.forks import Fork
from ..spec.views import View
from .assembled import assembled


class Lazy:
    """The base of both kinds of deferred map: it gives the tensor on demand."""

    _tensor: Tensor | None = None
    _like: Any
    """A tensor or map of its type, on its device."""
    origin: tuple[Tensor, ...] = ()
    """Tensors of classes of their own that the map comes from: these say what its tensor is."""

    def _write(self) -> Tensor:
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """Shape of the feature map [N, C, *S]."""
        return self._like.shape

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the feature map."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Device of the feature map."""
        return self._like.device

    def tensor(self) -> Tensor:
        """The feature map itself [N, C, *S], channels-last, in the raw map's dtype; written once."""
        if self._tensor is None:
            if self.origin:
                with subclasses.inside():
                    self._tensor = self._write()
            else:
                self._tensor = self._write()
        return subclasses.given_back(self._tensor, self.origin) if self.origin else self._tensor

    def materialise(self) -> Tensor:
        """Another name of ``tensor``."""
        return self.tensor()

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Pooling, resizing and concatenation stay deferred; every other function gets the tensor."""
        kwargs = kwargs or {}
        lazy = _DEFERRING.get(function)
        if lazy is not None:
            found = lazy(*args, **kwargs)
            if found is not None:
                return found
        return function(*_written(args), **_written(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, key: Any) -> Tensor:
        return self.tensor()[key]

    def __len__(self) -> int:
        return len(self.tensor())


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Lazy, *others: Any) -> Any:
        lazy = _DEFERRING.get(torch.add) if name in ("__add__", "__radd__") else None
        found = None if lazy is None else lazy(self, *others)
        if found is not None:
            return found
        return getattr(self.tensor(), name)(*_written(others))

    apply.__name__ = name
    return apply


for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _side in ("", "r"):
        setattr(Lazy, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Lazy, _name, _operator(_name))


class DeferredMap(Lazy):
    """A feature map of which only the raw part is in memory: v = g * (act(a * (y - p) + b) - q) + s.

    Attributes:
        raw: y [N, C, *S], channels-last.
        coef: rows a, b, g, s, p, q, slope [7, N, C], float32; None: nothing is pending.
        act: name of the activation.
        plan: the backend and route that write it; None where nothing is pending.
        view: how consumers see it (pooled or resized), or None.
    """

    def __init__(
        self,
        raw: Tensor,
        coef: Tensor | None,
        act: str,
        plan: Plan | None,
        view: View | None = None,
        fork: Fork | None = None,
    ) -> None:
        self.raw, self.coef, self.act, self.plan, self.view = raw, coef, act, plan, view
        self._like = raw
        # the branches of consumers that can add up the map's gradient in their kernels
        self._fork = fork
        if fork is None and plan is not None and launchers.reads_sources(plan):
            self._fork = Fork(raw)

    @property
    def shape(self) -> torch.Size:
        """Shape of the feature map [N, C, *S]."""
        if self.view is None:
            return self.raw.shape
        return torch.Size((*self.raw.shape[:2], *self.view.size))

    def sources(self) -> list[Source]:
        """The sources that a consumer reads; each call is a consumer of its own."""
        raw, ledger = (self.raw, None) if self._fork is None else self._fork.branch()
        return [Source(raw, self.coef, self.act, self.view, ledger)]

    def _write(self) -> Tensor:
        raw, coef, plan = self.raw, self.coef, self.plan
        if coef is None or plan is None:
            v = raw
        elif plan.route == "eager":
            v = layout_of(raw, reference.materialise(raw, coef, self.act))
        elif direct(raw, coef) and self.view is not None:
            return assembled(self.sources(), plan)
        else:
            v = pointwise.written(raw, coef, self.act, plan)
        return views.seen(v, self.view)

    def seen(self, view: View | None) -> DeferredMap | None:
        """The map as ``view`` shows it; None where that has to be written."""
        size = tuple(self.raw.shape[2:])
        if view is None or self.view is not None or not deferrable(self.raw, self.plan):
            return None
        if self._tensor is not None or not views.covered(view, size):
            return None
        shown = DeferredMap(self.raw, self.coef, self.act, self.plan, view, self._fork)
        shown.origin = self.origin
        return shown

    def __repr__(self) -> str:
        return f"DeferredMap({tuple(self.shape)}, {self.dtype}, act={self.act!r}, view={self.view})"


class Joined(Lazy):
    """Maps one behind another along the channels; nothing is written."""

    def __init__(self, parts: Sequence[DeferredMap | Tensor], plan: Plan) -> None:
        self.origin = subclasses.among(parts)
        self.parts, self.plan = [subclasses.stripped(p) for p in parts], plan
        self._like = self.parts[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the feature map [N, ΣC, *S]."""
        first = self.parts[0].shape
        return torch.Size((first[0], sum(p.shape[1] for p in self.parts), *first[2:]))

    def sources(self) -> list[Source]:
        """The sources that a consumer reads."""
        found: list[Source] = []
        for part in self.parts:
            found += part.sources() if isinstance(part, DeferredMap) else [Source(part)]
        return found

    def _write(self) -> Tensor:
        sources = self.sources()
        if direct(sources[0].raw):
            return assembled(sources, self.plan)
        return torch.cat([plain(p) for p in self.parts], 1)

    def __repr__(self) -> str:
        return f"Joined({tuple(self.shape)}, {self.dtype}, {len(self.parts)} parts)"


Map = Tensor | DeferredMap | Joined
"""The types that modules hand to each other."""


def deferrable(raw: Tensor, plan: Plan | None, *others: Tensor) -> bool:
    """Whether a view of a map, beside others, may stay unwritten: eager mode, and kernels to write it later."""
    kernels = plan is not None and plan.route != "eager"
    return kernels and raw.dim() in (4, 5) and direct(raw, *others)


def readable(x: Any) -> Any:
    """``x``, written if it is a map that consumers do not read unwritten."""
    lazy = isinstance(x, Lazy) and not isinstance(x, (DeferredMap, Joined))
    return x.tensor() if lazy else x


def plain(x: Map) -> Tensor:
    """``x`` as a tensor."""
    return x if isinstance(x, Tensor) else x.tensor()


_DEFERRING: dict[Any, Callable[..., Any]] = {}
"""Functions of maps that leave their result unwritten, where they can: see ``defer``."""


def defer(lazy: Callable[..., Any], *functions: Any) -> None:
    """Makes ``functions`` of maps give what ``lazy`` gives for their arguments, unless that is None."""
    _DEFERRING.update(dict.fromkeys(functions, lazy))


def _written(value: Any) -> Any:
    """``value`` with tensors in place of the maps in it."""
    if isinstance(value, Lazy):
        return value.tensor()
    if isinstance(value, (tuple, list)):
        made = [_written(v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {k: _written(v) for k, v in value.items()}
    return value
