"""The backend ``cuda``: what it refuses and why, and whole blocks through its launchers on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

import fastfilm
from benchmarks.counted.emulation import serving
from fastfilm.ops import choice
from fastfilm.ops.choice import BACKENDS, Request, why_not_architecture
from fastfilm.ops.launchers import available
from fastfilm.ops.settings import tables
from tests.support import emulated
from tests.support.case import Case
from tests.support.emulated import extension, library
from tests.support.yardstick import assert_as_good_as_eager

__all__ = ["extension", "library"]

needs_compiler = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")


@pytest.fixture
def emulation(extension: ModuleType) -> Iterator[ModuleType]:
    """The backend on CPU tensors, by the emulation."""
    if torch.cuda.is_available():
        pytest.skip("what has no CUDA kernel runs in Triton's interpreter")
    with serving(extension) as launchers:
        yield launchers


CASES = {
    "batch norm": (Case(norm="batch"), "fused", torch.float32),
    "instance norm, act first": (
        Case(norm="instance", order="conv-act-norm-film", activation="prelu", running=False),
        "fused",
        torch.float16,
    ),
    "group norm, stride 2": (Case(norm="group", stride=2), "fused", torch.bfloat16),
    "3d": (Case(size=(3, 5, 4), norm="instance", running=False), "fused", torch.float16),
    "running statistics": (Case(norm="batch", training=False), "fused", torch.float32),
    "composed": (Case(norm="layer", order="conv-norm-act-film"), "composed", torch.float32),
}


def check_block(case: str, device: str) -> None:
    call, route, dtype = CASES[case]

    def drawn(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        other = replace(call, seed=seed)
        exact = other.run("reference", None, torch.float64, storage=dtype, device=device)
        return other.run("reference", None, dtype, device=device), exact

    # the gradient of a bias in front of a norm is rounding alone: one draw of eager's says nothing of its size
    eager = [drawn(seed) for seed in range(8)]
    ours = call.run("cuda", route, dtype, device=device)
    assert_as_good_as_eager(ours, eager[0][1], eager, dtype)


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_a_block_and_its_gradients_are_as_good_as_eager(case: str, emulation: ModuleType) -> None:
    check_block(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_same_on_a_gpu(case: str) -> None:
    reason = BACKENDS["cuda"].unavailable()
    if reason is not None:
        pytest.skip(reason)
    check_block(case, "cuda")


@needs_compiler
def test_a_block_in_inference_is_finished_by_the_convolution(
    emulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = []
    inner = emulation.fprop
    monkeypatch.setattr(
        emulation, "fprop", lambda *a, **k: finished.append(k["finish"]) or inner(*a, **k)
    )
    x, weight = torch.randn(1, 8, 6, 7), torch.randn(8, 8, 3, 3)
    options: dict[str, Any] = {
        "padding": 1,
        "norm": "batch",
        "running_mean": torch.randn(8),
        "running_var": torch.rand(8) + 1,
        "activation": "relu",
    }
    with torch.no_grad(), fastfilm.backend("cuda", "fused"):
        ours = fastfilm.conv_norm_film(x, weight, **options)
    assert len(finished) == 1 and finished[0].coef is not None  # the coefficients of the output
    with torch.no_grad(), fastfilm.backend("reference"):
        theirs = fastfilm.conv_norm_film(x, weight, **options)
    assert isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours, theirs)


REQUEST = Request(
    "cuda",
    torch.bfloat16,
    2,
    (3, 3),
    (1, 1),
    (1, 1),
    channels=(64, 64),
    output=(256, 256),
    batch=16,
)


@needs_compiler
def test_what_the_fused_route_refuses_is_said(
    emulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = BACKENDS["cuda"]
    assert choice.why_not_fused(b, REQUEST) is None
    assert "kernel size must be 1 or 3" in str(
        choice.why_not_fused(b, replace(REQUEST, kernel=(5, 5)))
    )
    assert "batch must be <= 65535" in str(choice.why_not_fused(b, replace(REQUEST, batch=70000)))
    monkeypatch.setattr(
        "fastfilm.ops.launchers.cuda.plans._device", lambda index: (86, 28, 16 * 1024)
    )
    assert choice.why_not_fused(b, REQUEST) == ("no tile fits into 16384 bytes of shared memory")


@needs_compiler
def test_it_is_chosen_only_where_it_was_measured_or_forced(
    emulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = replace(BACKENDS["triton"], unavailable=lambda: None)
    monkeypatch.setitem(BACKENDS, "triton", triton)
    monkeypatch.setattr(available, "interpreting", lambda: False)
    assert choice.choose(REQUEST).backend == "triton"
    with fastfilm.backend("cuda"):
        assert choice.choose(REQUEST).backend == "cuda"
    key = tables.key(torch.bfloat16, 16, (64, 64), (3, 3), (1, 1), (256, 256))
    choice.forget()
    with tables.trying({key: tables.Entry("cuda/fused", {}, {})}):
        assert str(choice.choose(REQUEST)) == "cuda/fused"


@without_gpu
def test_forcing_it_without_a_gpu_says_what_is_missing() -> None:
    reason = "was|were not built|no CUDA device"
    with fastfilm.backend("cuda"), pytest.raises(NotImplementedError, match=reason):
        fastfilm.conv_norm_film(torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3))


@pytest.mark.parametrize(
    ("built", "capability", "reason"),
    [
        ("80;90a", 80, None),
        ("80;90a", 89, None),
        ("80;90a", 90, None),
        ("80;90a", 120, None),  # from the PTX
        ("90a", 90, None),
        ("90a", 80, "built for sm_90a, this GPU is sm_80: rebuild with FASTFILM_CUDA=1"),
        ("90a", 100, "FASTFILM_CUDA_ARCHS=100"),
        ("90", 80, "built for sm_90, this GPU is sm_80"),
        ("80", 75, "needs a GPU from sm_80 on, this one is sm_75"),
    ],
)
def test_a_stale_build_says_which_command_rebuilds(
    built: str, capability: int, reason: str | None
) -> None:
    found = why_not_architecture(built, capability)
    assert found is None if reason is None else reason in str(found)
