"""What all places of a map have in common in a gradient survives its rounding to 16 bits."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfilm
from benchmarks.counted.emulation import installed
from fastfilm.ops import choice, launchers, spec
from tests.support import emulated
from tests.support.emulated import extension, library

__all__ = ["extension", "library"]  # fixtures

needs_compiler = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

COMMON = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
"""A part of each type's distance from 1 to the number above it: less than half."""


def after_moments(kernels: Any, dtype: torch.dtype, dy: Tensor) -> Tensor:
    """The gradient at a map that is ``dy`` everywhere, and ``COMMON`` through the mean."""
    dy = spec.channels_last(dy.to(dtype))
    y = spec.channels_last(torch.randn(dy.shape, generator=torch.Generator().manual_seed(0)))
    places = dy[0, 0].numel()
    dstats = torch.zeros(2, *dy.shape[:2])
    dstats[0] = COMMON[dtype] * places
    e, _ = kernels.moments_backward(dy, dstats, y.to(dtype), torch.zeros_like(dstats), None, "none")
    found: Tensor = e.float()
    return found


def check(kernels: Any, dtype: torch.dtype) -> None:
    dy = torch.ones(2, 8, 24, 24)
    dy[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    e = after_moments(kernels, dtype, dy)
    assert e[0, 0, 0, 0].isnan() and e[0, 0, 0, 1:3].tolist() == [float("inf"), -float("inf")]
    e, step = e[1], torch.finfo(dtype).eps
    assert set(e.unique().tolist()) == {1.0, 1.0 + step}
    # the standard deviation of a place is at most half a step
    assert abs(float(e.double().mean()) - 1 - COMMON[dtype]) < 3 * 0.5 * step / e.numel() ** 0.5
    assert torch.equal(e, after_moments(kernels, dtype, dy)[1])


@pytest.mark.parametrize("dtype", COMMON, ids=str)
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_small_common_part_stays_on_average(name: str, dtype: torch.dtype) -> None:
    backend = choice.BACKENDS[name]
    if backend.unavailable() is not None or (name == "triton" and not choice.interpreting()):
        pytest.skip(backend.unavailable() or "the interpreter is not active")
    unguarded = name == "triton"
    check(importlib.import_module("fastfilm.kernels") if unguarded else launchers.of(name), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", COMMON, ids=str)
def test_a_small_common_part_stays_on_average_in_cuda(
    extension: ModuleType, dtype: torch.dtype
) -> None:
    with installed(extension) as kernels:
        check(kernels, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_a_gpus_bias_is_pending_on_the_raw_map(norm: str, training: bool) -> None:
    triton = choice.BACKENDS["triton"]
    if triton.unavailable() is not None or not choice.interpreting():
        pytest.skip(triton.unavailable() or "the interpreter is not active")
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 6, 5), "weight": (4, 3, 3, 3), "bias": (4,), "gamma": (2, 4)}
    given = {n: torch.randn(s).requires_grad_() for n, s in shapes.items()}
    options: dict[str, Any] = {"norm": norm, "activation": "relu", "order": "conv-act-norm-film"}
    options |= {"padding": 1, "training": training}

    def run(name: str, route: str | None) -> tuple[Tensor, list[Tensor], Any]:
        if norm == "batch":
            options["running_mean"], options["running_var"] = torch.zeros(4), torch.ones(4)
        with fastfilm.backend(name, route):
            v = fastfilm.conv_norm_film(**given, **options, deferred=True)
            found = v.tensor()
            grads = torch.autograd.grad(found, list(given.values()), torch.cos(found.detach()))
        return found, list(grads), v

    exact = run("reference", None)
    ours = run("triton", "composed")
    assert not ours[2].plan.adds_bias and spec.Plan("cpu", "composed").adds_bias
    bare = torch.nn.functional.conv2d(given["x"], given["weight"], padding=1)
    torch.testing.assert_close(ours[2].raw, bare)
    for a, b in zip((ours[0], *ours[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
