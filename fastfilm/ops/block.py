"""One block, as the modules call it: from a recipe and tensors to the map, finished or pending.

``functional`` holds the same behind keyword arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import assemble, backends, conv, pointwise, prologue, recipe, reference, subclasses
from .assemble import Source
from .library import direct
from .maps import DeferredMap, Joined, Map, layout_of, readable
from .prepared import PreparedWeight, dense
from .recipe import Options, TailTensors
from .tail import Tail, accumulate_dtype


def run(
    x: Map,
    weight: Tensor,
    bias: Tensor | None,
    geometry: recipe.Geometry,
    options: Options,
    tensors: TailTensors,
    momentum: float,
    deferred: bool | str,
    prepared: PreparedWeight | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | DeferredMap:
    """``fastfilm.conv_norm_film`` with its arguments packed.

    Args:
        geometry: stride, padding, dilation, transposed, output_padding, groups.
        tensors: norm_weight, norm_bias, running_mean, running_var, gamma, beta, dropout_mask, slope.
        deferred: "always" hands the map on unwritten even where finishing it in place is the shorter way for most
            consumers: a residual addition reads it unwritten.
        prepared: where the caller keeps what inference makes of the weight.
        group: processes over which a batch norm's batch is spread.
    """
    given = (weight, bias, *tensors)
    ordinary = subclasses.PLAIN.issuperset(map(type, given))
    if not ordinary or type(x) is not Tensor:
        origin = subclasses.among((x,) if ordinary else (x, *given))
        if origin:
            others = (momentum, deferred, prepared, group)
            given_back: Tensor | DeferredMap = subclasses.through(
                run, origin, x, weight, bias, geometry, options, tensors, *others
            )
            return given_back
    sources: list[Source] | None = None
    x = readable(x)
    if isinstance(x, Joined) or (isinstance(x, DeferredMap) and x.view is not None):
        sources = x.sources()
        if x._tensor is not None or not ordinary or not direct(sources[0].raw):
            x, sources = x.tensor(), None
    if sources is not None:
        raw = sources[0].raw
    else:
        assert not isinstance(x, Joined)
        raw = x.raw if isinstance(x, DeferredMap) else x
    dtype = _autocast_dtype(raw)
    if dtype is not None:
        weight, raw = _cast(weight, dtype, prepared), raw.to(dtype)
        sources = sources and [s._replace(raw=s.raw.to(dtype)) for s in sources]
    if sources is not None:
        # of the shape, type and device of what the convolution sees
        raw = sources[0].raw.new_empty(1).expand(x.shape)
    short = ordinary and isinstance(raw, Tensor) and direct(raw)
    how = _recipe(short, raw, weight, bias, geometry, options, tensors)
    kind, plan, kernels, geometry = how.kind, how.plan, how.kernels, how.geometry
    tail = _tail(how, momentum, tensors, group)
    if kernels is None:
        v = raw if isinstance(x, Tensor) else x.tensor().to(raw.dtype)
        if v.is_contiguous():
            # a channels-last weight would make the map channels-last too
            weight = weight.contiguous()
        y = reference.convolution(
            v, weight, None if bias is None else bias.to(weight.dtype), *geometry
        )
        v = layout_of(v, tail.eager(y))
        return _identity(v) if deferred else v

    # without gradients nobody needs the raw map, and finishing it in place beats a pass of its own later
    finish = how.composed and not torch.is_grad_enabled() and deferred != "always"
    keep = None if prepared is None else prepared.pack
    coef, x_act, convolved = None, "none", assemble.convolved
    if sources is None and not how.composed and short and prologue.kernels_of(plan):
        coef, x_act = (x.coef, x.act) if isinstance(x, DeferredMap) else (None, "none")
        sources = [Source(raw, coef, x_act, None)]
    if sources is not None:
        if prologue.covers(sources, plan):
            convolved = prologue.convolved
        elif not torch.is_grad_enabled():
            raw, sources = assemble.assembled(sources, plan, passing=True), None
    elif isinstance(x, DeferredMap):
        if finish and short:
            # written once for all its consumers, where it would be written for each
            raw = x.tensor().to(raw.dtype)
        elif x.coef is not None:
            coef, x_act = x.coef, x.act
            short = short and direct(coef)
    if convolved is prologue.convolved and kind.norm == "none" and _plain(kind.activation, tensors):
        # nothing is pending behind a convolution that adds its bias itself
        assert sources is not None
        y, _ = convolved(sources, weight, bias, None, "none", geometry, False, plan)
        return DeferredMap(y, None, "none", plan) if deferred else y
    added = None
    if bias is not None and not conv.adds_bias(plan):
        if kind.activation_first and kind.uses_input:
            # the op gives its gradient, which is that of the raw map
            added, bias = bias.to(raw.dtype), bias.detach()
    elif bias is not None and (kind.activation_first or kind.norm == "none"):
        # added before the raw map is rounded, where a sum near 0 must keep its sign
        added = bias.to(raw.dtype)
        if kind.uses_input:
            # the op gives its gradient; only what rounding took from it is left for the coefficients
            exact = added.dtype == bias.dtype
            rest = None if exact else (bias.to(accumulate_dtype(raw)) - added).detach()
        else:
            # its gradient comes with the coefficients'
            exact = added.dtype == bias.dtype and not torch.is_grad_enabled()
            added = added.detach()
            rest = None if exact else bias.to(accumulate_dtype(raw)) - added
        bias = rest
    if kind.uses_input:
        pre = tail.pre(bias, raw, biased=added is not None)
        if sources is not None:
            y, stats = convolved(
                sources, weight, added, pre, kind.pre_activation, geometry, True, plan
            )
        else:
            y, stats = conv.conv(
                *(raw, weight, added, coef, x_act, pre, kind.pre_activation, *geometry, True, plan),
                short=short,
                keep=keep,
            )
        out_coef = tail.coefficients(raw, bias, stats, kernels, short)
    else:
        out_coef = tail.coefficients(raw, bias, None, kernels, short)
        if convolved is prologue.convolved and not deferred and kind.activation == "none":
            assert sources is not None
            return prologue.finished(sources, weight, added, out_coef, "none", geometry, plan)
        flat = () if sources is None else (*(s.raw for s in sources), *(s.coef for s in sources))
        if (not deferred or finish) and not _needs_grad(raw, weight, coef, out_coef, *flat):
            if convolved is prologue.convolved:
                assert sources is not None
                return prologue.finished(
                    sources, weight, added, out_coef, kind.activation, geometry, plan
                )
            if sources is not None:
                raw = assemble.assembled(sources, plan)
            finishing = (added, coef, x_act, out_coef, kind.activation, *geometry, plan)
            return conv.finished(raw, weight, *finishing, short=short, keep=keep)
        if sources is not None:
            y, _ = convolved(sources, weight, added, None, "none", geometry, False, plan)
        else:
            y, _ = conv.conv(
                *(raw, weight, added, coef, x_act, None, "none", *geometry, False, plan),
                short=short,
                keep=keep,
            )
    if finish:
        return pointwise.finish(y, out_coef, kind.activation, plan, short)
    if deferred:
        return DeferredMap(y, out_coef, kind.activation, plan)
    return pointwise.materialise(y, out_coef, kind.activation, plan, short)


def run_on_map(
    x: Tensor,
    options: Options,
    tensors: TailTensors,
    momentum: float,
    deferred: bool,
    group: dist.ProcessGroup | None = None,
) -> Tensor | DeferredMap:
    """``fastfilm.norm_film`` with its arguments packed."""
    if type(x) is not Tensor or not subclasses.PLAIN.issuperset(map(type, tensors)):
        origin = subclasses.among((x, *tensors))
        if origin:
            rest = (momentum, deferred, group)
            found: Tensor | DeferredMap = subclasses.through(
                run_on_map, origin, x, options, tensors, *rest
            )
            return found
    short = direct(x, *tensors)
    how = _recipe(short, x, None, None, (), options, tensors)
    kind, plan, kernels = how.kind, how.plan, how.kernels
    tail = _tail(how, momentum, tensors, group)
    if kernels is None:
        v = layout_of(x, tail.eager(x))
        return _identity(v) if deferred else v
    stats = None
    if kind.uses_input:
        stats = pointwise.moments(x, tail.pre(None, x), kind.pre_activation, plan, short)
    coef = tail.coefficients(x, None, stats, kernels, short)
    if deferred:
        return DeferredMap(x, coef, kind.activation, plan)
    return pointwise.materialise(x, coef, kind.activation, plan, short)


def _tail(
    how: recipe.Recipe, momentum: float, tensors: TailTensors, group: dist.ProcessGroup | None
) -> Tail:
    slope = tensors[7]
    if slope is not None and how.kind.activation_first and how.kernels is not None:
        # cast once for moments and coefficients: the gradients by both ways may nearly cancel, and must not be
        # rounded to the parameter's type before they are added
        slope = slope.to(torch.float64 if how.kind.wide else torch.float32)
        tensors = (*tensors[:7], slope)
    return Tail(how.kind, momentum, *tensors, group=group)


def _recipe(
    known: bool,
    raw: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    geometry: recipe.Geometry,
    options: Options,
    tensors: TailTensors,
) -> recipe.Recipe:
    """How a call is served; the checks run once for each form of call whose tensors are ``direct``."""
    key = None
    if known:
        key = geometry, options, backends.forced(), *_forms((raw, weight, bias, *tensors))
        found = recipe.find(key)
        if found is not None:
            return found
    if weight is None:
        made = recipe.of_map(raw, options, tensors)
    else:
        made = recipe.of_convolution(raw, weight, bias, geometry, options, tensors)
    if known:
        recipe.keep(key, made)
    return made


def _forms(tensors: Sequence[Tensor | None]) -> tuple[object, ...]:
    """What of some tensors decides how they are served."""
    return tuple([(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in tensors])


def _plain(activation: str, tensors: TailTensors) -> bool:
    """Whether neither FiLM nor dropout nor an activation is asked for."""
    return activation == "none" and all(t is None for t in tensors[4:7])


def _identity(v: Tensor) -> DeferredMap:
    return DeferredMap(v, None, "none", "reference/eager")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast_dtype(raw: Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is on and changes a map like this one."""
    if isinstance(raw, Tensor) and raw.dtype != torch.float64 and not raw.is_meta:
        device = raw.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def _cast(weight: Tensor, dtype: torch.dtype, prepared: PreparedWeight | None) -> Tensor:
    """``weight`` in autocast's dtype; in inference on a CPU the one that was prepared."""
    kept = prepared is not None and not torch.is_grad_enabled() and weight.dtype != dtype
    if kept and weight.device.type == "cpu" and direct(weight) and dense(weight):
        assert prepared is not None
        return prepared.cast(weight, dtype)
    return weight.to(dtype)
