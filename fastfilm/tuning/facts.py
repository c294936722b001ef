"""Static facts of a candidate: it is compiled for the target without a launch, so that unsuitable ones never run.

The launcher itself says what it would launch: it is called with tensors that have no memory, and its kernel is
replaced by something that notes the grid and the arguments.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from fastfilm.ops import spec
from fastfilm.ops.launchers.tiles import config

from . import cost
from .binary import SHARED_LIMIT, read_binary, resident
from .shapes import Shape
from .space import RANKED, Candidate, estimated

ACT = "relu"
"""The activation, in front of the norm and pending on the input."""

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Facts:
    """Facts of a candidate that are known before it runs.

    Attributes:
        stack: bytes of local memory, that is spills.
        shared: bytes of shared memory of a program.
        matrix: matrix instructions in the binary.
        programs: of one launch; resident: of them on a multiprocessor at a time.
        l2: bytes through the L2 by the cost model.
        fault: why the candidate must not run; "" if it may.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    matrix: int = 0
    programs: int = 0
    resident: int = 0
    l2: int = 0
    fault: str = ""

    def waves(self, processors: int) -> float:
        """How often the programs fill the GPU."""
        return cost.waves(self.programs, processors, max(self.resident, 1))


class _Launched(Exception):
    """Ends a launcher where it would launch."""


class _Noting:
    """Stands in for a kernel: notes the launch and ends it."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.given: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            self.grid, self.given, self.named = grid, args, named
            raise _Launched

        return launch


def launch_of(shape: Shape, candidate: Candidate) -> tuple[Any, _Noting]:
    """The kernel that a launcher takes, and what it would launch it with."""
    module = importlib.import_module(f"fastfilm.kernels.conv_{candidate.family}")
    name = f"{candidate.family}_kernel"
    kernel, noting = getattr(module, name), _Noting()
    with patch.object(module, name, noting):
        try:
            call(module, shape, candidate, tensors(shape, "meta"))
        except _Launched:
            return kernel, noting
    raise RuntimeError(f"{module.__name__} launched no {name}")


class Given(NamedTuple):
    """Inputs of a layer's kernels: e is the gradient at the raw output, coef what is pending on x.

    The norm behind it is the paper's, with the statistics of act(y + shift): ``pre`` is shift and slope. It is
    the form that needs most registers.
    """

    x: torch.Tensor
    weight: torch.Tensor
    e: torch.Tensor
    coef: torch.Tensor
    bias: torch.Tensor
    pre: torch.Tensor


def tensors(shape: Shape, device: str, seed: int = 0) -> Given:
    """Random numbers of the shape's sizes and types; on "meta" none."""
    (ci, co), k = shape.channels, shape.kernel

    def map_(channels: int, size: Iterable[int], generator: Any) -> torch.Tensor:
        t = torch.empty(
            (shape.batch, channels, *size),
            dtype=shape.dtype,
            device=device,
            memory_format=spec.channels_last_format(shape.dims + 2),
        )
        return t if device == "meta" else t.normal_(generator=generator)

    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    x = map_(ci, shape.size, generator)
    e = map_(co, shape.output, generator)
    weight = torch.empty(
        (co, ci, *[k] * shape.dims),
        dtype=shape.dtype,
        device=device,
        memory_format=spec.channels_last_format(shape.dims + 2),
    )
    coef = torch.zeros((spec.COEF_ROWS, shape.batch, ci), device=device)
    bias = torch.zeros(co, dtype=shape.dtype, device=device)
    pre = torch.zeros((2, co), device=device)
    if device != "meta":
        bias.normal_(0.0, 0.1, generator=generator)
        pre[0].normal_(0.0, 0.1, generator=generator)
        weight.normal_(std=(ci * k**shape.dims) ** -0.5, generator=generator)
        coef[spec.A].normal_(1.0, 0.2, generator=generator)
        coef[spec.B].normal_(0.0, 0.2, generator=generator)
        coef[spec.G].normal_(1.0, 0.3, generator=generator)
        coef[spec.S].normal_(0.0, 0.3, generator=generator)
    return Given(x, weight, e, coef, bias, pre)


def call(
    module: Any,
    shape: Shape,
    candidate: Candidate | None,
    given: Given,
    family: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """One launch of a family's launcher in ``module``; with the candidate's tile, or as it is without one."""
    x, weight, e, coef, bias, pre = given
    stride, padding = (shape.stride,) * shape.dims, (shape.padding,) * shape.dims
    pending, act = (coef, ACT) if shape.affine else (None, "none")
    name = candidate.family if candidate else family
    more = {"config": config(candidate.family, candidate.fields)} if candidate else {}
    if name == "fprop":
        front = (x, weight, bias, pending, act, pre, ACT)
        found = module.fprop(*front, stride, padding, True, **more)
    elif name == "dgrad":
        found = module.dgrad(e, weight, x, pending, act, stride, padding, **more)
    else:
        found = module.wgrad(e, x, weight, pending, act, stride, padding, **more)
    return found if isinstance(found, tuple) else (found,)


class Source(NamedTuple):
    """The input of Triton's compiler: types, constants, attributes (divisibility) and options of a launch."""

    types: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]


def source_of(kernel: Any, launch: _Noting, target: Any) -> Source:
    """A launch as Triton itself specialises it: what is compiled here lies in its cache when the launch comes.

    Where this version of Triton does not show how, by the rule that it documents: a launch may then compile anew.
    """
    options = {k: v for k, v in launch.named.items() if k.startswith("num_")}
    given = [
        torch.empty(0, dtype=a.dtype) if isinstance(a, torch.Tensor) else a for a in launch.given
    ]
    try:
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, special, rest = bind(*given, **launch.named)
        packed = kernel._pack_args(backend, dict(launch.named), bound, special, rest)
        return Source(packed[1], packed[2], packed[3], options)
    except (ImportError, AttributeError, TypeError, ValueError, KeyError):
        return _by_rule(kernel, launch, options)


def _by_rule(kernel: Any, launch: _Noting, options: dict[str, Any]) -> Source:
    """Pointers and multiples of 16 are divisible by 16, and 1 is a constant."""
    values = dict(zip(kernel.arg_names, launch.given, strict=False))
    values |= {k: v for k, v in launch.named.items() if k not in options}
    found = Source({}, {}, {}, options)
    fixed = {kernel.params[i].name for i in kernel.constexprs}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        divisible = isinstance(value, torch.Tensor)
        if name in fixed or value is None or (isinstance(value, int) and value == 1):
            found.types[name], found.constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            found.types[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, int):
            found.types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            found.types[name] = "fp32"
        if divisible:
            found.attributes[(i,)] = [["tt.divisibility", 16]]
    return found


def facts(shape: Shape, candidate: Candidate, arch: int) -> Facts:
    """Compiles a candidate for ``arch`` (80, 90, 100) and says what it needs; with a fault if it must not run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, launch = launch_of(shape, candidate)
    target = GPUTarget("cuda", arch, 32)
    source = source_of(kernel, launch, target)
    programs = math.prod(launch.grid)
    try:
        compiled = triton.compile(
            ASTSource(kernel, source.types, source.constants, source.attributes),
            target=target,
            options=source.options,
        )
    except Exception as error:  # whatever the compiler raises, this candidate is out
        lines = str(error).strip().splitlines()
        return Facts(programs=programs, fault=lines[0][:200] if lines else type(error).__name__)
    registers, stack, matrix = read_binary(compiled.asm["cubin"], arch)
    shared = compiled.metadata.shared
    held = resident(registers, shared, source.options["num_warps"], arch)
    faults = []
    if stack:
        faults.append(f"spills {stack} bytes")
    if shared > SHARED_LIMIT[arch]:
        faults.append(f"needs {shared} of {SHARED_LIMIT[arch]} bytes of shared memory")
    if shape.dtype in (torch.float16, torch.bfloat16) and not matrix:
        faults.append("has no matrix instructions")
    if not held:
        faults.append("does not fit on a multiprocessor")
    moved = through_l2(shape, candidate)
    return Facts(registers, stack, shared, matrix, programs, held, moved, ", ".join(faults))


def predicted(shape: Shape, candidate: Candidate, found: Facts) -> float:
    """Seconds by the cost model, with the waves that the binary's needs allow."""
    seconds = estimated(shape, candidate.family, candidate.fields[:-2], whole_waves=False)
    if candidate.family == "wgrad":
        return seconds  # its sums are split until the GPU is full
    return seconds * cost.tail(found.programs, RANKED.processors, max(found.resident, 1))


def through_l2(shape: Shape, candidate: Candidate) -> int:
    """Bytes through the L2 by the cost model."""
    c = shape.convolution()
    if candidate.family == "wgrad":
        bm, bn = candidate.fields[:2]
        blocks = -(-c.cout // bm) * -(-c.cin // bn)
        return c.itemsize * c.taps * blocks * c.batch * math.prod(c.output) * (bm + bn)
    th, tw, bn, bk = candidate.fields[:4]
    return cost.l2_bytes(c, cost.Tile(th * tw, bn, bk, (th, tw)))


class Compilers:
    """Processes that compile candidates: Triton decides at import whether kernels are interpreted."""

    def __init__(self, arch: int, processes: int | None = None) -> None:
        self.arch = arch
        with _compiling():
            self._pool = ProcessPoolExecutor(
                processes or min(os.cpu_count() or 1, 16), mp_context=get_context("spawn")
            )

    def submit(self, shape: Shape, candidate: Candidate) -> Future[Facts]:
        """The candidate's facts, in time."""
        with _compiling():  # a process may start only now
            return self._pool.submit(facts, shape, candidate, self.arch)

    def close(self) -> None:
        """Ends the processes without waiting for what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _compiling() -> Iterator[None]:
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
