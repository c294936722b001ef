"""What ``smoke`` runs: every launcher of a family of kernels on small awkward maps, against float64.

    python -m benchmarks.counted.kernel_checks cuda:fprop:bfloat16,cuda:dgrad:bfloat16 --device cuda --few

runs checks in this process, for a tool that watches it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfilm.ops import spec
from fastfilm.ops.choice import BACKENDS
from fastfilm.ops.launchers import eager
from fastfilm.ops.spec import (
    Addends,
    Geometry,
    Gradient,
    Kind,
    NormInput,
    Output,
    Source,
    TailTensors,
    views,
)
from fastfilm.tuning import facts, measure
from fastfilm.tuning.shapes import Shape

from . import inside, verdicts
from .processes import follow_parent

Check = Callable[[Any, str, torch.dtype], float | None]
"""Launchers, device and type -> the largest norm-relative error; None where there is no such kernel."""

SIZES = (
    ((24, 40), 3, 1, (9, 13)),
    ((16, 24), 3, 1, (2, 5, 6)),
    ((3, 64), 3, 2, (8, 6)),
    ((40, 8), 1, 1, (5, 7)),
)
"""Channels, kernel, stride and output of the convolutions: whole tiles and parts of some, 2D and 3D."""

SM90_SIZES = (
    ((24, 40), 3, 1, (18, 13), 16),
    ((48, 32), 3, 1, (3, 5, 9), 0),
    ((16, 24), 3, 2, (9, 11), 0),
    ((40, 72), 1, 1, (11, 19), 8),
    ((48, 96), 3, 1, (2, 17, 10), 32),
    ((16, 8), 3, 2, (2, 5, 6), 0),
    ((8, 24), 1, 1, (3, 6, 7), 0),
    ((33, 70), 3, 1, (11, 9), 0),
    ((200, 130), 3, 1, (20, 9), 0),
    ((32, 32), 3, 1, (288, 256), 0),
    ((16, 16), 3, 1, (8, 128, 144), 0),
)
"""The same for warpgroup products, and the channels of the first of two sources, 0: there is one.

Channels that do not lie on 16 bytes, weights that do not stay in shared memory, and maps of more units than an
H200 has multiprocessors, so that blocks of threads have several.
"""

FEW = 3
"""So many of them are enough where kernels are emulated, interpreted or watched, which takes long."""


_most: int | None = None


def rows(
    keys: Sequence[str], device: str, library: str | None = None, few: bool = False
) -> Iterator[dict[str, Any]]:
    """A row for each check, in order; on ``few`` maps only."""
    global _most
    _most = FEW if few or device == "cpu" else None
    # float32 is compared with float32's own bound
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    backend = keys[0].split(":")[0]
    reason = why_not(backend, library)
    if reason is not None:
        yield from ({"check": key, "status": verdicts.SKIPPED, "note": reason} for key in keys)
        return
    with launchers(backend, library) as kernels:
        for key in keys:
            family = key.split(":")[1]
            yield verdicts.judged(key, lambda dtype, f=family: check(kernels, f, device, dtype))


def why_not(backend: str, library: str | None) -> str | None:
    """Why there is nothing to check of a backend; None if there is."""
    if backend == "cuda" and library:
        return None if Path(library).exists() else f"there is no {Path(library).name}"
    return BACKENDS[backend].unavailable()


@contextlib.contextmanager
def launchers(backend: str, library: str | None) -> Iterator[Any]:
    """The launchers of a backend, all of them, those of "cuda" on the emulation if a library of it is given."""
    with inside.nothing_left_out(), _launchers(backend, library) as kernels:
        yield kernels


@contextlib.contextmanager
def _launchers(backend: str, library: str | None) -> Iterator[Any]:
    if backend == "cuda" and library:
        from . import emulation

        with emulation.installed(emulation.load(Path(library))) as kernels:
            yield kernels
    else:  # themselves, also where FASTFILM_WITHOUT leaves some out
        name = "fastfilm.ops.launchers.cuda.kernels" if backend == "cuda" else "fastfilm.kernels"
        yield importlib.import_module(name)


def check(kernels: Any, family: str, device: str, dtype: str) -> float | None:
    """The largest error of a family's launchers."""
    with measure.poisoned():
        return CHECKS[family](kernels, device, getattr(torch, dtype))


def _worst(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """The largest norm-relative error; infinite where a value is missing, not finite or of another shape.

    A value that is small beside the others, such as a gradient that is 0, is measured against a part of theirs.
    """
    errors = [0.0]
    scale = max((float(t.norm()) for t in exact if t is not None), default=0.0)
    for ours, true in zip(found, exact, strict=True):
        if true is None:
            continue
        if ours is None or ours.shape != true.shape or not bool(torch.isfinite(ours).all()):
            return float("inf")
        difference = (ours.cpu().double() - true).norm()
        errors.append(float(difference) / max(float(true.norm()), 1e-2 * scale, 1e-300))
    return max(errors)


def _shape(size: tuple[Any, ...], dtype: torch.dtype) -> Shape:
    channels, kernel, stride, output = size
    return Shape(dtype, 2, channels, kernel, stride, output)


def _given(shape: Shape, device: str, seed: int) -> tuple[facts.Given, measure.Results]:
    """A shape's tensors, and its exact results, which the host computes: nothing else runs on the device."""
    given = facts.tensors(shape, "cpu", seed)
    exact = measure.definition(shape, torch.float64, given)
    return facts.Given(*(t.to(device) for t in given)), exact


def _convolution(family: str) -> Check:
    def run(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
        reads = getattr(kernels, "reads_sources", False)
        errors = []
        for size in SIZES[:_most]:
            shape = _shape(size, dtype)
            given, exact = _given(shape, device, seed=1)
            if reads:
                with inside.multiplying("mma"):
                    found = _by_sources(kernels, family, shape, given)
            else:
                found = facts.call(kernels, shape, None, given, family=family)
            errors.append(_error(family, found, exact))
        return max(errors)

    return run


def _by_warpgroups(family: str) -> Check:
    """The same of the kernels of sm_90, which have to be the ones that run."""

    def run(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
        if "wgmma" not in inside.instructions(dtype):
            return None
        errors = []
        for *size, first in SM90_SIZES[:_most]:
            shape = _shape(tuple(size), dtype)
            facts_of = dtype, shape.batch, shape.channels, shape.size, shape.kernel, shape.stride
            by = inside.instruction_of(family, *facts_of)
            if by != "wgmma":
                raise RuntimeError(f"{family} of {shape} multiplies by {by}")
            given, exact = _given(shape, device, seed=1)
            with inside.multiplying("wgmma"):
                found = _by_sources(kernels, family, shape, given, first)
            errors.append(_error(family, found, exact))
        return max(errors)

    return run


def _error(family: str, found: Sequence[Tensor | None], exact: Mapping[str, Tensor]) -> float:
    names = [n for n in measure.NAMES[family] if n in exact]
    return _worst(found[: len(names)], [exact[n] for n in names])


def _by_sources(
    kernels: Any, family: str, shape: Shape, given: facts.Given, first: int = 0
) -> tuple[Tensor | None, ...]:
    """What ``facts.call`` gives, from launchers that take a convolution's operands as structs.

    Args:
        first: channels of the first of two sources; 0: there is one.
    """
    x, weight, e, coef, bias, pre = given
    stride, padding = (shape.stride,) * shape.dims, (shape.padding,) * shape.dims
    geometry = Geometry.ordinary(stride, padding)
    sources = [_source(shape, x, coef, part) for part in _parts(x.shape[1], first)]
    if family == "fprop":
        norm_input = NormInput(pre, facts.ACT)
        found: tuple[Tensor | None, ...] = kernels.fprop(
            sources, weight, bias, geometry, norm_input
        )
        return found
    if family == "dgrad":
        outputs = [Output(s.raw.shape[1], *s[:3]) for s in sources]
        gradients = kernels.dgrad(Gradient(e), weight, outputs, x.shape[2:], geometry)
        dx = torch.cat([dx for dx, _ in gradients], dim=1)
        dcoef = [d for _, d in gradients if d is not None]
        return dx, torch.cat(dcoef, dim=2) if dcoef else None
    return kernels.wgrad(Gradient(e), sources, weight, geometry)[:1]


def _parts(channels: int, first: int) -> list[slice]:
    return [slice(first), slice(first, channels)] if first else [slice(channels)]


def _source(shape: Shape, x: Tensor, coef: Tensor, channels: slice) -> Source:
    """Some channels of a map, with what is pending on them."""
    raw = x[:, channels].contiguous(memory_format=spec.channels_last_format(x.dim()))
    if not shape.affine:
        return Source(raw)
    return Source(raw, coef[:, :, channels].contiguous(), facts.ACT)


def _pack(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
    """A weight in another layout is the same weight; small integers make every sum exact."""
    errors = []
    for size in SIZES[:_most]:
        shape = _shape(size, dtype)
        x, weight, *_ = facts.tensors(shape, "cpu", seed=3)
        x, weight = (4 * x).round().clamp(-2, 2), (40 * weight).round().clamp(-2, 2)
        stride, padding = (shape.stride,) * shape.dims, (shape.padding,) * shape.dims
        exact = torch.nn.functional.conv2d if shape.dims == 2 else torch.nn.functional.conv3d
        true = exact(x.double(), weight.double(), None, stride=shape.stride, padding=shape.padding)
        x = x.to(device)
        for layout in (weight.contiguous(), spec.channels_last(weight)):
            w = layout.to(device)
            with inside.multiplying("mma"):
                y, _ = kernels.fprop([Source(x)], w, None, Geometry.ordinary(stride, padding))
            errors.append(_worst([y], [true]))
    return max(errors)


def _draw(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers; maps channels-last in ``dtype``, everything else float32."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    t = spec.channels_last(t).to(dtype) if len(shape) > 3 else t
    return t.to(device)


def _wide(values: Sequence[Any]) -> list[Any]:
    """Arguments on the host in float64."""
    return [
        v.cpu().double()
        if isinstance(v, Tensor) and v.is_floating_point()
        else type(v)(_wide(v))
        if type(v) in (tuple, list)
        else type(v)(*_wide(v))
        if isinstance(v, tuple)  # a struct
        else v
        for v in values
    ]


def _against_plain(kernels: Any, name: str, arguments: Sequence[Any]) -> float:
    """A launcher beside PyTorch's form of it in float64."""
    exact = getattr(eager, name)(*_wide(arguments))
    found = getattr(kernels, name)(*arguments)
    if isinstance(exact, Tensor):
        exact, found = [exact], [found]
    return _worst(list(found), list(exact))


MAPS = ((2, 5, 9, 7), (2, 32, 4, 6, 5))


def _coef(device: str, n: int, c: int, seed: int) -> Tensor:
    coef = _draw(device, torch.float32, 7, n, c, seed=seed)
    coef[spec.SLOPE] = coef[spec.SLOPE].abs()
    return coef


def _pointwise(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
    errors = []
    for size, act in zip(MAPS, ("silu", "leaky_relu"), strict=True):
        y, dv = (_draw(device, dtype, *size, seed=s) for s in (1, 2))
        coef = _coef(device, *size[:2], seed=3)
        errors.append(_against_plain(kernels, "apply", (y, coef, act)))
        errors.append(_against_plain(kernels, "apply_backward", (dv, y, coef, act)))
    return max(errors)


def _moments(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
    errors = []
    for size in MAPS:
        y, dy = (_draw(device, dtype, *size, seed=s) for s in (1, 2))
        pre = _draw(device, torch.float32, 2, size[1], seed=3).abs()
        dstats = _draw(device, torch.float32, 2, *size[:2], seed=4)
        errors.append(_against_plain(kernels, "moments", (y, pre, "leaky_relu")))
        stats = eager.moments(*_wide((y, pre)), "leaky_relu").float().to(device)
        arguments = (dy, dstats, y, stats, pre, "leaky_relu")
        errors.append(_against_plain(kernels, "moments_backward", arguments))
    return max(errors)


def _taps(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
    errors = []
    for size in MAPS:
        n, c, *inner = size
        dims = len(inner)
        coef = _coef(device, n, c, seed=3)
        # whole numbers, each once a channel: rounding must not decide which is the largest
        order = _draw("cpu", torch.float32, *size, seed=1).flatten(2).argsort(-1)
        y = spec.channels_last((order - order.shape[-1] // 2).reshape(size).to(dtype)).to(device)
        twice = views.resizing("linear", tuple(inner), tuple(2 * i for i in inner), None, False)
        pool = views.pooling("max", tuple(inner), (2,) * dims, (2,) * dims, (0,) * dims)
        for view in (twice, pool):
            assert view is not None
            maximum = view.kind == "max"
            shape = (n, c + 3, *view.size)
            taps = views.taps(view, tuple(inner), False, y.device)
            source = Source(*_wide((y, coef)), "relu", view)
            found = _draw(device, dtype, *shape, seed=5)
            exact = found.cpu().double()
            kernels.gather_taps(y, coef, "relu", taps, maximum, found, 3)
            eager.gather(source, exact, 3)
            errors.append(_worst([found], [exact]))
            back = views.taps(view, tuple(inner), not maximum, y.device)
            dout = _draw(device, dtype, *shape, seed=6)
            ours = kernels.gather_taps_backward(dout, 3, y, coef, "relu", back, maximum)
            theirs = eager.gather_backward(dout.cpu().double(), 3, source)
            errors.append(_worst(list(ours), list(theirs)))
    return max(errors)


def _residual(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
    errors = []
    for size in MAPS:
        y, other, dv = (_draw(device, dtype, *size, seed=s) for s in (1, 2, 3))
        coef, other_coef = (_coef(device, *size[:2], seed=s) for s in (4, 5))
        slope = _draw(device, torch.float32, size[1], seed=6).abs()
        for inner, outer in (("silu", "none"), ("none", "leaky_relu")):
            sloped = slope if inner == "none" else None
            addends = Addends(y, coef, inner, other, other_coef, sloped, outer)
            errors.append(_against_plain(kernels, "residual", (addends,)))
            errors.append(_against_plain(kernels, "residual_backward", (dv, addends)))
    return max(errors)


def _coefficients(kernels: Any, device: str, dtype: torch.dtype) -> float | None:
    """The algebra of a block is float32 whatever the maps are."""
    if dtype != torch.float32:
        return None
    errors = []
    for norm in ("batch", "instance"):
        n, c = 3, 33
        rest: Any = (1e-5, 0.0, n, c, 60, False, True, True, False)
        kind = Kind(norm, "silu", "conv-norm-film-act", "end", 1, *rest)
        stats = _draw(device, dtype, 2, n, c, seed=1).abs()
        vectors = [_draw(device, dtype, c, seed=s) for s in (2, 3, 4)]
        film = [_draw(device, dtype, n, c, seed=s) for s in (5, 6)]
        tensors = TailTensors(None, None, stats, *vectors, *film)
        if not kernels.covers_block(kind):
            return float("inf")
        wide = TailTensors(*_wide(tensors))
        wide_kind = Kind(norm, "silu", kind.order, "end", 1, *rest[:5], True, True, True, False)
        found = kernels.block_coefficients(kind, 0.1, tensors, stats.device)
        host = torch.device("cpu")
        exact = eager.block_coefficients(wide_kind, 0.1, wide, host)
        errors.append(_worst([found], [exact]))
        dcoef = _draw(device, dtype, 7, n, c, seed=7)
        wanted = [t is not None for t in tensors]
        found = kernels.block_coefficients_backward(kind, tensors, dcoef, wanted)
        exact_back = eager.block_coefficients_backward(
            wide_kind, wide, dcoef.cpu().double(), wanted
        )
        errors.append(_worst(found, exact_back))
    return max(errors)


CHECKS: dict[str, Check] = {
    **{family: _convolution(family) for family in inside.KERNELS},
    **{f"{verdicts.SM90}{family}": _by_warpgroups(family) for family in inside.KERNELS},
    "pack": _pack,
    "pointwise": _pointwise,
    "moments": _moments,
    "taps": _taps,
    "residual": _residual,
    "coefficients": _coefficients,
}
"""Family -> its check."""


def main() -> int:
    """0 if all is right, else 1."""
    p = argparse.ArgumentParser(prog="benchmarks.counted.kernel_checks")
    p.add_argument("checks", help="BACKEND:FAMILY:DTYPE with commas, of one backend")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument(
        "--library", help="the CUDA kernels built for a CPU (benchmarks/counted/emulation.py)"
    )
    p.add_argument("--few", action="store_true", help="on fewer maps")
    args = p.parse_args()
    follow_parent()
    wrong = 0
    for row in rows(args.checks.split(","), args.device, args.library, args.few):
        print(json.dumps(row), flush=True)
        wrong += row["status"] in verdicts.BAD
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
