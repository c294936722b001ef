"""The call of one block: it finds the recipe, computes the map and returns it, finished or with a pending affine.

``functional`` holds the same behind keyword arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import choice, reference
from ..maps.assembled import flat
from ..maps.deferred import DeferredMap, Joined, Map, readable
from ..operators import pointwise
from ..spec import (
    Geometry,
    NormInput,
    Options,
    Source,
    TailTensors,
    direct,
    layout_of,
    subclasses,
)
from . import function, recipe, tail
from .function import Work
from .prepared import PreparedWeight, dense
from .recipe import Recipe
from .tail import Moving


class Call(NamedTuple):
    """One call of a block.

    Attributes:
        weight: of the convolution; None: the block is what follows one, on a map that exists already.
        geometry: as the caller gave it.
        deferred: "always" hands the map on unwritten even where finishing it in place is the shorter way for
            most consumers: a residual addition reads it unwritten.
        prepared: where the caller keeps what inference makes of the weight.
    """

    weight: Tensor | None
    geometry: Geometry | None
    options: Options
    tensors: TailTensors
    moving: Moving = Moving()
    deferred: bool | str = False
    prepared: PreparedWeight | None = None


def run(x: Map, call: Call) -> Tensor | DeferredMap:
    """``fastfilm.conv_norm_film`` or ``norm_film`` with its arguments packed."""
    ordinary = subclasses.PLAIN.issuperset(map(type, (call.weight, *call.tensors)))
    if not ordinary or type(x) is not Tensor:
        origin = subclasses.among((x,) if ordinary else (x, call.weight, *call.tensors))
        if origin:
            again: Tensor | DeferredMap = subclasses.through(run, origin, x, call)
            return again
        x = readable(x)
    # the recipe's checks refuse an argument that is neither tensor nor map
    sources = _sources(x, ordinary) if isinstance(x, (DeferredMap, Joined)) else [Source(x)]
    dtype = None if call.weight is None else _autocast_dtype(sources[0].raw)
    if dtype is not None and call.weight is not None:
        call = call._replace(weight=_cast(call.weight, dtype, call.prepared))
        sources = [s._replace(raw=s.raw.to(dtype)) for s in sources]
    first = sources[0]
    # a view, or a second source, is there in eager mode alone
    like = first.raw if len(sources) == 1 and first.view is None else _seen(sources)
    eager = ordinary and direct(first.raw, first.coef)
    how = recipe.of_call(eager, like, call.weight, call.geometry, call.options, call.tensors)
    if how.plain:
        return _plain(x, call, how, like.dtype)
    return _direct(x, sources, call, how) if eager else _traced(sources[0], call, how)


def _sources(x: DeferredMap | Joined, ordinary: bool) -> list[Source]:
    """The block's sources; more than one raw map with its pending affine in eager mode alone."""
    if isinstance(x, DeferredMap) and x.view is None:
        # no branch: the map itself has one consumer as a rule
        return [Source(x.raw, x.coef, x.act)]
    sources = x.sources()
    if x._tensor is None and ordinary and direct(sources[0].raw):
        return sources
    return [Source(x.tensor())]


def _seen(sources: Sequence[Source]) -> Tensor:
    """A tensor of the shape, type and device of what the block sees of several sources, or of a view."""
    first = sources[0]
    channels = sum(s.raw.shape[1] for s in sources)
    return first.raw.new_empty(1).expand(first.raw.shape[0], channels, *first.size)


def _autocast_dtype(raw: Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is on and changes a map like this one."""
    if isinstance(raw, Tensor):
        device = raw.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and raw.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
    return None


def _cast(weight: Tensor, dtype: torch.dtype, prepared: PreparedWeight | None) -> Tensor:
    """``weight`` in autocast's dtype; in inference on a CPU the one that was prepared."""
    kept = prepared is not None and not torch.is_grad_enabled() and weight.dtype != dtype
    if kept and weight.device.type == "cpu" and direct(weight) and dense(weight):
        assert prepared is not None
        return prepared.cast(weight, dtype)
    return weight.to(dtype)


def _plain(x: Map, call: Call, how: Recipe, dtype: torch.dtype) -> Tensor | DeferredMap:
    """The block step by step in PyTorch."""
    v = (x if isinstance(x, Tensor) else x.tensor()).to(dtype)
    y, bias = v, call.tensors.bias
    if call.weight is not None and how.geometry is not None:
        # a channels-last weight would make the map channels-last too
        weight = call.weight.contiguous() if v.is_contiguous() else call.weight
        added = None if bias is None else bias.to(weight.dtype)
        y = reference.convolution(v, weight, added, how.geometry)
    v = layout_of(v, tail.eager(how.kind, call.tensors, y, call.moving))
    return DeferredMap(v, None, "none", choice.EAGER) if call.deferred else v


def _direct(x: Map, sources: list[Source], call: Call, how: Recipe) -> Tensor | DeferredMap:
    """The block in eager mode."""
    weight, _, _, tensors, moving, deferred, prepared = call
    recorded = graded = torch.is_grad_enabled()
    finish = not recorded and _finishes(call, how)
    result = "raw" if how.bare else "pending" if deferred and not finish else "written"
    if finish and isinstance(x, DeferredMap) and x.view is None:
        # the map is written once for all consumers, instead of once for each
        sources = [Source(x.tensor().to(sources[0].raw.dtype))]
    work = Work(how, moving, result)
    if recorded:
        s = sources[0]
        maps = (s.raw, s.coef) if len(sources) == 1 else flat(sources)
        # without moments of y the weight alone may need a gradient; in a frozen network nothing does
        graded = how.kind.uses_input or _needs_grad(weight, *tensors, *maps)
    if graded:
        found = function.apply(work, sources, weight, *tensors, *maps)
        y, coef = found if result == "pending" else (found, None)
    else:
        keep = None if recorded or prepared is None else prepared.pack
        y, v, coef, *_ = function.values(work, sources, weight, tensors, None, keep)
        y = v if result == "written" else y
    if not deferred or finish or result == "written":
        done: Tensor = y
        return done
    return DeferredMap(y, coef, how.kind.activation, how.plan)


def _finishes(call: Call, how: Recipe) -> bool:
    """Whether inference finishes the map in place, which beats a pass of its own later."""
    convolves = how.geometry is not None and how.plan.route == "composed"
    return convolves and call.deferred != "always"


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _traced(source: Source, call: Call, how: Recipe) -> Tensor | DeferredMap:
    """The block in PyTorch's operators and ours, for a compiler or tracer that watches."""
    kind, plan, geometry, weight = how.kind, how.plan, how.geometry, call.weight
    raw, coef, act, *_ = source
    added, seen, tensors = tail.prepared(kind, plan, call.tensors, raw)
    pending = bool(call.deferred) and (torch.is_grad_enabled() or not _finishes(call, how))
    operators, stats = torch.ops.fastfilm, None
    if weight is None or geometry is None:
        y, stats = raw, None if seen is None else pointwise.moments_of(raw, seen, plan)
    else:
        if seen is None and not pending:
            known = reference.of_block(kind, tensors, raw.device, *call.moving)
            if not _needs_grad(raw, weight, coef, known):
                given = raw, weight, added, coef, act, known, kind.activation, *geometry, str(plan)
                done: Tensor = operators.conv_apply(*given)
                return done
        moments = seen is not None, str(plan)
        head = raw, weight, added, coef, act, *(seen or NormInput())
        y, stats = operators.conv(*head, *geometry, *moments)
    tensors = tensors._replace(stats=None if seen is None else stats)
    found = reference.of_block(kind, tensors, raw.device, *call.moving)
    if pending:
        return DeferredMap(y, found, kind.activation, plan)
    return pointwise.written(y, found, kind.activation, plan)
