"""Backends: what each supports, as data; which are available here, and why not; which one a call gets.

A *backend* supplies the kernels. A *route* says how a block is put together from them:

``fused``     our own convolution with the pending affine in its prologue and the moments in its epilogue
``composed``  the vendor's convolution between our pointwise and moments kernels; covers every convolution
``eager``     plain PyTorch, step by step (the ``reference`` backend)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import environment, left_out, routing, spec

UNMEASURED = "composed"
"""The route where no table says which is the faster one: it was for every layer measured on an H200."""

ALL_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Fused:
    """Convolutions that a backend's own kernels cover.

    ``why_not`` says of a request that passes the rest why it cannot run all the same; None if it can.
    """

    kernel_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dims: tuple[int, ...] = (2, 3)
    why_not: Callable[[Request], str | None] = lambda request: None


_module = functools.cache(importlib.import_module)
_replaced: dict[str, Any] = {}


@contextlib.contextmanager
def replaced(launchers: Mapping[str, Any]) -> Iterator[None]:
    """Other launchers in the place of backends' own, for an instrument that watches them."""
    before = dict(_replaced)
    _replaced.update(launchers)
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)


@dataclass(frozen=True)
class Backend:
    """One set of kernels: where it runs, on what, and which module holds its launchers."""

    name: str
    module: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    unavailable: Callable[[], str | None]
    fused: Fused | None = None

    def kernels(self) -> ModuleType:
        """The launchers (imported on first use) that are not left out."""
        found = _replaced[self.name] if self.name in _replaced else _module(self.module)
        launchers: ModuleType = left_out.launchers(self.name, found)
        return launchers


@dataclass(frozen=True)
class Request:
    """What a call asks for: everything that decides whether a kernel can serve it."""

    device: str
    dtype: torch.dtype
    dims: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    channels: tuple[int, int] = (1, 1)
    output: tuple[int, ...] = ()
    batch: int = 1


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (on CPU tensors)."""
    return environment.read("TRITON_INTERPRET") == "1"


# found once: a compiler that follows the choice of a backend cannot follow a search of modules
_FOUND = {
    m: importlib.util.find_spec(m) is not None for m in ("triton", "fastfilm._C", "fastfilm._CUDA")
}


def _triton_unavailable() -> str | None:
    if not _FOUND["triton"]:
        return "the package triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device (set TRITON_INTERPRET=1 to run the kernels on CPU tensors, slowly)"


def _cpu_unavailable() -> str | None:
    if not _FOUND["fastfilm._C"]:
        return "the C++ extension was not built (needs a C++17 compiler at install time)"
    return None


@functools.cache
@spec.constant_when_compiled
def _cuda_unavailable() -> str | None:
    if not _FOUND["fastfilm._CUDA"]:
        return "the CUDA kernels were not built (needs nvcc at install time; FASTFILM_CUDA=1 tells why)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    built = importlib.import_module("fastfilm._CUDA").architectures
    major, minor = torch.cuda.get_device_capability()
    return why_not_architecture(built, 10 * major + minor)


def why_not_architecture(built: str, capability: int) -> str | None:
    """Why kernels for the targets ``built`` ("80;90a") do not run on a GPU of a compute capability (90)."""
    if capability < 80:
        return f"needs a GPU from sm_80 on, this one is sm_{capability}"
    for target in built.split(";"):
        number = int(target.rstrip("af"))
        # machine code serves its own major version, PTX all later ones; a target with a letter serves itself
        if number == capability or (target.isdigit() and number < capability):
            return None
    names = ", ".join(f"sm_{t}" for t in built.split(";"))
    return (
        f"built for {names}, this GPU is sm_{capability}: rebuild with"
        f" FASTFILM_CUDA=1 FASTFILM_CUDA_ARCHS={capability} pip install --force-reinstall --no-deps ."
    )


def _cuda_why_not(request: Request) -> str | None:
    """A grid takes so many samples, and no tile may fit into a GPU's shared memory."""
    r = request
    if r.batch > 65535:
        return f"batch must be <= 65535, got {r.batch}"
    return _cuda_fits(r.dtype, r.channels, r.kernel, r.stride)


@spec.constant_when_compiled
def _cuda_fits(*shape: Any) -> str | None:
    reason: str | None = BACKENDS["cuda"].kernels().why_not(*shape)
    return reason


BACKENDS = {
    b.name: b
    for b in (
        Backend("reference", "fastfilm.ops.reference", ("cpu", "cuda"), ALL_FLOATS, lambda: None),
        Backend(
            "triton",
            "fastfilm.ops.fallback",
            ("cuda", "cpu"),
            (torch.float16, torch.bfloat16, torch.float32),
            _triton_unavailable,
            Fused(kernel_sizes=(1, 3), strides=(1, 2)),
        ),
        Backend(
            "cuda",
            "fastfilm.ops.cuda",
            ("cuda",),
            (torch.float16, torch.bfloat16, torch.float32),
            _cuda_unavailable,
            Fused(kernel_sizes=(1, 3), strides=(1, 2), why_not=_cuda_why_not),
        ),
        Backend("cpu", "fastfilm.ops.cpu", ("cpu",), ALL_FLOATS, _cpu_unavailable),
    )
}

ROUTES = ("fused", "composed", "eager")


def _check_names(name: str | None, route: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if route is not None and route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")


environment.check()
_DEFAULTS = (environment.read("FASTFILM_BACKEND"), environment.read("FASTFILM_ROUTE"))


class _Forced(threading.local):
    def __init__(self) -> None:
        self.backend, self.route = _DEFAULTS


_forced = _Forced()


@contextlib.contextmanager
def backend(name: str | None, route: str | None = None) -> Iterator[None]:
    """Forces one backend, and optionally one route, inside a ``with`` block (this thread only).

    Args:
        name: ``"reference"``, ``"triton"``, ``"cuda"``, ``"cpu"``, or None for the automatic choice.
        route: ``"fused"``, ``"composed"``, or None for the automatic choice.

    Raises:
        ValueError: an unknown name. A call inside the block that the forced combination cannot serve
            raises NotImplementedError saying what is unsupported.
    """
    _check_names(name, route)
    before = _forced.backend, _forced.route
    _forced.backend, _forced.route = name, route
    try:
        yield
    finally:
        _forced.backend, _forced.route = before


def why_not_backend(b: Backend, request: Request) -> str | None:
    """Why backend ``b`` cannot serve ``request`` by any route; None if it can."""
    reason = b.unavailable() or left_out.why_not(b.name, None, None)
    if reason is not None:
        return reason
    if request.device not in b.devices or (
        b.name == "triton" and (request.device == "cpu") != interpreting()
    ):
        where = "CPU tensors (TRITON_INTERPRET=1)" if interpreting() else "CUDA tensors"
        wanted = where if b.name == "triton" else " or ".join(b.devices)
        return f"it runs on {wanted}, got a tensor on {request.device}"
    if request.dtype not in b.dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        return f"it supports {allowed}, got {str(request.dtype).removeprefix('torch.')}"
    return None


def why_not_fused(b: Backend, request: Request) -> str | None:
    """Why backend ``b`` has no fused convolution for ``request``; None if it has."""
    f = b.fused
    if f is None:
        return "it has no convolution of its own"
    if request.transposed:
        return "transposed convolution is not fused"
    if request.groups != 1:
        return f"groups must be 1, got {request.groups}"
    if any(d != 1 for d in request.dilation):
        return f"dilation must be 1, got {request.dilation}"
    kernel, stride = request.kernel, request.stride
    if len(set(kernel)) != 1 or kernel[0] not in f.kernel_sizes:
        return f"kernel size must be {' or '.join(map(str, f.kernel_sizes))} in every dimension, got {kernel}"
    if len(set(stride)) != 1 or stride[0] not in f.strides:
        return f"stride must be {' or '.join(map(str, f.strides))} in every dimension, got {stride}"
    if request.dims not in f.dims:
        return f"spatial dimensions must be one of {f.dims}, got {request.dims}"
    return left_out.why_not(b.name, "fprop", request.dtype) or f.why_not(request)


def forced() -> tuple[str | None, str | None, bool]:
    """What beside a request decides the choice: the forced backend and route, and the interpreter."""
    return _forced.backend, _forced.route, interpreting()


def exporting() -> bool:
    """Whether an exporter records a call.

    The flag behind ``torch.compiler.is_exporting``, which is True in every ``torch.compile`` before PyTorch 2.13.
    """
    return torch.compiler._is_exporting_flag


def traced() -> bool:
    """Whether a call is recorded in PyTorch's own operators: by an exporter or a ``torch.func`` transform."""
    return exporting() or (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


_watchers: list[list[Request]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[Request]]:
    """The requests that are made inside the block."""
    seen: list[Request] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def choose(request: Request) -> str:
    """The plan ``"backend/route"`` for a request, from what is forced, available and supported.

    Raises:
        NotImplementedError: the forced backend or route cannot serve the request; says why.
    """
    for seen in _watchers:
        seen.append(request)
    if traced():
        if _forced.backend is None:
            return "reference/eager"
        if _forced.backend != "reference" and not exporting():
            raise NotImplementedError(
                f"backend {_forced.backend!r} cannot serve a torch.func transform;"
                " use fastfilm.backend('reference'), or force none"
            )
    return _choose(request, *forced())


def automatic(device: str) -> str:
    """The backend for tensors of a device, where none is forced or measured and it serves the call."""
    return "triton" if device == "cuda" else "cpu"


def _shape(request: Request) -> tuple[Any, ...]:
    r = request
    return r.dtype, r.batch, r.channels, r.kernel, r.stride, r.output


def why_not_plan(plan: str, request: Request) -> str | None:
    """Why "backend/route" cannot serve ``request``; None if it can."""
    name, route = plan.split("/")
    b = BACKENDS.get(name)
    if b is None:
        return f"there is no backend {name!r}"
    reason = why_not_backend(b, request)
    if reason is not None or route == "composed":
        return reason
    return why_not_fused(b, request) if route == "fused" else f"there is no route {route!r}"


def measured(request: Request, name: str | None) -> str | None:
    """The plan that was measured to be the fastest, if this request and the backend asked for allow it."""
    irregular = len(set(request.kernel)) > 1 or len(set(request.stride)) > 1
    irregular |= request.transposed or request.groups != 1 or set(request.dilation) != {1}
    if request.device != "cuda" or irregular:
        return None
    entry = routing.measured(*_shape(request))
    if entry is None or name not in (None, entry.plan.partition("/")[0]):
        return None
    return None if why_not_plan(entry.plan, request) else entry.plan


@functools.lru_cache(maxsize=4096)
def _choose(request: Request, name: str | None, route: str | None, interpreted: bool) -> str:
    plan = None if route is not None else measured(request, name)
    if plan is not None:
        return plan
    if name is None:
        # the interpreter is for tests: on CPU tensors it is used only where it is asked for by name
        name = automatic(request.device)
        if why_not_backend(BACKENDS[name], request) is not None:
            name = "reference"
    b = BACKENDS[name]
    reason = why_not_backend(b, request)
    if reason is not None:
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {reason}")
    if name == "reference":
        if route not in (None, "eager"):
            raise NotImplementedError(
                f"backend 'reference' has the route 'eager' only, got {route!r}"
            )
        return "reference/eager"
    fused_reason = why_not_fused(b, request)
    if route is None:
        route = UNMEASURED if fused_reason is None else "composed"
    elif route == "fused" and fused_reason is not None:
        raise NotImplementedError(
            f"route 'fused' of backend {name!r} cannot serve this call: {fused_reason}"
        )
    elif route == "eager":
        raise NotImplementedError(
            f"backend {name!r} has the routes 'fused' and 'composed', got 'eager'"
        )
    return f"{name}/{route}"


def describe() -> list[tuple[str, str | None, str]]:
    """(name, why it is unavailable or None, what it covers) of every backend."""
    rows = []
    for b in BACKENDS.values():
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        covers = f"{'/'.join(b.devices)}; {dtypes}"
        if b.fused is not None:
            kernels = "/".join(map(str, b.fused.kernel_sizes))
            strides = "/".join(map(str, b.fused.strides))
            covers += f"; fused convolution: kernel {kernels}, stride {strides}, 2D and 3D"
        rows.append((b.name, b.unavailable(), covers))
    return rows
