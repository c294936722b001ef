"""Maps handed on unwritten: pooled, resized, joined, and what they give to code that wants a tensor."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfilm
from fastfilm.nn.blocks import ConvNormFiLM2d
from fastfilm.ops import choice, launchers, maps, reference, spec
from fastfilm.ops.launchers import composed
from fastfilm.ops.maps import DeferredMap, Joined
from fastfilm.ops.maps.assembled import assembled
from fastfilm.ops.spec import Plan, Source, views
from tests.support.kernel_threads import splitting
from tests.support.yardstick import relative_error

CPU = choice.BACKENDS["cpu"]
needs_cpu = pytest.mark.skipif(CPU.unavailable() is not None, reason=str(CPU.unavailable()))
PLAN = Plan("cpu", "composed")


def coefficients(n: int, c: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    coef = torch.randn((7, n, c), generator=generator, dtype=torch.float64)
    return coef.to(dtype)


@st.composite
def drawn_views(
    draw: st.DrawFn, dims: int, longest: int
) -> tuple[tuple[int, ...], views.View | None]:
    """A map's size and a view of it."""
    size = tuple(draw(st.integers(1, longest)) for _ in range(dims))
    kind = draw(st.sampled_from(("none", "max", "avg", "nearest", "nearest-exact", "linear")))
    if kind == "none":
        return size, None
    if kind in ("max", "avg"):
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
        stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        return size, views.pooling(kind, size, kernel, stride, padding, draw(st.booleans()))
    mode = kind if kind != "linear" else ("bilinear", "trilinear")[dims - 2]
    align = draw(st.booleans()) if kind == "linear" else False
    if draw(st.booleans()):
        out = tuple(draw(st.integers(1, longest + 5)) for _ in range(dims))
        return size, views.resizing(mode, size, out, None, align)
    scales = tuple(draw(st.sampled_from((0.5, 1.0, 1.5, 2.0, 2.7))) for _ in range(dims))
    return size, views.resizing(mode, size, None, scales, align)


def run(
    raws: list[Tensor],
    coefs: list[Tensor | None],
    act: str,
    seen: list[views.View | None],
    weights: Tensor,
    plan: Plan | None,
) -> list[Tensor]:
    """The joined map and the gradients at raw maps and coefficients; in PyTorch without a plan."""
    raws = [r.clone().requires_grad_() for r in raws]
    coefs = [None if c is None else c.clone().requires_grad_() for c in coefs]
    if plan is not None:
        sources = [Source(r, c, act, v) for r, c, v in zip(raws, coefs, seen, strict=True)]
        joined = assembled(sources, plan)
    else:
        parts = [
            views.seen(r if c is None else reference.materialise(r, c, act), v)
            for r, c, v in zip(raws, coefs, seen, strict=True)
        ]
        joined = torch.cat(parts, 1)
    (joined * weights.to(joined.dtype)).sum().backward()
    leaves = [*raws, *(c for c in coefs if c is not None)]
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return [joined.detach(), *grads]


def check_view(data: st.DataObject, plan: Plan, dtype: torch.dtype, longest: int) -> None:
    """One drawn map and view against PyTorch in float64, value and gradients."""
    dims = data.draw(st.sampled_from((2, 3)))
    size, view = data.draw(drawn_views(dims, longest))
    assume(views.covered(view, size))  # else it is written
    n, c = data.draw(st.sampled_from((1, 2))), data.draw(st.sampled_from((1, 3, 8, 17, 33)))
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn((n, c, *size), generator=generator, dtype=torch.float64).to(dtype)
    pending = data.draw(st.booleans())
    coef = coefficients(n, c, generator, dtype) if pending else None
    act = data.draw(st.sampled_from(("relu", "leaky_relu", "silu"))) if pending else "none"
    out = size if view is None else view.size
    # behind a channel that is not the map's: it starts somewhere in the result
    other = torch.randn((n, 1, *out), generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn((n, c + 1, *out), generator=generator, dtype=torch.float64)
    wide = None if coef is None else coef.double()
    expected = run([other.double(), raw.double()], [None, wide], act, [None, view], weights, None)
    split = data.draw(st.sampled_from((1, 2, 3))) if plan == PLAN else 0
    with splitting(split) if split else contextlib.nullcontext():
        found = run([other, raw], [None, coef], act, [None, view], weights, plan)
    assert found[0].shape == expected[0].shape
    assert found[0].is_contiguous(memory_format=spec.channels_last_format(dims + 2))
    for a, b in zip(found, expected, strict=True):
        # PyTorch computes linear positions in float32, also for float64 maps
        linear = view is not None and view.kind == "linear"
        loose = 1e-5 if linear or dtype == torch.float32 else 1e-10
        assert relative_error(a, b) <= loose


@needs_cpu
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_views_are_pytorchs(data: st.DataObject) -> None:
    check_view(data, PLAN, torch.float64, 9)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_views_by_triton_are_pytorchs(data: st.DataObject) -> None:
    triton = choice.BACKENDS["triton"]
    if triton.unavailable() is not None or not choice.interpreting():
        pytest.skip(triton.unavailable() or "the interpreter is not active")
    check_view(data, Plan("triton", "composed"), torch.float32, 4)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [(16, 5), (3, 3)])
def test_two_sources_side_by_side(dtype: torch.dtype, channels: tuple[int, int]) -> None:
    """An upsampled map and a skip, as a decoder joins them, by the yardstick."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((5, 4), (9, 8))
    raws = [
        torch.randn((2, c, *s), generator=generator, dtype=torch.float64).to(dtype)
        for c, s in zip(channels, sizes, strict=True)
    ]
    coefs: list[Tensor | None] = [
        coefficients(2, c, generator, torch.float32).mul_(0.5) for c in channels
    ]
    up = views.resizing("bilinear", sizes[0], sizes[1], None, True)
    weights = torch.randn((2, sum(channels), *sizes[1]), generator=generator, dtype=torch.float64)
    exact = run(
        [r.double() for r in raws],
        [None if c is None else c.double() for c in coefs],
        "silu",
        [up, None],
        weights,
        plan=None,
    )
    eager = run(raws, coefs, "silu", [up, None], weights, plan=None)
    found = run(raws, coefs, "silu", [up, None], weights, plan=PLAN)
    for a, b, x in zip(found, eager, exact, strict=True):
        bound = 1.5 * relative_error(b, x) + torch.finfo(dtype).eps
        assert relative_error(a, x) <= bound


@needs_cpu
def test_a_maximum_of_nan_is_nan_and_its_gradient_goes_to_the_first_of_equals() -> None:
    raw = torch.zeros(1, 2, 4, 4)
    raw[0, 0, 1, 1] = float("nan")
    view = views.pooling("max", (4, 4), (2, 2), (2, 2), (0, 0))
    ours = composed.write(launchers.of("cpu"), [Source(raw, None, "none", view)])
    assert torch.equal(ours.isnan(), F.max_pool2d(raw, 2).isnan())
    weights = torch.arange(8.0).reshape(1, 2, 2, 2) + 1
    raw = torch.zeros(1, 2, 4, 4)
    found = run([raw], [None], "none", [view], weights, plan=PLAN)
    expected = run([raw], [None], "none", [view], weights, plan=None)
    assert torch.equal(found[1], expected[1])


@needs_cpu
@pytest.mark.parametrize(
    ("mode", "length", "out"),
    [("nearest", 26, 22), ("nearest-exact", 26, 11), ("nearest-exact", 18, 33)],
)
def test_rounding_decides_on_the_border_of_two_positions_as_in_pytorch(
    mode: str, length: int, out: int
) -> None:
    raw = torch.arange(3.0 * length).reshape(1, 1, 3, length)
    view = views.resizing(mode, (3, length), (3, out), None, False)
    ours = composed.write(launchers.of("cpu"), [Source(raw, None, "none", view)])
    assert torch.equal(ours, F.interpolate(raw, size=(3, out), mode=mode))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_maximum_compares_values_as_they_are_written(backend: str) -> None:
    """In bfloat16 512 + 1 and 512 + 1.0078 are one number: the gradient goes to the first."""
    own = choice.BACKENDS[backend]
    if own.unavailable() is not None or (backend == "triton" and not choice.interpreting()):
        pytest.skip(own.unavailable() or "the interpreter is not active")
    raw = torch.tensor([1.0, 1.0078125, 0.0, 1.0]).reshape(1, 1, 2, 2).to(torch.bfloat16)
    coef = torch.tensor([1.0, 512.0, 1.0, 0.0, 0.0, 0.0, 0.0]).reshape(7, 1, 1)
    view = views.pooling("max", (2, 2), (2, 2), (2, 2), (0, 0))
    weights = torch.ones(1, 1, 1, 1)
    found = run([raw], [coef], "relu", [view], weights, plan=Plan(backend, "composed"))
    expected = run([raw], [coef], "relu", [view], weights, plan=None)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@needs_cpu
def test_negative_scale_pools_the_smallest_raw_value() -> None:
    raw = torch.randn(1, 3, 6, 6)
    coef = torch.zeros(7, 1, 3)
    coef[spec.A], coef[spec.G] = 1.0, torch.tensor([-2.0, 0.0, 1.0])
    view = views.pooling("max", (6, 6), (2, 2), (2, 2), (0, 0))
    ours = composed.write(launchers.of("cpu"), [Source(raw, coef, "none", view)])
    torch.testing.assert_close(
        ours[:, :1], -2 * -F.max_pool2d(-raw[:, :1], 2), rtol=1e-6, atol=1e-6
    )
    assert not ours[:, 1].any()


STEPS = (
    "none",
    "max",
    "avg",
    "nearest",
    "linear",
    "concat",
    "sum",
    "residual",
    "transposed",
    "convolution",
)


class Graph(nn.Module):
    """A random chain of blocks with a consumer between each two of them."""

    def __init__(self, steps: list[str], norm: str, order: str, deferred: bool) -> None:
        super().__init__()
        self.steps, self.deferred = steps, deferred
        channels = [3]
        blocks = []
        for step in ["none", *steps]:
            ci = channels[-1] * (2 if step == "concat" else 1)
            blocks.append(
                ConvNormFiLM2d(ci, 4, norm=norm, order=order, activation="silu", num_groups=2)
            )
            channels.append(4)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.plain = nn.Conv2d(4, 4, 3, padding=1)
        self.side = ConvNormFiLM2d(4, 4, 1, norm=norm, order=order, activation=None, num_groups=2)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        v: Any = self.blocks[0](x, gamma, beta, deferred=self.deferred)
        for step, block in zip(self.steps, self.blocks[1:], strict=True):
            if step == "max":
                v = F.max_pool2d(v, 3, stride=2, padding=1)
            elif step == "avg":
                v = F.avg_pool2d(v, 2)
            elif step == "nearest":
                v = F.interpolate(v, scale_factor=2.0)
            elif step == "linear":
                size = [s + 3 for s in v.shape[2:]]
                v = F.interpolate(v, size=size, mode="bilinear", align_corners=True)
            elif step == "concat":
                shape = tuple(v.shape[2:])
                other = F.interpolate(v, size=shape, mode="bilinear", align_corners=False)
                v = torch.cat([other, v], 1)
            elif step == "sum":
                v = v + torch.tanh(maps.plain(v))
            elif step == "residual":
                v = F.leaky_relu(v + self.side(v, gamma, beta, deferred=self.deferred), 0.2)
            elif step == "transposed":
                v = self.up(v)
            elif step == "convolution":
                v = self.plain(F.avg_pool2d(v, 2, 1))
            v = block(v, gamma, beta, deferred=self.deferred)
        return maps.plain(v)


@needs_cpu
@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.sampled_from(STEPS),
        min_size=1,
        max_size=4,
    ),
    norm=st.sampled_from(spec.NORMS),
    order=st.sampled_from(spec.ORDERS),
    training=st.booleans(),
)
def test_random_graphs_of_consumers(
    steps: list[str], norm: str, order: str, training: bool
) -> None:
    assume(sum(s in ("max", "avg") for s in steps) <= 2)
    assume(sum(s in ("nearest", "transposed") for s in steps) <= 2)
    check_graph(steps, norm, order, training)


@needs_cpu
@pytest.mark.parametrize("order", spec.ORDERS)
@pytest.mark.parametrize("norm", spec.NORMS)
def test_every_consumer_behind_every_norm_and_order(norm: str, order: str) -> None:
    for step in STEPS:
        check_graph([step], norm, order, training=True)


def check_graph(steps: list[str], norm: str, order: str, training: bool) -> None:
    """Value and gradients of a graph of unwritten maps are those of the reference, in float64."""
    torch.manual_seed(0)
    ours = Graph(steps, norm, order, deferred=True).double().train(training)
    theirs = Graph(steps, norm, order, deferred=False).double().train(training)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 17, 16, dtype=torch.float64)
    gamma, beta = torch.randn(2, 2, 4, dtype=torch.float64).unbind()
    results = []
    for model, backend in ((ours, "cpu"), (theirs, "reference")):
        leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
        with fastfilm.backend(backend):
            v = model(*leaves)
            weights = torch.cos(torch.arange(v.numel(), dtype=torch.float64)).reshape(v.shape)
            (v * weights).sum().backward()
        grads = [t.grad for t in leaves] + [p.grad for p in model.parameters()]
        with fastfilm.backend(backend), torch.no_grad():
            again = model.eval()(x, gamma, beta)
        results.append([v.detach(), again, *grads])
    linear = bool({"linear", "concat"} & set(steps))
    for a, b in zip(*results, strict=True):
        if b is None or b.norm() < 1e-8:
            assert a is None or a.norm() < 1e-6
            continue
        assert a is not None and relative_error(a, b) <= (1e-4 if linear else 1e-9)


@needs_cpu
def test_ordinary_code_gets_a_tensor_written_once() -> None:
    block = ConvNormFiLM2d(2, 4, norm="instance")
    v = block(torch.randn(1, 2, 8, 8), deferred=True)
    assert isinstance(v, DeferredMap)
    t = v.tensor()
    assert v.tensor() is t and v.materialise() is t
    assert torch.equal(torch.relu(v), torch.relu(t))
    for a, b in ((v + 1, t + 1), (2 * v, 2 * t), (v - t, t - t), (-v, -t), (v[0], t[0])):
        assert torch.equal(a, b)
    assert v.mean().item() == t.mean().item() and v.size() == t.size() and len(v) == 1
    conv = nn.Conv2d(4, 1, 1)
    assert torch.equal(conv(v), conv(t))
    assert "DeferredMap" in repr(v)


@needs_cpu
@pytest.mark.parametrize(
    "call",
    [
        lambda v: F.avg_pool2d(v, 2, ceil_mode=True),
        lambda v: F.avg_pool2d(v, 2, divisor_override=3),
        lambda v: F.max_pool2d(v, 2, ceil_mode=True),
        lambda v: F.max_pool2d(v, 3, stride=1, dilation=2),
        lambda v: F.max_pool2d(v, 2, return_indices=True)[0],
        lambda v: F.interpolate(v, size=(4, 3), mode="bilinear", antialias=True),
        lambda v: F.interpolate(v, scale_factor=0.7, recompute_scale_factor=True),
        lambda v: F.interpolate(v, size=(8, 8), mode="bicubic"),
    ],
)
def test_what_a_view_does_not_cover_is_pytorchs(call: Callable[[Any], Tensor]) -> None:
    v = ConvNormFiLM2d(2, 4, norm="instance")(torch.randn(1, 2, 7, 9), deferred=True)
    assert torch.equal(maps.plain(call(v)), call(v.tensor().clone()))


@needs_cpu
def test_modules_of_pytorch_keep_maps_deferred_and_the_result_is_theirs() -> None:
    block = ConvNormFiLM2d(2, 4, norm="instance")
    x = torch.randn(1, 2, 8, 8)
    expected = block(x)
    assert isinstance(expected, Tensor)
    for module in (
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        nn.Upsample(size=(5, 11)),
    ):
        seen = module(block(x, deferred=True))
        assert isinstance(seen, DeferredMap) and seen.view is not None, module
        torch.testing.assert_close(seen.tensor(), module(expected), rtol=1e-5, atol=1e-6)
    # what is not covered is written, silently right
    for module in (nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2)):
        written = module(block(x, deferred=True))
        assert isinstance(written, Tensor), module
        torch.testing.assert_close(written, module(expected), rtol=1e-5, atol=1e-6)


@needs_cpu
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_pytorch_read_maps_unwritten(transposed: bool, dims: int) -> None:
    torch.manual_seed(0)
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    conv: Any = kinds[2 * transposed + dims - 2](4, 6, 3, stride=2, padding=1, groups=2)
    block = (ConvNormFiLM2d, fastfilm.ConvNormFiLM3d)[dims - 2](2, 4, norm="instance")
    x = torch.randn(2, 2, *(7, 6, 5)[:dims])
    shown: list[Callable[[Any], Any]] = [lambda v: v, lambda v: F.interpolate(v, scale_factor=2.0)]
    for show in shown:
        v = show(block(x, deferred=True))
        kept: set[tuple[int, ...]] = set()

        def pack(t: Tensor, kept: set[tuple[int, ...]] = kept) -> Tensor:
            kept.add(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found = conv(v)
        assert v._tensor is None and tuple(v.raw.shape) in kept
        expected = conv(show(block(x)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        parameters = (conv.weight, conv.bias, block.weight, block.norm_weight)
        ours = torch.autograd.grad(found.square().sum(), parameters)
        theirs = torch.autograd.grad(expected.square().sum(), parameters)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    # another type, or a padding by name, is PyTorch's
    v = block(x, deferred=True)
    with pytest.raises(RuntimeError):
        conv.double()(v)
    same = (nn.Conv2d, nn.Conv3d)[dims - 2](4, 2, 3, padding="same")
    torch.testing.assert_close(same(v), same(block(x)), rtol=1e-5, atol=1e-5)


@needs_cpu
def test_joined_maps_that_do_not_fit_raise_as_pytorch_does() -> None:
    a = ConvNormFiLM2d(2, 4, norm="instance")(torch.randn(1, 2, 8, 8), deferred=True)
    assert isinstance(maps.join([a, torch.randn(1, 3, 8, 8)]), Joined)
    assert torch.cat([a, torch.randn(1, 3, 8, 8)], dim=1).shape == (1, 7, 8, 8)
    assert torch.cat([a, torch.randn(1, 4, 8, 8)]).shape == (2, 4, 8, 8)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        maps.join([a, torch.randn(1, 3, 9, 8)])


@needs_cpu
@pytest.mark.parametrize("how", ["plain", "checkpoint", "autocast", "hooks"])
def test_a_network_is_the_same_deferred_and_not(how: str) -> None:
    torch.manual_seed(0)
    lazy = fastfilm.FiLMedUNet(1, 2, depth=2, base_filters=4, metadata_size=3)
    written = fastfilm.FiLMedUNet(1, 2, depth=2, base_filters=4, metadata_size=3, deferred=False)
    written.load_state_dict(lazy.state_dict())
    x, rows = torch.randn(2, 1, 16, 20), torch.eye(3)[:2]
    exact = copy.deepcopy(written).double()
    hooked: list[Any] = []
    found = []
    for model in (lazy, written, exact):
        if how == "hooks" and model is not exact:
            for block in model.encoder:
                block.register_forward_hook(lambda m, i, o: hooked.append(maps.plain(o).sum()))
        image = x.to(next(model.parameters()).dtype)
        with (
            fastfilm.backend("reference" if model is exact else None),
            torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and model is not exact),
        ):
            out = (
                checkpoint(model, image, rows, use_reentrant=False)
                if how == "checkpoint"
                else model(image, rows)
            )
            # a checkpoint runs the forward pass again
            out.double().square().mean().backward()
        grads = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        found.append((out.detach().double(), grads))
    for ours, theirs, truth in zip(*found, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth) + 1e-6
    assert len(hooked) == (4 if how == "hooks" else 0)


@needs_cpu
def test_only_raw_convolution_outputs_are_kept() -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=3, base_filters=16, metadata_size=3).train()
    owned = {p.data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    raws: list[int] = []
    for module in net.modules():
        if isinstance(module, ConvNormFiLM2d):
            module.register_forward_hook(lambda m, i, o: raws.append(4 * o.shape.numel()))
    x = torch.randn(1, 1, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x, torch.eye(3)[:1])
    assert sum(kept.values()) <= sum(raws) + 4 * x.numel()
    assert out.requires_grad


@needs_cpu
def test_backward_of_joined_maps_drops_each_map_once_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels, made, dropped = launchers.of("cpu"), [], []
    moments_backward, gather_backward = kernels.moments_backward, kernels.gather_backward

    def watch_made(*given: Any) -> Any:
        found = moments_backward(*given)
        made.append(weakref.ref(found[0]))
        return found

    def watch_gathered(*given: Any) -> Any:
        dropped.append([m() is None for m in made])
        return gather_backward(*given)

    torch.manual_seed(0)
    first, second, reader = (ConvNormFiLM2d(c, 8, norm="instance") for c in (3, 3, 16))
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    joined = torch.cat([first(x, deferred=True), second(x, deferred=True)], 1)
    out = reader(joined)
    monkeypatch.setattr(kernels, "moments_backward", watch_made)
    monkeypatch.setattr(kernels, "gather_backward", watch_gathered)
    out.sum().backward()
    assert dropped == [[True], [True]]


def test_triton_graph_is_the_reference() -> None:
    """A maximum over windows that overlap is PyTorch's business; the rest is Triton's, interpreted."""
    triton = choice.BACKENDS["triton"]
    if triton.unavailable() is not None or not choice.interpreting():
        pytest.skip(triton.unavailable() or "the interpreter is not active")
    torch.manual_seed(0)
    steps = ["max", "concat", "residual"]
    ours = Graph(steps, "instance", spec.ORDERS[1], deferred=True)
    theirs = Graph(steps, "instance", spec.ORDERS[1], deferred=False)
    theirs.load_state_dict(ours.state_dict())
    x, gamma, beta = torch.randn(1, 3, 8, 7), torch.randn(1, 4), torch.randn(1, 4)
    found = []
    for model, backend in ((ours, "triton"), (theirs, "reference")):
        x_ = x.clone().requires_grad_()
        with fastfilm.backend(backend):
            v = model(x_, gamma, beta)
            v.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([v.detach(), x_.grad, *grads])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) <= 1e-4 or b.norm() < 1e-3
