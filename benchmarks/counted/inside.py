"""What the benchmarks ask of the package's inside, by a small function each; no other room looks there.

The room ``counted`` is the only one that imports ``fastfilm.ops``, ``fastfilm.kernels`` or a private name.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

import fastfilm
from fastfilm import check
from fastfilm.ops import choice, maps, reference, spec
from fastfilm.ops.maps import Map as Map
from fastfilm.ops.settings import left_out
from fastfilm.ops.spec import Geometry, Plan
from fastfilm.ops.spec.precision import float32_products as float32_products

COEF_ROWS = spec.COEF_ROWS
"""Rows of the coefficients [COEF_ROWS, N, C] that are pending on a map."""

INSTRUCTIONS = {"wgmma": "always", "mma": "never"}
"""Instruction by which CUDA convolutions multiply -> when those of warpgroups are taken."""

HOPPER = (90, 2, 232448)
"""What the emulation stands in for where it multiplies by warpgroups: capability, multiprocessors, bytes."""

KERNELS = {"fprop": "forward", "dgrad": "backward", "wgrad": "weight"}
"""CUDA convolution -> its name in the extension."""


def defined_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> Tensor:
    """A convolution of a map [N, C, *S] by fastfilm's definition, in the type of its arguments."""
    dims = x.dim() - 2
    return reference.convolution(
        x, weight, bias, Geometry.ordinary((stride,) * dims, (padding,) * dims)
    )


def defined_map(raw: Tensor, coef: Tensor | None, act: str) -> Tensor:
    """A map [N, C, *S] with what is pending on it applied, by fastfilm's definition."""
    return raw if coef is None else reference.materialise(raw, coef, act)


def output_of(v: Tensor | fastfilm.DeferredMap, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The finished map of a block, and the convolution's result y with its bias [C], by the definition."""
    if isinstance(v, Tensor):
        return v, v
    y, biased = v.raw, v.plan is None or v.plan.adds_bias
    if not biased and bias is not None:
        y = y.double() + reference.spread(bias, y.dim()).double()
    return defined_map(v.raw, v.coef, v.act), y


def pending_coefficients(raw: Tensor, slope: float | None) -> Tensor:
    """Coefficients [COEF_ROWS, N, C], float32, of an affine near the identity on a map [N, C, *S].

    Args:
        slope: of a leaky ReLU behind the affine, if there is one.
    """
    n, c = raw.shape[:2]
    coef = torch.zeros(spec.COEF_ROWS, n, c, device=raw.device)
    coef[[spec.A, spec.G]] = 1.0
    coef[spec.A] += 0.1 * torch.randn(n, c, device=raw.device)
    coef[spec.B] = 0.1
    if slope is not None:
        coef[spec.SLOPE] = slope
    return coef


def pending(like: Tensor, raws: Sequence[Tensor], coefs: Sequence[Tensor], act: str) -> list[Map]:
    """Unwritten maps of raw maps and coefficients, with the plan of a pass over a map such as ``like``."""
    plan = choice.for_pass(like)
    return [fastfilm.DeferredMap(r, c, act, plan) for r, c in zip(raws, coefs, strict=True)]


def joined(parts: Sequence[Map]) -> Map:
    """What a convolution reads: of two maps the first, resized to the second's size, in front of the second."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    mode = ("bilinear", "trilinear")[len(first.shape) - 4]
    size = tuple(second.shape[2:])
    return maps.join([maps.interpolate(first, size=size, mode=mode, align_corners=True), second])


def why_not(route: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a route, "backend/route", serves no 1×1 convolution of this type here; None if it does."""
    one = (1, 1)
    request = choice.Request(device, dtype, 2, one, one, one)
    return choice.why_not_plan(Plan.of(route), request)


def why_left_out(family: str, dtype: torch.dtype) -> str | None:
    """Why a family of CUDA kernels is not to be used for a type; None if it may be."""
    return left_out.why_not("cuda", family, dtype)


@contextlib.contextmanager
def nothing_left_out() -> Iterator[None]:
    """All kernels run inside, also those that FASTFILM_WITHOUT names."""
    with patch.object(left_out, "entries", frozenset()):
        yield


def _plans() -> ModuleType:
    """The layouts of the CUDA convolutions, on the extension that is installed now."""
    return importlib.import_module("fastfilm.ops.launchers.cuda.plans")


def _emulated(plans: ModuleType) -> bool:
    return hasattr(plans._CUDA, "set_seed")


def instructions(dtype: torch.dtype) -> tuple[str, ...]:
    """Those by which CUDA convolutions of a type can multiply here; none where the extension is not built."""
    try:
        plans = _plans()
    except ImportError:
        return ()
    hopper = _emulated(plans) or (
        torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    )
    built = "90a" in plans._CUDA.architectures.split(";")
    return tuple(INSTRUCTIONS) if hopper and built and dtype.itemsize == 2 else ("mma",)


@contextlib.contextmanager
def multiplying(by: str) -> Iterator[None]:
    """CUDA convolutions that multiply by "wgmma" wherever such kernels take them, or by "mma" throughout."""
    plans = _plans()
    with contextlib.ExitStack() as stack:
        stack.enter_context(plans.wgmma(INSTRUCTIONS[by]))
        if by == "wgmma" and _emulated(plans):
            stack.enter_context(patch.object(plans, "_device", lambda index: HOPPER))
        yield


def instruction_of(
    kernel: str,
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, ...],
    taps: int,
    stride: int = 1,
    when: str = "always",
) -> str:
    """What a CUDA convolution multiplies by, where warpgroups are taken "always", "never" or "where faster".

    Args:
        kernel: of ``KERNELS``.
        size: spatial size of the input; padding is (taps - 1) / 2.
    """
    plans, padding = _plans(), (taps - 1) // 2
    out = tuple((s + 2 * padding - taps) // stride + 1 for s in size)
    each = [(n,) * len(size) for n in (taps, stride, padding)]
    shape = plans.Shape(dtype, batch, channels, size, out, *each)
    device = HOPPER if _emulated(plans) else plans._device(None)
    return str(plans._plan(shape, device, False, when).facts(KERNELS[kernel])["instruction"])


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors."""
    return choice.interpreting()


def runs_on_cpu(backend: str) -> bool:
    """Whether a backend's kernels, Triton's by the interpreter, run on CPU tensors here."""
    known = choice.BACKENDS[backend]
    ready = known.unavailable() is None and "cpu" in known.devices
    return ready and (backend != "triton" or choice.interpreting())


def calls_of_check() -> Iterator[Callable[[], object]]:
    """All calls by which ``fastfilm check`` launches Triton's kernels, on CPU tensors."""
    triton = check.BACKENDS["triton"]

    def call(case: check.Case, route: str, dtype: torch.dtype) -> None:
        with float32_products(False):
            check._run(case, 0, "triton", route, dtype, "cpu")

    for case in check.CASES:
        for dtype in triton.dtypes:
            for route in check._routes(triton, case):
                yield partial(call, case, route, dtype)
