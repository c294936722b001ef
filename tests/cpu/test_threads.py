"""Work that the C++ kernels split over threads: the same bits, exceptions, forked processes, no spinning."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastfilm.ops import spec
from fastfilm.ops.spec import views

_C = pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")
from fastfilm.ops.launchers.cpu import kernels as cpu  # noqa: E402

from ..support.kernel_threads import splitting  # noqa: E402
from ..support.sanitize import LIBRARY  # noqa: E402


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return spec.channels_last(t) if len(shape) > 3 else t


class Sizes(NamedTuple):
    """A map [N, C, H, W], and the channels of a convolution's result."""

    map: tuple[int, int, int, int]
    co: int


SMALL = Sizes((2, 20, 15, 33), 20)
LARGE = Sizes((2, 24, 80, 90), 16)


def passes(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, dv = numbers(*sizes.map, dtype=dtype), numbers(*sizes.map, dtype=dtype, seed=1)
    coef = numbers(7, *sizes.map[:2], dtype=wide, seed=2)
    pre, dstats = coef[:2, 0].contiguous(), coef[:2].contiguous()
    stats = cpu.moments(y, pre, "silu")
    e, dpre = cpu.moments_backward(dv, dstats, y, stats, pre, "silu")
    assert dpre is not None
    return [cpu.apply(y, coef, "gelu"), *cpu.apply_backward(dv, y, coef, "elu"), stats, e, dpre]


def convolutions(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """A convolution, and of float32 the gradient at its weight and Winograd's form."""
    n, ci, *size = sizes.map
    x = numbers(*sizes.map, dtype=dtype)
    weight = numbers(sizes.co, ci, 3, 3, dtype=dtype, seed=1).contiguous()
    found = [cpu.convolve(x, weight, None, (1, 1))]
    if dtype == torch.float32:
        e, y = numbers(n, sizes.co, *size, seed=2), torch.empty_like(found[0])
        found.append(cpu.convolve_wgrad(e, x, weight, (1, 1), (1, 1)))
        strides = (*weight.stride()[:2], 0, *weight.stride()[2:])
        form = _C.Convolution(
            0, (n, ci, sizes.co, 1, *size, 1, 3, 3, 0, 1, 1, 1, *size, 1, 1, 1), strides
        )
        form.run_winograd(
            x.data_ptr(), weight.data_ptr(), 0, 0, y.data_ptr(), 0, torch.get_num_threads()
        )
        found.append(y)
    return found


def seen(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """A maximum over windows that overlap, a resized map, and their gradients."""
    n, c, *spatial = sizes.map
    size = tuple(spatial)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, coef = numbers(*sizes.map, dtype=dtype), numbers(7, n, c, dtype=wide, seed=2)
    found = []
    for view in (
        views.pooling("max", size, (3, 3), (1, 1), (1, 1), False),
        views.resizing("bilinear", size, tuple(2 * s for s in size), None, False),
    ):
        assert view is not None
        out = numbers(n, c, *view.size, dtype=dtype, seed=3)
        source = spec.Source(y, coef, "silu", view)
        gradient, _ = cpu.gather_backward(out, 0, source)
        assert gradient is not None
        found.append(gradient)
        cpu.gather(source, out, 0)
        found.append(out)
    return found


def sums(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, y2, dv = (numbers(*sizes.map, dtype=dtype, seed=s) for s in range(3))
    coef = numbers(7, *sizes.map[:2], dtype=wide, seed=4)
    slope = coef[0, 0].contiguous()
    addends = spec.Addends(y, coef, "none", y2, coef.flip(0), slope, "leaky_relu")
    gradients = cpu.residual_backward(dv, addends)
    return [cpu.residual(addends), *(t for t in gradients if t is not None)]


KERNELS = (passes, convolutions, seen, sums)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", KERNELS)
def test_bits_do_not_depend_on_threads_nor_on_the_order_of_tasks(
    call: Callable[[Sizes, torch.dtype], list[Tensor]], dtype: torch.dtype
) -> None:
    """Of small maps that are split as large ones are, and of maps that are large."""
    if call is convolutions and dtype == torch.float64:
        pytest.skip("float64 convolutions are PyTorch's")
    with splitting(1):
        _C.split_finely(True)
        alone = call(SMALL, dtype)
        assert _C.split_finely(True) == 1
    for count in (2, 3, 7):
        with splitting(count):
            split = call(SMALL, dtype)
            assert _C.split_finely(True) == count
        assert all(same(a, b) for a, b in zip(alone, split, strict=True)), count
    if dtype == torch.float32:
        large = call(LARGE, dtype)
        with splitting(3):
            _C.split_finely(False)
            split = call(LARGE, dtype)
            assert _C.split_finely(False) == 3
        assert all(same(a, b) for a, b in zip(large, split, strict=True))


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(a.isfinite().all()) and torch.equal(a, b)


def test_several_threads_of_python_call_at_once() -> None:
    expected = [t for call in KERNELS for t in call(SMALL, torch.float32)]
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        found[i] = [t for call in KERNELS for t in call(SMALL, torch.float32)]

    with splitting(3):
        callers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert sorted(found) == [0, 1, 2]
    for tensors in found.values():
        for a, b in zip(expected, tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def run_alone(script: str, openmp: bool, **environment: str) -> str:
    """What a Python process of its own prints, with OpenMP's threads or the kernels' own."""
    environment["WITH_OPENMP"] = str(int(openmp))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
    return done.stdout


# the extension alone: no thread of PyTorch's is there, and it starts in no time
SETUP = f"""
import importlib.machinery, importlib.util, os, time
import numpy as np
loader = importlib.machinery.ExtensionFileLoader("_C", {_C.__file__!r})
_C = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(_C)
_C.openmp(os.environ["WITH_OPENMP"] == "1")

def form(width, threads):
    # rows so wide that a thread's copies of them are the largest allocation
    x, y, e = (np.ones((6, width), np.float32) for _ in range(3))
    w, dw = (np.ones((3, 3), np.float32) for _ in range(2))
    conv = _C.Convolution(0, (1, 1, 1, 1, 6, width, 1, 3, 3, 0, 1, 1, 1, 6, width, 1, 1, 1), (9, 9, 9, 3, 1))
    forward = lambda: conv.run(x.ctypes.data, w.ctypes.data, 0, 0, y.ctypes.data, 0, threads)
    backward = lambda: conv.kernel_gradient(x.ctypes.data, e.ctypes.data, dw.ctypes.data, threads)
    return (x, w, y, e, dw), forward, backward
"""
MEMORY = (
    SETUP
    + """
import resource
held, forward, backward = form(1 << 19, 3)
small, run, gradient = form(1 << 16, 3)
forward(), backward(), run(), gradient()
for call in (forward, backward):
    for t in (small[2], small[4]):
        t.fill(0)
    used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
    # the copies of three rows take 6 MiB a thread
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 20), resource.RLIM_INFINITY))
    try:
        call()
    except MemoryError:
        print("MemoryError")
    run(), gradient()
    assert small[2][2, 5:9].tolist() == [9.0] * 4, small[2]
    assert small[4][1, 1] == 6 << 16, small[4]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    call()
assert held[2][2, 5] == 9 and held[4][1, 1] == 6 << 19
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
@pytest.mark.skipif(LIBRARY in os.environ, reason="AddressSanitizer needs memory of its own")
@pytest.mark.parametrize("openmp", [True, False])
def test_an_allocation_that_fails_in_a_thread_is_a_memory_error(openmp: bool) -> None:
    # large allocations are mapped, and given back when they are freed
    found = run_alone(MEMORY, openmp, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert found.split() == ["MemoryError"] * 2


FORKED = (
    SETUP
    + """
small, run, gradient = form(1 << 16, 3)
run()
child = os.fork()
small[2].fill(0)
run()
assert small[2][2, 5] == 9
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("both")
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("openmp", [True, False])
def test_a_forked_process_has_threads_of_its_own(openmp: bool) -> None:
    assert run_alone(FORKED, openmp) == "both\n"


IDLE = (
    SETUP
    + """
small, run, gradient = form(1 << 16, 2)
run()
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
)


def test_threads_sleep_while_there_is_no_work() -> None:
    """OpenMP's, told to wait actively, would take all of that time if they were the kernels'."""
    assert float(run_alone(IDLE, False, OMP_WAIT_POLICY="ACTIVE")) < 0.02


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs affinities of threads")
def test_threads_are_not_bound_to_the_processor_that_openmp_bound_the_caller_to() -> None:
    script = SETUP + (
        "small, run, gradient = form(1 << 16, 3)\nrun()\ntime.sleep(0.2)\n"
        "print(max(len(os.sched_getaffinity(int(t))) for t in os.listdir('/proc/self/task')),"
        " len(os.sched_getaffinity(0)))"
    )
    allowed = len(os.sched_getaffinity(0))
    widest, own = map(int, run_alone(script, False, OMP_PROC_BIND="true").split())
    assert own == 1 and widest == allowed
