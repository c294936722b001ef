"""What a captured CUDA graph reads stays alive, and what a capture makes is not kept (captures are pretended)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.nn.metadata import as_metadata
from fastfilm.ops import choice, reference
from fastfilm.ops.launchers import triton as fallback
from fastfilm.ops.launchers.cuda.arguments import Launch
from fastfilm.ops.maps import interpolate, join, max_pool, residual
from fastfilm.ops.reference import coefficients
from fastfilm.ops.spec import TailTensors, capture, views
from tests.support.kind import kind_of

CPU = torch.device("cpu")
TRITON = choice.BACKENDS["triton"].unavailable()
needs_triton = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
Switch = Callable[[bool], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Calls count as captured from ``pretend(True)`` to ``pretend(False)``; nothing is held or kept before."""
    monkeypatch.setattr(capture, "_held", {})
    views._table.cache_clear()

    def switch(on: bool) -> None:
        monkeypatch.setattr(capture, "capturing", lambda: on)

    return switch


def table(size: int = 6) -> tuple[tuple[Tensor, Tensor], ...]:
    return views.taps(
        views.pooling("max", (size,) * 2, (2, 2), (2, 2), (0, 0)), (size,) * 2, False, CPU
    )


def alive(captured: bool, pretend: Switch, evict: Callable[[], None]) -> bool:
    """Whether a table that was read is still there behind ``evict``."""
    pretend(False)
    watched = weakref.ref(table()[1][0])
    pretend(captured)
    table()
    pretend(False)
    evict()
    gc.collect()
    return watched() is not None


def fill() -> None:
    """As many other tables as the cache holds."""
    for size in range(1, 1030):
        views.taps(None, (1, size), False, CPU)


@pytest.mark.parametrize("evict", [views._table.cache_clear, fill], ids=["cleared", "full"])
def test_a_table_that_a_graph_reads_outlives_the_cache(
    evict: Callable[[], None], pretend: Switch
) -> None:
    assert alive(True, pretend, evict)
    capture._held.clear()
    assert not alive(False, pretend, evict)


def test_a_table_is_held_once(pretend: Switch) -> None:
    table()
    pretend(True)
    table()
    held = len(capture._held)
    table()
    assert held == len(capture._held) == 6


def test_the_first_table_inside_a_capture_asks_for_a_call_before(pretend: Switch) -> None:
    pretend(True)
    with pytest.raises(RuntimeError, match=r"capture of a CUDA graph: .*\(warm up\)"):
        table()
    pretend(False)
    assert table()[1][0].shape == (3, 2)


@needs_triton
@without_gpu
def test_a_block_behind_views_needs_its_forward_and_its_backward_before(pretend: Switch) -> None:
    raw = torch.randn(1, 2, 6, 4)
    weight = torch.randn(2, 4, 1, 1)

    def forward() -> tuple[Tensor, Tensor]:
        x = raw.clone().requires_grad_()
        with fastfilm.backend("triton"):
            first = fastfilm.conv_norm_film(
                x, torch.eye(2)[:, :, None, None], activation="silu", deferred=True
            )
            small = max_pool(first, 2)
            both = join([interpolate(small, size=(6, 4), mode="bilinear"), first])
            return fastfilm.conv_norm_film(both, weight, norm="instance"), x  # type: ignore[return-value]

    def whole() -> tuple[Tensor, ...]:
        y, x = forward()
        return y, *torch.autograd.grad(y.square().sum(), x)

    forward()
    pretend(True)
    y, x = forward()
    with pytest.raises(RuntimeError, match="warm up"):
        torch.autograd.grad(y.square().sum(), x)
    pretend(False)
    expected = whole()
    pretend(True)
    for ours, theirs in zip(whole(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_constants_that_a_capture_makes_are_its_own(
    pretend: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coefficients, "_ONE_ZERO", {})
    residual._kept_slope.cache_clear()
    pretend(True)
    reference.of_block(kind_of(), TailTensors(), CPU)
    residual._slope(0.5, 3, torch.float32, torch.zeros(1))
    assert not coefficients._ONE_ZERO and not residual._kept_slope.cache_info().currsize
    pretend(False)
    reference.of_block(kind_of(), TailTensors(), CPU)
    residual._slope(0.5, 3, torch.float32, torch.zeros(1))
    assert coefficients._ONE_ZERO and residual._kept_slope.cache_info().currsize


def test_metadata_of_the_host_are_refused_in_a_capture(pretend: Switch) -> None:
    pretend(True)
    with pytest.raises(RuntimeError, match="give them as a tensor on the GPU"):
        as_metadata([[1.0, 2.0]], 2, 1, torch.device("cuda"))
    assert as_metadata([[1.0, 2.0]], 2, 1, CPU).shape == (1, 2)


def test_a_counter_is_not_read_in_a_capture(pretend: Switch) -> None:
    """A converted model reads it as PyTorch's own norm does, which CUDA refuses in a capture."""
    made: nn.Module = fastfilm.ConvNormFiLM2d(1, 2, norm="batch", momentum=None)
    x = torch.randn(2, 1, 5, 5)
    made(x)
    pretend(True)
    with pytest.raises(RuntimeError, match="momentum=None"):
        made(x)


@needs_triton
@without_gpu
def test_a_kernel_that_a_capture_refuses_to_load_is_loaded_by_the_next_call(
    pretend: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastfilm import kernels

    def fails(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    loaded, refused = (SimpleNamespace(module=m, _run="a launcher") for m in (object(), None))
    kernel = SimpleNamespace(device_caches={0: ({"a": loaded, "b": refused}, {}, "target")})
    monkeypatch.setattr(kernels, "some_kernel", kernel, raising=False)
    monkeypatch.setattr(fallback, "failures", {})
    y, coef = (
        torch.randn(1, 2, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.ones(7, 1, 2),
    )
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "apply", fails)
        pretend(True)
        with pytest.raises(RuntimeError, match="warm up") as error:
            fallback.apply(y, coef, "none")
    assert "stream is capturing" in str(error.value.__cause__)
    assert (loaded._run, refused._run) == ("a launcher", None)
    pretend(False)
    assert not fallback.failures
    assert torch.isfinite(fallback.apply(y, coef, "none")).all()


def test_a_failed_launch_inside_a_capture_says_what_to_do(pretend: Switch) -> None:
    def launch() -> None:
        with Launch(-1):  # no device: the one that is current stays so
            raise RuntimeError("operation not permitted when stream is capturing")

    pretend(True)
    with pytest.raises(RuntimeError, match="warm up"):
        launch()
    pretend(False)
    with pytest.raises(RuntimeError, match="not permitted"):
        launch()


def test_nothing_is_captured_here_and_a_compiler_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not capture.capturing()
    # beside a CUDA context too, a compiler has nothing to ask the driver for
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def call(x: Tensor) -> Tensor:
        return x + 1 if not capture.capturing() else x

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
