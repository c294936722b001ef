"""Measurement of a candidate: its result is checked first, and only a correct one is timed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfilm.ops import reference
from fastfilm.ops.operators import convolution
from fastfilm.ops.spec import Geometry

from . import facts
from .shapes import Shape
from .space import Candidate

FACTOR = 1.5
"""How much larger than PyTorch's a candidate's error may be, before one unit in the last place is added."""

LARGE_FACTOR = 4.0
"""The same between two roundings of the large map, neither of which is exact."""

CHECKED = {2: (48, 48), 3: (16, 32, 32)}
"""Largest maps of the exact check: more than one tile each way."""

Results = dict[str, Tensor]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing writes is NaN inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        memory.fill_uninitialized_memory = fill


def reduced(shape: Shape) -> Shape:
    """The shape with few samples and a small map, for the exact check.

    What divides the sizes by 16, and what is 1, stays so: Triton then takes the very binary that is timed.
    """
    output = tuple(
        _alike(o, most, shape.stride)
        for o, most in zip(shape.output, CHECKED[shape.dims], strict=True)
    )
    return replace(shape, batch=_alike(shape.batch, 16), output=output)


def _alike(size: int, most: int, stride: int = 1) -> int:
    """The largest number up to ``most`` that Triton specialises as it does ``size``."""

    def kind(n: int) -> tuple[bool, ...]:
        return n == 1, n % 16 == 0, n * stride % 16 == 0

    return next(n for n in range(min(size, most), 0, -1) if kind(n) == kind(size))


def definition(shape: Shape, dtype: torch.dtype, given: facts.Given) -> Results:
    """All that the kernels give, by PyTorch's operators and autograd in ``dtype``."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = (t.to(dtype).detach().requires_grad_() for t in given[:2])
    e, coef = given.e.to(dtype), given.coef.to(small).detach().requires_grad_()
    v = reference.materialise(x, coef, facts.ACT) if shape.affine else x
    convolve = F.conv2d if shape.dims == 2 else F.conv3d
    y = convolve(v, weight, given.bias.to(dtype), stride=shape.stride, padding=shape.padding)
    leaves = [x, weight, coef] if shape.affine else [x, weight]
    dx, dw, *dcoef = torch.autograd.grad(y, leaves, e)
    stats = reference.moments(y.detach(), given.pre.to(small), facts.ACT)
    found = {"y": y.detach(), "stats": stats, "dx": dx, "dw": dw}
    return found | ({"dcoef": dcoef[0]} if dcoef else {})


NAMES = {"fprop": ("y", "stats"), "dgrad": ("dx", "dcoef"), "wgrad": ("dw",)}


def relative(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖; NaN where the value has any."""
    exact = exact.double()
    norm = float(exact.norm())
    return float((value.double() - exact).norm()) / norm if norm else float(value.double().norm())


class Subject:
    """A shape with its tensors, its exact results on a reduced map, and PyTorch's errors there."""

    def __init__(self, shape: Shape, device: str, full: bool = True) -> None:
        self.shape, self.device = shape, device
        self.kernels = importlib.import_module("fastfilm.kernels")
        self.small = reduced(shape)
        self.small_tensors = facts.tensors(self.small, device, seed=1)
        self.exact = definition(self.small, torch.float64, self.small_tensors)
        eager = definition(self.small, shape.dtype, self.small_tensors)
        self.eager = {name: relative(eager[name], exact) for name, exact in self.exact.items()}
        self.tensors = facts.tensors(shape, device, seed=2) if full else None
        self._large: dict[str, Results] = {}

    def _bound(self, name: str, factor: float) -> float:
        return factor * self.eager[name] + torch.finfo(self.shape.dtype).eps

    def _compare(
        self, found: Mapping[str, Tensor | None], expected: Results, factor: float
    ) -> str | None:
        for name, value in found.items():
            if value is None or name not in expected:
                continue
            error, bound = relative(value, expected[name]), self._bound(name, factor)
            if not error <= bound:  # a NaN is above every bound
                return f"wrong {name}: error {error:.1e}, allowed {bound:.1e}"
        return None

    def why_wrong(self, candidate: Candidate) -> str | None:
        """The error in a candidate's results, on the reduced map or the whole one; None if they are right."""
        names = NAMES[candidate.family]
        with poisoned():
            results = facts.call(self.kernels, self.small, candidate, self.small_tensors)
        reason = self._compare(dict(zip(names, results, strict=False)), self.exact, FACTOR)
        if reason is not None or self.tensors is None:
            return reason
        with poisoned():
            results = facts.call(self.kernels, self.shape, candidate, self.tensors)
        found = dict(zip(names, results, strict=False))
        reason = self._compare(found, self._vendors(candidate.family), LARGE_FACTOR)
        return f"{reason} (whole map)" if reason else None

    def _vendors(self, family: str) -> Results:
        """A family's results on the whole map by the vendor's convolution."""
        if family not in self._large:
            assert self.tensors is not None
            y, stats = self._forward("triton/composed", self.tensors)
            if family == "fprop":
                self._large[family] = {"y": y, "stats": stats}
            else:
                dx, dw, dcoef, _ = self._backward("triton/composed", self.tensors)
                both = {"dgrad": {"dx": dx}, "wgrad": {"dw": dw}}
                if self.shape.affine:
                    both["dgrad"]["dcoef"] = dcoef
                self._large |= both
        return self._large[family]

    def _geometry(self, shape: Shape) -> Geometry:
        return Geometry.ordinary((shape.stride,) * shape.dims, (shape.padding,) * shape.dims)

    def _pending(self, coef: Tensor) -> tuple[Tensor | None, str]:
        return (coef, facts.ACT) if self.shape.affine else (None, "none")

    def _forward(self, plan: str, given: facts.Given) -> tuple[Tensor, Tensor]:
        x, weight, _, coef, bias, pre = given
        tail = (*self._geometry(self.shape), True, plan)
        return convolution.conv(x, weight, bias, *self._pending(coef), pre, facts.ACT, *tail)

    def _backward(
        self,
        plan: str,
        given: facts.Given,
        after: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients behind e; ``after``: gradients of the moments, y and its moments."""
        x, weight, e, coef, _, pre = given
        dstats, y, stats = after or (e.new_empty(0), None, None)
        norm = (pre, facts.ACT) if after else (None, "none")
        head = (e, dstats, x, weight, *self._pending(coef), *norm, y, stats)
        tail = (*self._geometry(self.shape), plan, self.shape.affine or after is None, True)
        return convolution.conv_backward(*head, *tail)

    def why_wrong_plan(self, plan: str) -> str | None:
        """The error in a whole plan's results on the reduced map; None if they are right."""
        # the vendor's convolutions need not have deterministic forms, which poisoning asks for
        with poisoned() if plan.endswith("/fused") else contextlib.nullcontext():
            y, stats = self._forward(plan, self.small_tensors)
            dx, dw, dcoef, _ = self._backward(plan, self.small_tensors)
        found = {"y": y, "stats": stats, "dx": dx, "dw": dw}
        if self.shape.affine:
            found["dcoef"] = dcoef
        return self._compare(found, self.exact, FACTOR)

    def candidate_call(self, candidate: Candidate | None, family: str) -> Callable[[], object]:
        """One launch of a family on the whole map; None: with the tile that the kernel takes by itself."""
        assert self.tensors is not None
        given = self.tensors
        return lambda: facts.call(self.kernels, self.shape, candidate, given, family=family)

    def plan_call(self, plan: str) -> Callable[[], object]:
        """A training step of this layer by a plan: forward, then backward with the moments' gradients."""
        assert self.tensors is not None
        given = self.tensors
        e = given.e
        dstats = 1e-3 * torch.randn(2, *e.shape[:2], device=e.device)

        def call() -> object:
            y, stats = self._forward(plan, given)
            return self._backward(plan, given, (dstats, y, stats))

        return call
