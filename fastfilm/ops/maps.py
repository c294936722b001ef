"""Feature maps that modules hand to each other without writing them: ``DeferredMap`` and ``Joined``.

A consumer of ours reads the raw map and applies what is pending while loading; ordinary code that treats one as
a tensor gets the tensor, written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import assemble, pointwise, prologue, recipe, reference, spec, subclasses, views
from .assemble import Source
from .forks import Fork
from .library import direct
from .views import View


class _Lazy:
    """What both kinds of map share: the tensor on demand."""

    _tensor: Tensor | None = None
    origin: tuple[Tensor, ...] = ()
    """Tensors of classes of their own that the map comes from: these say what its tensor is."""

    def _write(self) -> Tensor:
        raise NotImplementedError

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
        return function(*_plain(args), **_plain(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, key: Any) -> Tensor:
        return self.tensor()[key]

    def __len__(self) -> int:
        return len(self.tensor())


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: _Lazy, *others: Any) -> Any:
        lazy = _DEFERRING.get(torch.add) if name in ("__add__", "__radd__") else None
        found = None if lazy is None else lazy(self, *others)
        if found is not None:
            return found
        return getattr(self.tensor(), name)(*_plain(others))

    apply.__name__ = name
    return apply


for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _side in ("", "r"):
        setattr(_Lazy, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(_Lazy, _name, _operator(_name))


class DeferredMap(_Lazy):
    """A feature map of which only the raw part is in memory: v = g * (act(a * (y - p) + b) - q) + s.

    Attributes:
        raw: y [N, C, *S], channels-last.
        coef: rows a, b, g, s, p, q, slope [7, N, C], float32; None: nothing is pending.
        act: name of the activation.
        plan: the backend that writes it.
        view: how consumers see it (pooled or resized), or None.
    """

    def __init__(
        self,
        raw: Tensor,
        coef: Tensor | None,
        act: str,
        plan: str,
        view: View | None = None,
        fork: Fork | None = None,
    ) -> None:
        self.raw, self.coef, self.act, self.plan, self.view = raw, coef, act, plan, view
        # of consumers that read the map beside others, where their kernels can add up its gradient
        self._fork = fork
        if fork is None and prologue.kernels_of(plan) is not None:
            self._fork = Fork(raw)

    @property
    def shape(self) -> torch.Size:
        """Shape of the feature map [N, C, *S]."""
        if self.view is None:
            return self.raw.shape
        return torch.Size((*self.raw.shape[:2], *self.view.size))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the feature map."""
        return self.raw.dtype

    @property
    def device(self) -> torch.device:
        """Device of the feature map."""
        return self.raw.device

    def sources(self) -> list[Source]:
        """What a consumer reads; a consumer of its own each time."""
        raw, ledger = (self.raw, None) if self._fork is None else self._fork.branch()
        return [Source(raw, self.coef, self.act, self.view, ledger)]

    def _write(self) -> Tensor:
        if self.coef is None:
            v = self.raw
        elif self.plan.endswith("/eager"):
            v = layout_of(self.raw, reference.materialise(self.raw, self.coef, self.act))
        else:
            short = direct(self.raw, self.coef)
            if self.view is not None and short:
                return assemble.assembled(self.sources(), self.plan)
            v = pointwise.materialise(self.raw, self.coef, self.act, self.plan, short)
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


class Joined(_Lazy):
    """Maps one behind another along the channels; nothing is written."""

    def __init__(self, parts: Sequence[DeferredMap | Tensor], plan: str) -> None:
        self.origin = subclasses.among(parts)
        self.parts, self.plan = [subclasses.stripped(p) for p in parts], plan

    @property
    def shape(self) -> torch.Size:
        """Shape of the feature map [N, ΣC, *S]."""
        first = self.parts[0].shape
        return torch.Size((first[0], sum(p.shape[1] for p in self.parts), *first[2:]))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the feature map."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the feature map."""
        return self.parts[0].device

    def sources(self) -> list[Source]:
        """What a consumer reads."""
        found: list[Source] = []
        for part in self.parts:
            found += (
                part.sources()
                if isinstance(part, DeferredMap)
                else [Source(part, None, "none", None)]
            )
        return found

    def _write(self) -> Tensor:
        sources = self.sources()
        if direct(sources[0].raw):
            return assemble.assembled(sources, self.plan)
        return torch.cat([plain(p) for p in self.parts], 1)

    def __repr__(self) -> str:
        return f"Joined({tuple(self.shape)}, {self.dtype}, {len(self.parts)} parts)"


Map = Tensor | DeferredMap | Joined
"""What modules hand to each other."""


def deferrable(raw: Tensor, plan: str, *others: Tensor) -> bool:
    """Whether a view of a map, beside others, may stay unwritten: eager mode, and kernels to write it later."""
    return not plan.endswith("/eager") and raw.dim() in (4, 5) and direct(raw, *others)


def readable(x: Any) -> Any:
    """``x``, written if it is a map that consumers do not read unwritten."""
    lazy = isinstance(x, _Lazy) and not isinstance(x, (DeferredMap, Joined))
    return x.tensor() if lazy else x


def plain(x: Map) -> Tensor:
    """``x`` as a tensor."""
    return x if isinstance(x, Tensor) else x.tensor()


def join(parts: Sequence[Map]) -> Map:
    """Maps [N, Ci, *S] one behind another along the channels, unwritten where that is possible.

    Raises:
        RuntimeError: as ``torch.cat``, where sizes do not fit.
    """
    found = _join(parts, 1)
    return torch.cat([plain(p) for p in parts], 1) if found is None else found


def max_pool(x: Map, kernel_size: int) -> Map:
    """``torch.nn.functional.max_pool2d`` or ``3d``, unwritten where that is possible."""
    dims = len(x.shape) - 2
    found = _max_pool(dims)(unwritten(x), kernel_size)
    if found is not None:
        return found
    pool = F.max_pool2d if dims == 2 else F.max_pool3d
    pooled: Tensor = pool(plain(x), kernel_size)
    return pooled


def interpolate(x: Map, **options: Any) -> Map:
    """``torch.nn.functional.interpolate``, unwritten where that is possible."""
    found = _interpolate(unwritten(x), **options)
    return F.interpolate(plain(x), **options) if found is None else found


def unwritten(x: Map) -> Map:
    """A tensor as a map with nothing pending where no gradient is asked for and kernels can show it."""
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or not direct(x) or x.numel() == 0:
        return x
    plan = recipe.pointwise_plan(x)
    kernels = recipe.launchers(plan)
    shows = hasattr(kernels, "gather") or hasattr(kernels, "gather_taps")
    return DeferredMap(x, None, "none", plan) if shows else x


def layout_of(x: Tensor, v: Tensor) -> Tensor:
    """``v`` channels-last if ``x`` is: some of PyTorch's norms fall back to contiguous."""
    if reference.transformed():
        return v
    if x.is_contiguous() or not x.is_contiguous(memory_format=spec.channels_last_format(x.dim())):
        return v
    return spec.channels_last(v)


def _join(tensors: Sequence[Any], dim: int = 0) -> Joined | None:
    parts: list[DeferredMap | Tensor] = []
    for t in tensors:
        parts += t.parts if isinstance(t, Joined) else [readable(t)]
    deferred = [p for p in parts if isinstance(p, DeferredMap) and p._tensor is None]
    if not deferred or dim not in (1, 1 - len(deferred[0].shape)):
        return None
    first, plan = deferred[0], deferred[0].plan
    for p in parts:
        same = (
            p.dtype == first.dtype and p.device == first.device and len(p.shape) == len(first.shape)
        )
        if not same or (p.shape[0], *p.shape[2:]) != (first.shape[0], *first.shape[2:]):
            return None
        if isinstance(p, DeferredMap) and p.plan.partition("/")[0] != plan.partition("/")[0]:
            return None
    written = [subclasses.stripped(p) for p in parts if isinstance(p, Tensor)]
    if not deferrable(first.raw, plan, *written):
        return None
    # a map that was written for somebody else is read as it is
    return Joined(
        [p._tensor if isinstance(p, DeferredMap) and p._tensor is not None else p for p in parts],
        plan,
    )


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _pooled(
    kind: str, x: Any, kernel_size: Any, stride: Any, padding: Any, include: bool, dims: int
) -> DeferredMap | None:
    if not isinstance(x, DeferredMap) or len(x.shape) != dims + 2:
        return None
    kernel, spread = _tuple(kernel_size, dims), _tuple(padding, dims)
    step = kernel if stride is None or stride == [] else _tuple(stride, dims)
    size = tuple(x.raw.shape[2:])
    return x.seen(views.pooling(kind, size, kernel, step, spread, include))


def _avg_pool(dims: int) -> Callable[..., DeferredMap | None]:
    def pool(
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> DeferredMap | None:
        if ceil_mode or divisor_override is not None:
            return None
        return _pooled("avg", x, kernel_size, stride, padding, count_include_pad, dims)

    return pool


def _max_pool(dims: int) -> Callable[..., DeferredMap | None]:
    def pool(
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> DeferredMap | None:
        if ceil_mode or return_indices or _tuple(dilation, dims) != (1,) * dims:
            return None
        return _pooled("max", x, kernel_size, stride, padding, True, dims)

    return pool


def _interpolate(
    x: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> DeferredMap | None:
    if not isinstance(x, DeferredMap) or recompute_scale_factor or antialias:
        return None
    dims = len(x.shape) - 2
    if mode in ("linear", "bilinear", "trilinear") and mode != ("bilinear", "trilinear")[dims - 2]:
        return None
    if mode.startswith("nearest") and align_corners is not None:
        return None
    out = None if size is None else _tuple(size, dims)
    if scale_factor is None:
        scales = None
    else:
        scales = (
            (float(scale_factor),) * dims
            if isinstance(scale_factor, (int, float))
            else tuple(float(s) for s in scale_factor)
        )
    return x.seen(views.resizing(mode, tuple(x.raw.shape[2:]), out, scales, bool(align_corners)))


_DEFERRING: dict[Any, Callable[..., Any]] = {
    F.interpolate: _interpolate,
    torch.cat: _join,
    torch.concat: _join,
    F.avg_pool2d: _avg_pool(2),
    F.avg_pool3d: _avg_pool(3),
    torch.max_pool2d: _max_pool(2),
    torch.max_pool3d: _max_pool(3),
    F.max_pool2d: _max_pool(2),
    F.max_pool3d: _max_pool(3),
}


def defer(lazy: Callable[..., Any], *functions: Any) -> None:
    """Makes ``functions`` of maps give what ``lazy`` gives for their arguments, unless that is None."""
    _DEFERRING.update(dict.fromkeys(functions, lazy))


def _plain(value: Any) -> Any:
    """``value`` with tensors in place of the maps in it."""
    if isinstance(value, _Lazy):
        return value.tensor()
    if isinstance(value, (tuple, list)):
        made = [_plain(v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
