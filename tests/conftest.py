"""Shared fixtures: Triton's interpreter where there is no GPU, float32 without TF32, buffers poisoned with NaN."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

# the work is thousands of small calls in as many workers as cores: more threads would wait for each other
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # before Triton is imported: kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests import slow

# PyTorch's convolutions round float32 to TF32 on a GPU unless told otherwise, and the kernels do as PyTorch does.
# These flags exist in every version, and stay readable where nobody sets the newer ``fp32_precision``
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slow``: see ``tests/slow.py``."""
    parser.addoption("--slow", action="store_true", help="also the tests of tests/slow_tests.txt")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests are left out of a run of everything; those marked ``gpu`` skip where there is no CUDA device."""
    asked = config.option.slow or os.environ.get("FASTFILM_SLOW_TESTS") == "1"
    if not asked and not any(".py" in a for a in config.args):
        listed = slow.listed()
        left_out = [i for i in items if i.nodeid in listed]
        items[:] = [i for i in items if i.nodeid not in listed]
        config.hook.pytest_deselected(items=left_out)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that costs its process the GPU ends the process, where another one takes its place."""
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ:
        from fastfilm.machine import gpu_is_lost

        if gpu_is_lost():
            os._exit(70)
    return report


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter"),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: the interpreter on CPU tensors, or a GPU."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is not active where a GPU is used")
    return str(request.param)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills every uninitialised float buffer with NaN, so that an element nothing wrote shows."""

    def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = function(*args, **kwargs)
            # a fake tensor (shape propagation) has no storage to fill
            if type(t) is torch.Tensor and t.is_floating_point():
                # detached, since PyTorch's own code asks for one with a gradient
                t.detach().fill_(float("nan"))
            return t

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield
