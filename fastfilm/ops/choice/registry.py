"""The registry of backends: the devices, types and convolutions that each supports, as data.

A *backend* supplies the kernels. A *route* says how a block is put together from them:

``fused``     our own convolution with the pending affine in its prologue and the moments in its epilogue
``composed``  the vendor's convolution between our pointwise and moments kernels; covers every convolution
``eager``     plain PyTorch, step by step (the ``reference`` backend)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..launchers import available
from ..settings import left_out
from ..spec import constant_when_compiled

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


@dataclass(frozen=True)
class Backend:
    """One set of kernels: its devices and types, and the convolutions that it has of its own."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    unavailable: Callable[[], str | None]
    fused: Fused | None = None


@dataclass(frozen=True)
class Request:
    """A call, as far as it decides whether a kernel can serve it."""

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


def _cuda_why_not(request: Request) -> str | None:
    """A grid takes so many samples, and no tile may fit into a GPU's shared memory."""
    r = request
    if r.batch > 65535:
        return f"batch must be <= 65535, got {r.batch}"
    return _cuda_fits(r.dtype, r.channels, r.kernel, r.stride)


@constant_when_compiled
def _cuda_fits(*shape: Any) -> str | None:
    # the module exists only where the CUDA kernels were built
    from ..launchers.cuda import plans

    return plans.why_not(*shape)


BACKENDS = {
    b.name: b
    for b in (
        Backend("reference", ("cpu", "cuda"), ALL_FLOATS, lambda: None),
        Backend(
            "triton",
            ("cuda", "cpu"),
            (torch.float16, torch.bfloat16, torch.float32),
            available.triton,
            Fused(kernel_sizes=(1, 3), strides=(1, 2)),
        ),
        Backend(
            "cuda",
            ("cuda",),
            (torch.float16, torch.bfloat16, torch.float32),
            available.cuda,
            Fused(kernel_sizes=(1, 3), strides=(1, 2), why_not=_cuda_why_not),
        ),
        Backend("cpu", ("cpu",), ALL_FLOATS, available.cpu),
    )
}

ROUTES = ("fused", "composed", "eager")


def why_not_backend(b: Backend, request: Request) -> str | None:
    """The reason why backend ``b`` cannot serve ``request`` by any route; None if it can."""
    reason = b.unavailable() or left_out.why_not(b.name, None, None)
    if reason is not None:
        return reason
    if request.device not in b.devices or (
        b.name == "triton" and (request.device == "cpu") != available.interpreting()
    ):
        where = "CPU tensors (TRITON_INTERPRET=1)" if available.interpreting() else "CUDA tensors"
        wanted = where if b.name == "triton" else " or ".join(b.devices)
        return f"it runs on {wanted}, got a tensor on {request.device}"
    if request.dtype not in b.dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        return f"it supports {allowed}, got {str(request.dtype).removeprefix('torch.')}"
    return None


def why_not_fused(b: Backend, request: Request) -> str | None:
    """The reason why backend ``b`` has no fused convolution for ``request``; None if it has."""
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
