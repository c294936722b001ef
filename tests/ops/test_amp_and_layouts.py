"""Automatic mixed precision on the CPU, and the layouts of outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.ops import choice, spec
from tests.support.yardstick import relative_error

HALVES = (torch.bfloat16, torch.float16)
BACKENDS = [
    pytest.param(
        n,
        marks=()
        if (why := choice.BACKENDS[n].unavailable()) is None
        else pytest.mark.skip(reason=why),
    )
    for n in ("cpu", "reference")
]


def unet() -> fastfilm.FiLMedUNet:
    torch.manual_seed(0)
    return fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=3)


@pytest.mark.parametrize("order", spec.ORDERS)
@pytest.mark.parametrize("norm", ["batch", "instance", None])
@pytest.mark.parametrize("film", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_block_is_16_bit_outside_and_float32_inside(
    dtype: torch.dtype, film: torch.dtype, norm: str | None, order: str
) -> None:
    """The dtype is that of eager's convolution; gradients are in the dtypes of what they belong to."""
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, norm=norm, order=order)
    x = torch.randn(2, 3, 8, 7, requires_grad=True)
    gamma = (1 + torch.rand(2, 4)).to(film).requires_grad_()
    beta = torch.rand(2, 4).to(film).requires_grad_()
    exact = block.eval()(x, gamma, beta)
    block.train()
    with torch.autocast("cpu", dtype):
        v = block(x, gamma, beta)
        conv = nn.functional.conv2d(x, block.weight, padding=1)
        raw = block(x, gamma, beta, deferred=True)
    assert isinstance(v, Tensor) and v.dtype == conv.dtype == dtype
    if isinstance(raw, fastfilm.DeferredMap) and raw.coef is not None:
        assert raw.raw.dtype == dtype and raw.coef.dtype == torch.float32
    (v.float() ** 2).sum().backward()
    for name, t in (("x", x), ("gamma", gamma), ("beta", beta), *block.named_parameters()):
        assert t.grad is not None and t.grad.dtype == t.dtype, name
        assert t.grad.isfinite().all(), name
    for name, b in block.named_buffers():
        assert b.dtype in (torch.float32, torch.int64), name
    block.eval()
    if norm != "batch":
        with torch.autocast("cpu", dtype):
            found = block(x, gamma, beta)
        assert relative_error(found, exact.double()) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_network_is_close_to_float32(dtype: torch.dtype) -> None:
    x, rows = torch.randn(2, 1, 16, 16), torch.eye(3)[:2]
    results = []
    for enabled in (False, True):
        net = unet()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = net(x, rows)
        out.float().square().mean().backward()
        assert out.dtype == (dtype if enabled else torch.float32)
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        results.append((out.float(), torch.cat([g.flatten() for g in grads])))
    for ours, exact in zip(results[1], results[0], strict=True):
        assert relative_error(ours, exact.double()) < 40 * torch.finfo(dtype).eps


def test_grad_scaler_takes_a_step_and_skips_one_that_overflowed() -> None:
    net = unet()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, rows = torch.randn(2, 1, 16, 16), torch.eye(3)[:2]

    def step(factor: float) -> bool:
        before = [p.detach().clone() for p in net.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = net(x, rows).float().square().mean() * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))

    assert step(1.0) and scaler.get_scale() == 2.0**10
    assert not step(float("inf")) and scaler.get_scale() == 2.0**9
    assert step(1.0)


def test_nested_autocast_regions_decide_for_themselves() -> None:
    """A weight that autocast has cast and cached is not used where autocast is off, and keeps its gradient."""
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 3, norm="instance")
    x = torch.randn(1, 3, 6, 5)
    plain = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        first = block(x)
        with torch.autocast("cpu", enabled=False):
            middle = block(x)
            with pytest.raises(TypeError, match="weight must have x's dtype"):
                block(first)
        with torch.no_grad():
            block(x)
        last = block(x)
    assert first.dtype == last.dtype == torch.bfloat16 and middle.dtype == torch.float32
    assert torch.equal(middle, plain) and torch.equal(first, last)
    last.float().square().sum().backward()
    assert block.weight.grad is not None and block.weight.grad.abs().max() > 0


def inputs(kind: str, dims: int) -> Tensor:
    """[2, 3, *S] in some layout."""
    torch.manual_seed(0)
    size = (6, 5, 4)[:dims]
    fmt = spec.channels_last_format(dims + 2)
    if kind == "transposed":
        return torch.randn(2, 3, *reversed(size)).transpose(2, -1)
    if kind == "sliced":
        return torch.randn(3, 5, *(s + 2 for s in size))[1:, 1:4, 1:-1, 1:-1].narrow(
            -1, 0, size[-1]
        )
    if kind == "expanded":
        return torch.randn(2, 3, *size[:-1], 1).expand(2, 3, *size)
    x = torch.randn(2, 3, *size)
    return x.contiguous(memory_format=fmt) if kind == "channels_last" else x


@pytest.mark.parametrize("upstream", ["contiguous", "channels_last", "expanded", "strided"])
@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_of_input_and_upstream_gradient_gives_the_same_numbers(
    backend: str, dims: int, kind: str, upstream: str
) -> None:
    module = fastfilm.ConvNormFiLM2d if dims == 2 else fastfilm.ConvNormFiLM3d
    block = module(3, 4, norm="instance", activation="silu", order="conv-norm-act-film")
    x = inputs(kind, dims)
    fmt = spec.channels_last_format(dims + 2)
    shape = (2, 4, *x.shape[2:])
    if upstream == "expanded":
        dv = torch.rand(()).expand(shape)
    elif upstream == "strided":
        dv = torch.randn(*shape, 2)[..., 0]
    else:
        dv = torch.randn(shape)
        dv = dv.contiguous(memory_format=fmt) if upstream == "channels_last" else dv
    results: list[Any] = []
    for given, grad in ((x, dv), (x.contiguous().clone(), dv.contiguous().clone())):
        leaf = given.detach().requires_grad_()
        with fastfilm.backend(backend):
            v = block(leaf, torch.ones(2, 4))
        results.append((v, *torch.autograd.grad(v, (leaf, block.weight), grad)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    if kind == "channels_last":
        strides = [t.stride() for t in results[0][:2]]
        expected = [torch.empty(t.shape, memory_format=fmt).stride() for t in results[0][:2]]
        if backend != "reference":
            assert strides == expected
        assert strides[0] == expected[0]


def test_sum_backward_through_a_network_in_channels_last() -> None:
    """``sum()`` sends an expanded gradient: every stride of it is 0."""
    net = unet().to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 16, 16).contiguous(memory_format=torch.channels_last)
    found = []
    for make in (lambda v: v.sum(), lambda v: (v * torch.ones_like(v).contiguous()).sum()):
        net.zero_grad()
        make(net(x, torch.eye(3)[:2])).backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
