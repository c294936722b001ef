"""The vendor's convolutions: single small 3D samples take oneDNN's, with the same values and gradients."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastfilm.ops import reference, spec
from fastfilm.ops.spec import Geometry
from fastfilm.ops.vendor import convolutions as vendor
from fastfilm.ops.vendor import faults

from ..support.yardstick import relative_error


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(3, 8), (80, 72)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_single_small_volume_has_eagers_values_and_gradients(
    stride: int, channels: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ci, co = channels
    x, w = torch.randn(1, ci, 6, 7, 8), torch.randn(co, ci, 3, 3, 3)
    b = torch.randn(co) if bias else None
    geometry = Geometry.ordinary((stride,) * 3, (1,) * 3)
    used = []
    direct = torch.ops.aten.mkldnn_convolution.default
    monkeypatch.setattr(
        torch.ops.aten.mkldnn_convolution, "default", lambda *a: used.append(1) or direct(*a)
    )
    channels_last = x.to(memory_format=torch.channels_last_3d)
    ours = vendor.convolution(channels_last, w, b, geometry)
    exact_enough = ci < 32 or "AVX512" in torch.backends.cpu.get_cpu_capability()
    assert used == [1] * (torch.backends.mkldnn.is_available() and exact_enough)
    dy = torch.randn(ours.shape)
    exact = torch.convolution(x.double(), w.double(), None if b is None else b.double(), *geometry)
    eager = torch.convolution(x, w, b, *geometry)
    values = [(ours, eager, exact)]
    backward = torch.ops.aten.convolution_backward
    args = (None, *geometry, [True, True, False])
    values += zip(
        vendor.convolution_backward(dy, channels_last, w, geometry, (True, True)),
        backward(dy, x, w, *args)[:2],
        backward(dy.double(), x.double(), w.double(), *args)[:2],
        strict=True,
    )
    for mine, theirs, true in values:
        assert relative_error(mine, true) <= 1.5 * relative_error(theirs, true) + 1.2e-7
    only, none = vendor.convolution_backward(dy, channels_last, w, geometry, (True, False))
    assert none is None
    assert only.shape == x.shape


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dims", [2, 3])
def test_kernels_that_stand_in_padding(dims: int, kernel: int, transposed: bool) -> None:
    """PyTorch returns garbage for some of these, or dies, in any layout; eager is no yardstick then."""
    generator = torch.Generator().manual_seed(0)
    checked = 0
    sizes = itertools.product((1, 2, 6), repeat=dims)
    dtypes = itertools.cycle((torch.bfloat16, torch.float16, torch.float32))
    for size, stride, padding in itertools.product(sizes, (1, 2, 3), (1, 2)):
        steps, ones, zeros = (stride,) * dims, (1,) * dims, (0,) * dims
        geometry = Geometry(steps, (padding,) * dims, ones, transposed, zeros, 1)
        out = spec.conv_output_size(size, [kernel] * dims, *geometry[:4])
        if min(out) < 1:
            continue
        channels = (3, 8) if transposed else (8, 3)
        dtype = next(dtypes)
        x = torch.randn(2, 3, *size, generator=generator).to(dtype)
        w = torch.randn(*channels, *[kernel] * dims, generator=generator).to(dtype)
        e = torch.randn(2, 8, *out, generator=generator).to(dtype)
        exact = torch.convolution(x.double(), w.double(), None, *geometry)
        backward = torch.ops.aten.convolution_backward
        args = (None, *geometry, [True, True, False])
        truths = [exact, *backward(e.double(), x.double(), w.double(), *args)[:2]]
        found = [vendor.convolution(x, w, None, geometry)]
        found += vendor.convolution_backward(e, x, w, geometry, (True, True))
        found.append(reference.convolution(x, w, None, geometry))
        truths.append(exact)
        bounds = [4e-3] * 4
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # PyTorch's own kernels then: sound, but their sums are rounded to bfloat16 several times
            y = torch.convolution(x, w, None, *geometry)
            eager = [y, *backward(e, x, w, *args)[:2], y]
            errors = [relative_error(*pair) for pair in zip(eager, truths, strict=True)]
            bounds = [max(4e-3, 1.5 * error) for error in errors]
        for mine, true, bound in zip(found, truths, bounds, strict=True):
            assert relative_error(mine, true) <= bound or not true.any(), (size, geometry)
        checked += 1
    assert checked >= 10


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, bool]]:
    """Type of each convolution that PyTorch is asked for from now on, and whether it is padded."""
    seen = []
    forward, backward = torch.convolution, torch.ops.aten.convolution_backward.default

    def convolution(*a: Any) -> Tensor:
        seen.append((a[0].dtype, any(a[4])))
        return forward(*a)

    def convolution_backward(*a: Any) -> tuple[Tensor, ...]:
        seen.append((a[0].dtype, any(a[5])))
        return backward(*a)

    monkeypatch.setattr(torch, "convolution", convolution)
    monkeypatch.setattr(torch.ops.aten.convolution_backward, "default", convolution_backward)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "transposed", "longer"),
    [
        ((2, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), 1, False, True),
        ((2, 8, 8), (3, 1, 1), (1, 1, 1), (1, 0, 0), 1, False, True),
        ((2, 8, 8), (3, 3, 3), (1, 2, 2), (1, 1, 1), 1, False, True),
        ((2, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), 1, True, True),
        ((4, 8, 8), (5, 5, 5), (1, 1, 1), (2, 2, 2), 1, False, True),
        ((4, 8, 8), (7, 3, 3), (1, 1, 1), (3, 1, 1), 1, False, True),
        ((4, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), 2, False, True),
        ((2, 4, 4), (5, 5, 5), (1, 1, 1), (1, 1, 1), 1, True, True),
        ((8, 2, 2), (3, 3, 3), (1, 1, 1), (1, 1, 1), 1, False, True),
        ((2, 8), (3, 3), (1, 1), (1, 1), 1, False, True),
        ((2, 4, 4), (4, 4, 4), (2, 2, 2), (1, 1, 1), 1, True, False),
        ((3, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), 1, False, False),
        ((2, 8, 8), (1, 3, 3), (1, 1, 1), (0, 1, 1), 1, False, False),
        ((5, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), 2, False, False),
    ],
)
def test_weight_gradients_of_kernels_longer_than_the_map_are_padded_before_and_float32(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: int,
    transposed: bool,
    longer: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN's kernels for AVX-512 read and write elsewhere there; they need that CPU to be seen."""
    zero = (0,) * len(size)
    geometry = Geometry(stride, padding, (dilation,) * len(size), transposed, zero, 1)
    x, w = torch.randn(2, 8, *size).to(dtype), torch.randn(8, 8, *kernel).to(dtype)
    seen = _asked(monkeypatch)
    y = vendor.convolution(x, w, None, geometry)
    vendor.convolution_backward(y, x, w, geometry, (True, False))
    vendor.convolution_backward(y, x, w, geometry, (True, True))
    reference.convolution(x, w, None, geometry)
    plain = (dtype, True)
    careful = (torch.float32, False) if longer else plain
    assert seen == [plain, plain, careful, careful]


def test_no_weight_gradient_has_a_kernel_that_reaches_over_both_ends_of_the_padded_map() -> None:
    """There oneDNN's loops go wrong; the forms of ``test_kernels_that_stand_in_padding`` are among these."""
    numbers = range(1, 7), range(1, 8), (1, 2, 3), range(1, 4), (1, 2), (False, True), range(3)
    reaching = 0
    for size, k, stride, p, d, transposed, axis in itertools.product(*numbers):
        whole, kernel, strides, padding, dilation = ([7] * 3, [1] * 3, [1] * 3, [0] * 3, [1] * 3)
        whole[axis], kernel[axis], strides[axis], padding[axis], dilation[axis] = (
            size,
            k,
            stride,
            p,
            d,
        )
        sizes = tuple(strides), tuple(padding), tuple(dilation)
        geometry = Geometry(*sizes, transposed, (0,) * 3, 1)
        out = geometry.output_size(whole, kernel)[axis]
        if out < 1:
            continue
        read, positions = (out, size) if transposed else (size, out)
        starts = (i * stride - p for i in range(positions))
        if not any(start < 0 and start + (k - 1) * d >= read for start in starts):
            continue
        reaching += 1
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x, w = torch.empty(1, 1, *whole, dtype=dtype), torch.empty(1, 1, *kernel, dtype=dtype)
            wide, before = faults.precautions(x, w, geometry, weight_gradient=True)
            assert before
            assert wide == (dtype != torch.float32)
    assert reaching > 500


def test_graphs_for_all_sizes_convolve_16_bit_types_in_float32() -> None:
    """The sizes are not known when the graph is made, so none of them can be seen to be safe."""

    def both(x: Tensor, w: Tensor) -> Tensor:
        return reference.convolution(x, w, None, Geometry.ordinary((1,) * 3, (1,) * 3))

    x, w = torch.randn(2, 4, 5, 6, 7).bfloat16(), torch.randn(4, 4, 3, 3, 3).bfloat16()
    graph = make_fx(both, tracing_mode="symbolic")(x, w)
    nodes = [n for n in graph.graph.nodes if n.target == torch.ops.aten.convolution.default]
    assert [n.args[0].meta["val"].dtype for n in nodes] == [torch.float32]
    small = torch.randn(2, 4, 2, 6, 7).bfloat16()
    assert torch.equal(graph(small, w), both(small, w))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [(4, 4), (6, 6), (4, 8), (20, 20)])
@pytest.mark.parametrize("dims", [2, 3])
def test_grouped_convolutions_round_no_more_than_contiguous_ones(
    dims: int, channels: tuple[int, int], transposed: bool
) -> None:
    """Channels of a group that are not whole vectors: oneDNN's channels-last form has up to 4 times the error."""
    ci, co = channels
    ones = (1,) * dims
    geometry = Geometry(ones, ones, ones, transposed, (0,) * dims, 3)
    layout = spec.channels_last_format(dims + 2)
    backward = torch.ops.aten.convolution_backward.default
    args = (None, *geometry, [True, True, False])
    ours, theirs = [], []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3 * ci, *[24 if dims == 2 else 8] * dims, generator=generator)
        pair = (3 * ci, co) if transposed else (3 * co, ci)
        w = torch.randn(*pair, *[3] * dims, generator=generator)
        e = torch.randn(2, 3 * co, *x.shape[2:], generator=generator)
        exact = torch.convolution(x.double(), w.double(), None, *geometry)
        truths = [exact, *backward(e.double(), x.double(), w.double(), *args)[:2]]
        eager = [torch.convolution(x, w, None, *geometry), *backward(e, x, w, *args)[:2]]
        x, e = x.contiguous(memory_format=layout), e.contiguous(memory_format=layout)
        found = [vendor.convolution(x, w, None, geometry)]
        found += vendor.convolution_backward(e, x, w, geometry, (True, True))
        ours.append([relative_error(*pair) for pair in zip(found, truths, strict=True)])
        theirs.append([relative_error(*pair) for pair in zip(eager, truths, strict=True)])
    for mine, eager_error in zip(
        torch.tensor(ours).median(0)[0], torch.tensor(theirs).median(0)[0], strict=True
    ):
        assert mine <= 1.5 * eager_error


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_idle_taps_are_those_without_a_gradient(
    kernel: int, stride: int, dilation: int, padding: int
) -> None:
    for size in range(1, 9):
        if size + 2 * padding < (kernel - 1) * dilation + 1:
            continue
        geometry = ((stride,), (padding,), (dilation,))
        w = torch.ones(1, 1, kernel, requires_grad=True)
        y = torch.nn.functional.conv1d(torch.ones(1, 1, size), w, None, *(g[0] for g in geometry))
        y.sum().backward()
        assert w.grad is not None
        idle = bool((w.grad == 0).any())
        assert spec.has_idle_taps((size,), (kernel,), *geometry) == idle, size


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [64, 96, 256])
@pytest.mark.parametrize("dims", [2, 3])
def test_wide_convolutions_round_no_more_than_contiguous_ones(
    dims: int, channels: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, channels, *[8] * dims), torch.randn(64, channels, *[3] * dims)
    w = w.transpose(0, 1).contiguous() if transposed else w
    ones = (1,) * dims
    geometry = Geometry(ones, ones, ones, transposed, (0,) * dims, 1)
    exact = torch.convolution(x.double(), w.double(), None, *geometry)
    e = torch.randn(exact.shape)
    layout = spec.channels_last_format(dims + 2)
    own, given = x.contiguous(memory_format=layout), e.contiguous(memory_format=layout)
    pairs = [
        (
            vendor.convolution(own, w, None, geometry),
            torch.convolution(x, w, None, *geometry),
            exact,
        )
    ]
    backward = torch.ops.aten.convolution_backward.default
    args = (None, *geometry, [True, True, False])
    pairs += zip(
        vendor.convolution_backward(given, own, w, geometry, (True, True)),
        backward(e, x, w, *args)[:2],
        backward(e.double(), x.double(), w.double(), *args)[:2],
        strict=True,
    )
    for ours, eager, true in pairs:
        assert relative_error(ours, true) <= 1.5 * relative_error(eager, true) + 1.2e-7


def test_strided_pointwise_convolutions_do_not_damage_the_heap() -> None:
    """In a process of its own, whose allocator checks itself: PyTorch's channels-last form dies there."""
    code = (
        "import torch, fastfilm\n"
        "x = torch.randn(2, 8, 64, 64).contiguous(memory_format=torch.channels_last)\n"
        "w = torch.randn(16, 8, 1, 1, requires_grad=True)\n"
        "for _ in range(10):\n"
        "    fastfilm.conv_norm_film(x, w, stride=2, norm='instance').square().sum().backward()\n"
    )
    environment = {**os.environ, "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_what_is_remembered_holds_for_one_form_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight gradient needs a padded map here, and the gradient at the map alone does not."""
    monkeypatch.setattr(vendor, "_routes", {})
    padded, pad = [], faults.padded

    def note(x: Tensor, padding: tuple[int, ...]) -> Tensor:
        padded.append(True)
        return pad(x, padding)

    monkeypatch.setattr(faults, "padded", note)
    torch.manual_seed(0)
    x, w, e = torch.randn(2, 4, 2, 6, 6), torch.randn(4, 4, 3, 3, 3), torch.randn(2, 4, 2, 6, 6)
    geometry = Geometry.ordinary((1,) * 3, (1,) * 3)
    for needs in ((True, False), (True, True), (True, False)):
        padded.clear()
        vendor.convolution_backward(e, x, w, geometry, needs)
        assert bool(padded) == needs[1], needs
    # and as many routes as there are forms, each found again
    forms = len(vendor._routes)
    for size in (6, 7, 6):
        y = torch.randn(1, 4, size, size)
        vendor.convolution(y, torch.ones(4, 4, 3, 3), None, Geometry.ordinary((1, 1), (1, 1)))
    assert len(vendor._routes) == forms + 2
