"""``python -m fastfilm check``: is what runs on this machine right?

Every available backend and route computes blocks, outputs and gradients, beside PyTorch's own layers at the same
type; both are compared with float64. A block may err 1.5 times as much as PyTorch, plus one ulp of its type; in
float64, where PyTorch is the measure, 1000 ulp. Products of float32 are IEEE float32, whatever the caller has set;
where a GPU multiplies them as TF32 if that is allowed, a row of its own allows it, with a fixed bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .machine import devices, gpu_is_lost, section, versions
from .ops import add_act, choice, conv_norm_film, settings
from .ops.choice import BACKENDS, Backend
from .ops.maps import Map, interpolate, join, max_pool
from .ops.spec import precision

DRAWS = 8
"""Draws of the inputs; PyTorch's error is its largest over them, since that of a short sum is itself random."""


@dataclass(frozen=True)
class Case:
    """A block behind another one whose output it reads unwritten."""

    size: tuple[int, ...]
    channels: tuple[int, int]
    norm: str | None
    order: str
    activation: str
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    batch: int = 2
    training: bool = True
    between: str = ""
    """What happens to the unwritten map: "max pool", "concatenation" (with itself, resized) or "residual"."""

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        parts = [f"{self.batch}x{self.channels[0]}->{self.channels[1]} {size}"]
        parts.append(f"k{self.kernel} s{self.stride}")
        parts += [f"g{self.groups}"] if self.groups > 1 else []
        parts += [self.norm or "no norm", self.activation, self.order.removeprefix("conv-")]
        parts += [f"behind {self.between}"] if self.between else []
        return " ".join(parts) + ("" if self.training else " eval")


FIRST, MIDDLE, LAST = "conv-norm-film-act", "conv-norm-act-film", "conv-act-norm-film"
CASES = (
    Case((7, 5), (3, 1), "batch", LAST, "silu"),
    Case((5, 4, 3), (1, 3), "instance", MIDDLE, "leaky_relu"),
    Case((13, 9), (3, 33), "group", FIRST, "silu", stride=2),
    Case((9, 8), (33, 3), None, FIRST, "relu", kernel=1),
    Case((9, 7), (1, 33), "layer", LAST, "gelu"),
    Case((8, 8), (33, 33), "batch", MIDDLE, "elu", training=False),
    Case((1, 7), (3, 3), "instance", LAST, "prelu"),
    Case((12, 10), (4, 6), "batch", FIRST, "gelu_tanh", groups=2),
    Case((33, 17), (3, 33), "batch", LAST, "relu", batch=3),
    Case((7, 6, 5), (3, 33), "batch", LAST, "relu", stride=2),
    Case((6, 5, 7), (33, 1), "group", FIRST, "silu", kernel=1),
    Case((5, 5, 5), (3, 3), "layer", MIDDLE, "gelu"),
    Case((9, 9, 8), (4, 8), "instance", LAST, "relu", kernel=5),
    Case((9, 10), (3, 5), "batch", LAST, "relu", between="max pool"),
    Case((8, 6), (17, 3), "instance", MIDDLE, "relu", between="concatenation"),
    Case((5, 4, 6), (3, 4), "instance", FIRST, "relu", between="residual"),
)
TENSOR_FLOAT = Case((16, 12), (16, 16), "instance", FIRST, "none"), 1e-3
"""The block that runs with TF32 allowed, and its bound: operands cut off behind ten bits err 8e-4 in it."""
INTERPRETED = (replace(CASES[0], channels=(3, 2)), CASES[1], CASES[-1])
"""All that Triton's interpreter is given."""


class Row(NamedTuple):
    """One line of the report; the errors are those of the tensor that comes nearest to its bound."""

    backend: str
    route: str
    case: str
    dtype: str
    error: str
    eager: str
    status: str


HEAD = Row("backend", "route", "case", "type", "error", "eager's", "status")


_WIDEST = (
    max(BACKENDS, key=len),
    "composed",
    max(map(str, CASES + INTERPRETED), key=len),
    "bfloat16",
    "1.0e-05",
    "eager's",
)
"""The widest cell of each column but the last."""


def _line(row: Row) -> str:
    cells = [f"{cell:<{len(w)}}" for cell, w in zip(row, _WIDEST, strict=False)]
    return "  ".join([*cells, row.status])


def report(quick: bool = False) -> int:
    """Prints the table row by row; 0 if everything is within its bound, else 1."""
    began = time.perf_counter()
    machine = [*versions(), *devices()]
    print(section("machine", machine, max(len(name) for name, _ in machine)) + "\n")
    for name, reason, _ in choice.describe():
        if reason is not None:
            print(f"{name}: not checked, {reason}")
    if settings.left_out.entries:
        print(f"left out by FASTFILM_WITHOUT: {settings.left_out.said()}")
    # flushed: a run that is cut has shown what it found
    print(_line(HEAD), flush=True)
    count = wrong = left_out = 0
    for row in check(quick):
        print(_line(row), flush=True)
        count += 1
        left_out += row.status.startswith(LEFT_OUT)
        wrong += row.status != "ok" and not row.status.startswith(LEFT_OUT)
        if wrong and gpu_is_lost():
            print("the GPU does nothing more for this process: the other rows are not checked")
            break
    seconds = time.perf_counter() - began
    print(f"\n{count} checks, {wrong} wrong, {seconds:.0f} s")
    if left_out:
        print(f"{left_out} left out by FASTFILM_WITHOUT")
    return 1 if wrong else 0


LEFT_OUT = "left out"


def check(quick: bool = False) -> Iterator[Row]:
    """The rows of the report."""
    for b in BACKENDS.values():
        if b.unavailable() is not None:
            continue
        for device in _devices(b):
            cases: Sequence[Case] = CASES[:3] if b.name == "reference" else CASES
            few = quick or (b.name == "triton" and device == "cpu")
            if few:
                some = (*cases[:3], *(c for c in cases if c.between))
                cases = INTERPRETED if b.name == "triton" and device == "cpu" else some
            dtypes = [t for t in b.dtypes if t in _QUICK or not few]
            for case in cases:
                for dtype in dtypes:
                    for route in _routes(b, case):
                        yield _row(b.name, route, case, dtype, device)
            if device == "cuda" and "fused" in _routes(b, TENSOR_FLOAT[0]):
                yield _row(b.name, "fused", TENSOR_FLOAT[0], torch.float32, device, TENSOR_FLOAT[1])


_QUICK = (torch.float32, torch.bfloat16)


def _devices(b: Backend) -> list[str]:
    if b.name == "triton":
        return ["cpu"] if choice.interpreting() else ["cuda"]
    return [d for d in b.devices if d == "cpu" or torch.cuda.is_available()]


def _routes(b: Backend, case: Case) -> list[str]:
    if b.name == "reference":
        return ["eager"]
    fused = b.fused is not None and case.groups == 1 and case.kernel in b.fused.kernel_sizes
    return ["fused", "composed"] if fused else ["composed"]


def _row(
    name: str,
    route: str,
    case: Case,
    dtype: torch.dtype,
    device: str,
    tf32: float | None = None,
) -> Row:
    """One row; ``tf32``: the bound where TF32 is allowed."""
    short = str(dtype).removeprefix("torch.") if tf32 is None else "tf32"
    try:
        with precision.float32_products(tf32 is not None):
            error, eager, bound = _errors(name, route, case, dtype, device, tf32)
    except Exception as failure:  # whatever a backend does, the others are checked
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        missing = isinstance(failure, NotImplementedError) and "FASTFILM_WITHOUT" in reason
        status = LEFT_OUT if missing else f"FAILED: {reason[:120]}"
        return Row(name, route, str(case), short, "-", "-", status)
    # a NaN is above every bound
    status = "ok" if error <= bound else f"WRONG: above {bound:.1e}"
    return Row(name, route, str(case), short, f"{error:.1e}", f"{eager:.1e}", status)


def _errors(
    name: str, route: str, case: Case, dtype: torch.dtype, device: str, fixed: float | None = None
) -> tuple[float, float, float]:
    """Error, PyTorch's error and the bound (``fixed``, or PyTorch's), of the tensor that is worst against it."""
    ours = _run(case, 0, name, route, dtype, device)
    exact = [_run(case, i, "reference", None, torch.float64, "cpu", dtype) for i in range(DRAWS)]
    eager = [_run(case, i, "reference", None, dtype, device) for i in range(DRAWS)]
    scales = [max(t.norm().item() for t in values.values()) for values in exact]
    worst = (0.0, 0.0, 1.0)
    for key, value in ours.items():
        theirs = max(
            _error(e[key], x[key], scale) for e, x, scale in zip(eager, exact, scales, strict=True)
        )
        ulp = torch.finfo(dtype).eps
        bound = fixed or (1000 * ulp if dtype == torch.float64 else 1.5 * theirs + ulp)
        found = (_error(value, exact[0][key], scales[0]), theirs, bound)
        if not found[0] <= found[2]:
            return found
        if found[0] / found[2] >= worst[0] / worst[2]:
            worst = found
    return worst


def _error(value: Tensor, exact: Tensor, scale: float) -> float:
    """Norm-relative error; values that are small against ``scale`` are measured against a part of it.

    The gradient of a bias in front of a norm is 0, and what rounding leaves of it has no digits to compare.
    """
    if value.shape != exact.shape:
        raise ValueError(f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}")
    norm = max(exact.norm().item(), 1e-2 * scale)
    difference = (value.detach().cpu().double() - exact.detach()).norm().item()
    return difference / norm if norm > 0 else difference


def _run(
    case: Case,
    seed: int,
    name: str,
    route: str | None,
    dtype: torch.dtype,
    device: str,
    storage: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output, gradients and running statistics; x and weights are rounded to ``storage`` first."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rounded(t: Tensor) -> Tensor:
        return t.to(storage or dtype).to(dtype)

    def vector(*shape: int) -> Tensor:
        # float32 numbers in every type: those of the float64 run are the same
        numbers = draw(*shape)
        return numbers.to(small if (storage or dtype) == torch.float64 else torch.float32).to(small)

    (ci, co), kernel, dims = case.channels, case.kernel, len(case.size)
    width = 2 * ci if case.between == "concatenation" else ci
    leaves: dict[str, Any] = {
        "x": rounded(draw(case.batch, ci, *case.size)),
        "weight": rounded(0.3 * draw(co, width // case.groups, *[kernel] * dims)),
        "bias": vector(co),
        "gamma": vector(case.batch, co),
        "beta": vector(case.batch, co),
    }
    if case.norm is not None:
        leaves |= {"norm_weight": vector(co), "norm_bias": vector(co)}
    if case.activation == "prelu":
        leaves["slope"] = vector(co).abs()
    inner = rounded(0.5 * draw(ci, ci, *[1] * dims)).to(device)
    film = vector(case.batch, ci).to(device), vector(case.batch, ci).to(device)
    leaves = {k: v.to(device).requires_grad_() for k, v in leaves.items()}
    options: dict[str, Any] = {
        "stride": case.stride,
        "padding": kernel // 2,
        "groups": case.groups,
        "norm": case.norm,
        "num_groups": 1 if case.norm == "group" and co % 3 else 3 if case.norm == "group" else None,
        "activation": case.activation,
        "order": case.order,
        "training": case.training,
    }
    running: dict[str, Any] = {}
    if case.norm == "batch":
        running = {"running_mean": vector(co), "running_var": vector(co).abs() + 0.5}
        running = {k: v.to(device) for k, v in running.items()}
    with choice.backend(name, route):
        x: Map = conv_norm_film(
            leaves["x"],
            inner,
            gamma=film[0],
            beta=film[1],
            activation="silu",
            order="conv-norm-act-film",
            deferred=True,
        )
        x = _between(case.between, x, leaves["x"])
        others: dict[str, Any] = {k: v for k, v in leaves.items() if k != "x"}
        v = conv_norm_film(x, **others, **running, **options)
        assert isinstance(v, Tensor)
        weights = torch.cos(torch.arange(v.numel(), dtype=torch.float64)).reshape(v.shape)
        loss = (v * weights.to(device, v.dtype)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
    gradients = {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    return {"output": v.detach(), **gradients, **running}


def _between(kind: str, x: Map, image: Tensor) -> Map:
    """The map that the block reads; ``x`` is the one behind the first block."""
    if kind == "max pool":
        return max_pool(x, 2)
    if kind == "concatenation":
        return join([interpolate(x, size=tuple(x.shape[2:])), x])
    return add_act(x, image, "silu") if kind == "residual" else x
