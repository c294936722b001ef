"""What the tests of the CUDA kernels share: the emulated build, and what it is compared with."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counted.emulation import ROOT, SANITIZE, build, compiler, installed, load
from fastfilm.ops import spec
from tests.support.yardstick import relative_error

__all__ = ["ROOT", "SANITIZE", "build", "compiler", "installed", "load"]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time: the workers of a test run share what is built in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


LIBRARY = "FASTFILM_EMULATED_LIBRARY"
"""Set in the process that runs these tests under the sanitizers."""

ORDERS = [pytest.param(0, id="in_order"), pytest.param(7, id="shuffled")]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "emulated"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain build, made by the first worker that needs it."""
    if os.environ.get(LIBRARY):
        return Path(os.environ[LIBRARY])
    folder = build_folder(tmp_path_factory) / "plain"
    with alone(folder):
        done = folder / "_CUDA.so"
        return done if done.exists() else build(folder)


@pytest.fixture(scope="module")
def extension(library: Path) -> ModuleType:
    return load(library)


@pytest.fixture(params=ORDERS)
def cuda(extension: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The launchers, on the emulation.

    The order of emulated threads is nothing to Triton's kernels, which take long: PyTorch does their work there.
    """
    extension.set_seed(request.param)
    with installed(extension) as launchers, pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(launchers, "_TRITON", False)
        yield launchers
    extension.set_seed(0)


WARPGROUPS = frozenset({"sm90_fprop", "sm90_dgrad", "sm90_wgrad"})
"""The kernels of a convolution by warpgroup products."""
OTHERS = frozenset(name.removeprefix("sm90_") for name in WARPGROUPS)


@contextlib.contextmanager
def sm90_device(choice: str = "always", multiprocessors: int = 2) -> Iterator[None]:
    """A GPU of sm_90 in the place of the emulated one; ``choice`` as ``plans.wgmma`` takes it."""
    from fastfilm.ops.launchers.cuda import plans

    with pytest.MonkeyPatch.context() as patch, plans.wgmma(choice):
        patch.setattr(plans, "_device", lambda index: (90, multiprocessors, 232448))
        yield


@contextlib.contextmanager
def warpgroups(
    extension: ModuleType, kernels: Set[str] = WARPGROUPS, multiprocessors: int = 2
) -> Iterator[None]:
    """Convolutions by warpgroup products inside, where all of ``kernels`` run, and no others."""
    extension.launches()
    with sm90_device(multiprocessors=multiprocessors):
        yield
    assert kernels == set(extension.launches()) & (WARPGROUPS | OTHERS)


@pytest.fixture
def sm90(cuda: ModuleType, extension: ModuleType) -> Iterator[ModuleType]:
    """The launchers, on the emulation of sm_90a; the test must run all three kernels."""
    with warpgroups(extension):
        yield cuda


@contextlib.contextmanager
def rounding(allowed: Callable[[], bool]) -> Iterator[None]:
    """Rounds float32 products of the launchers where ``allowed`` says so: those of CPU tensors never are."""
    from fastfilm.ops.launchers.cuda import convolution, plans

    def plan(shape: plans.Shape, on: Tensor, kernels: Sequence[str]) -> Any:
        return plans._plan(shape, plans._device(on.device.index), allowed())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "plan", plan)
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; a feature map is channels-last."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return spec.channels_last(t) if len(shape) > 3 else t


def gradients(
    f: Callable[..., Tensor], arguments: tuple[Tensor, ...], outer: Tensor
) -> list[Tensor]:
    """Float64 gradients of ``f`` at its arguments."""
    wide = [t.double().requires_grad_() for t in arguments]
    grads = torch.autograd.grad(
        f(*wide), wide, outer.double(), allow_unused=True, materialize_grads=True
    )
    return list(grads)


def close(value: Tensor, exact: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    assert torch.isfinite(value).all(), "an element that nothing wrote"
    error = relative_error(value, exact)
    assert error <= times * TOLERANCE[dtype], f"relative error {error:.2e}"
