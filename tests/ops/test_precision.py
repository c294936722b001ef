"""TF32: what the kernels read from PyTorch's flags, what ``check`` sets, and what rounded products cost."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.counted.emulation import serving
from fastfilm import check
from fastfilm.ops import choice
from fastfilm.ops.spec import precision
from fastfilm.ops.spec.precision import float32_products, tf32
from tests.support import emulated
from tests.support.emulated import extension, library

__all__ = ["extension", "library"]

CUDNN: Any = torch.backends.cudnn
MATRICES: Any = torch.backends.cuda.matmul
newer = pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="PyTorch before 2.9")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
TRITON = choice.BACKENDS["triton"].unavailable()
CASE, BOUND = check.TENSOR_FLOAT
AT_START = CUDNN.allow_tf32, MATRICES.allow_tf32


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The flags as they were, whatever a test does with them."""
    with float32_products(False):
        yield


def state() -> list[Any]:
    return [getattr(owner, name) for owner, name in precision._settings()]


def test_tests_run_without_tf32() -> None:
    assert AT_START == (False, False)


def set_apart() -> None:
    """By the newer flags alone, so that the older one of convolutions raises an error."""
    CUDNN.conv.fp32_precision, MATRICES.fp32_precision = "tf32", "tf32"
    with pytest.raises(RuntimeError):
        _ = CUDNN.allow_tf32


@pytest.mark.parametrize("allowed", [False, True])
def test_kernels_multiply_as_the_older_flag_says(allowed: bool) -> None:
    CUDNN.allow_tf32 = allowed
    check_kernels(allowed)


@newer
def test_kernels_multiply_as_the_newer_flag_says() -> None:
    set_apart()
    check_kernels(True)


def check_kernels(allowed: bool) -> None:
    assert tf32() == allowed
    if TRITON is None:
        from fastfilm.kernels import common

        assert common.precision(torch.float32) == ("tf32" if allowed else "ieee")
        assert common.precision(torch.float16) == "ieee"


@pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")
def test_the_cuda_kernels_round_on_a_gpu_alone(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    sizes = (8, 8), (8, 8), (3, 3), (1, 1), (1, 1)
    with emulated.installed(extension), float32_products(True):
        from fastfilm.ops.launchers.cuda import plans

        def rounds(dtype: torch.dtype) -> bool:
            return bool(plans.plan(plans.Shape(dtype, 1, (8, 8), *sizes), x))

        monkeypatch.setattr(plans, "_plan", lambda shape, device, tf32, wgmma: tf32)
        assert rounds(torch.float32) and not rounds(torch.float16)
        x.is_cuda = False
        assert not rounds(torch.float32)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    "before", ["off", "on", pytest.param("apart", marks=newer), pytest.param("all", marks=newer)]
)
def test_a_setting_for_a_while_holds_and_is_taken_back(before: str, allowed: bool) -> None:
    if before == "apart":
        set_apart()
    elif before == "all":
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    else:
        CUDNN.allow_tf32 = MATRICES.allow_tf32 = before == "on"
    try:
        found = state()
        with pytest.raises(ZeroDivisionError), float32_products(allowed):
            assert tf32() == allowed
            if hasattr(CUDNN, "conv"):
                assert (CUDNN.conv.fp32_precision == "tf32") == allowed
                assert (MATRICES.fp32_precision == "tf32") == allowed
            raise ZeroDivisionError
        assert state() == found
    finally:
        if before == "all":
            torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]


def test_check_runs_in_ieee_and_keeps_the_callers_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def errors(*args: Any) -> tuple[float, float, float]:
        seen.append(tf32())
        return 0.0, 0.0, 1.0

    monkeypatch.setattr(check, "_errors", errors)
    CUDNN.allow_tf32 = True
    for bound in (None, BOUND):
        check._row("cpu", "composed", CASE, torch.float32, "cpu", bound)
        assert tf32()
    assert seen == [False, True]


@without_gpu
@pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("allowed", [False, True])
def test_the_block_of_check_errs_as_its_flag_says(allowed: bool, extension: ModuleType) -> None:
    bound = BOUND if allowed else None
    with serving(extension), emulated.rounding(tf32):
        row = check._row("cuda", "fused", CASE, torch.float32, "cpu", bound)
    assert row.status == "ok" and row.dtype == ("tf32" if allowed else "float32")
    low, high = (1e-4, BOUND) if allowed else (0.0, 1e-6)
    assert low < float(row.error) < high


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_float32_and_tf32_on_a_gpu(name: str) -> None:
    reason = choice.BACKENDS[name].unavailable()
    if reason is not None:
        pytest.skip(reason)
    exact, rounded = (
        check._row(name, "fused", CASE, torch.float32, "cuda", bound) for bound in (None, BOUND)
    )
    assert exact.status == rounded.status == "ok"
    assert float(exact.error) < 1e-5 and 1e-5 < float(rounded.error) < BOUND
