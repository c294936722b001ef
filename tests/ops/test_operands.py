"""Operands in strange layouts, amid memory that is not theirs, give what dense ones give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfilm
from fastfilm.ops import add_act, spec
from fastfilm.ops.block import Call, PreparedWeight, run
from fastfilm.ops.spec import Geometry, Options, TailTensors
from fastfilm.ops.vendor import convolutions as vendor
from tests.ops.test_amp_and_layouts import BACKENDS
from tests.support.yardstick import relative_error

_FOREIGN = 1e30
"""What lies around the operands' own values, where memory has room for a number of its type."""


def _around(t: Tensor, room: int) -> Tensor:
    return torch.full((*t.shape, room), _FOREIGN, dtype=t.dtype, device=t.device)


def column(t: Tensor) -> Tensor:
    """One column of a larger tensor."""
    wide = _around(t, 3)
    wide[..., 1] = t
    return wide[..., 1]


def shifted(t: Tensor) -> Tensor:
    """Dense, one element behind the start of its memory."""
    wide = torch.full((t.numel() + 5,), _FOREIGN, dtype=t.dtype)
    wide[1 : t.numel() + 1] = t.flatten()
    return wide[1 : t.numel() + 1].view(t.shape)


def reversed_order(t: Tensor) -> Tensor:
    """Dense, the last dimension outermost."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def negated(t: Tensor) -> Tensor:
    """PyTorch negates what is in memory when it reads it."""
    return torch._neg_view(-t)


def conjugated(t: Tensor) -> Tensor:
    """The imaginary part of a conjugate: every other number, negated on reading."""
    wide = t.float() if t.dtype.itemsize == 2 else t
    part = torch.complex(torch.full_like(wide, _FOREIGN), -wide).conj().imag
    return part if part.dtype == t.dtype else negated(t)


def odd(t: Tensor) -> Tensor:
    """Any strides where a dimension has one element."""
    steps = zip(t.shape, t.stride(), strict=True)
    return t.as_strided(t.shape, [7 + 3 * i if n == 1 else s for i, (n, s) in enumerate(steps)])


def expanded(t: Tensor) -> Tensor:
    """One row for all, in one place of memory."""
    return column(t[:1]).expand_as(t)


def one_number(t: Tensor) -> Tensor:
    """One number for all."""
    return shifted(t.flatten()[:1]).view((1,) * t.dim()).expand_as(t)


def overlapping(t: Tensor) -> Tensor:
    """Rows that share all but one element."""
    return shifted(t.flatten()).as_strided(t.shape, [1] * t.dim())


def zeros(t: Tensor) -> Tensor:
    """Zeros without memory."""
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


Layout = Callable[[Tensor], Tensor]
READ: tuple[Layout, ...] = (
    column,
    shifted,
    reversed_order,
    negated,
    conjugated,
    odd,
    expanded,
    one_number,
    overlapping,
)
WRITTEN: tuple[Layout, ...] = (column, shifted, negated, conjugated)
"""Layouts that can be written to."""

FORMS: dict[str, dict[str, Any]] = {
    "one 3D sample": {"shape": (1, 3, 3, 4, 4), "weight": (4, 3, 3, 3, 3), "padding": 1},
    "pointwise groups": {"shape": (2, 4, 5, 4), "weight": (6, 2, 1, 1), "groups": 2},
    "depthwise": {"shape": (1, 4, 1, 4, 5), "weight": (4, 1, 1, 3, 3), "groups": 4},
    "one channel": {"shape": (1, 1, 6, 5), "weight": (4, 1, 3, 1), "padding": (1, 0)},
    "transposed": {
        "shape": (1, 4, 3, 4),
        "weight": (4, 3, 2, 2),
        "stride": 2,
        "transposed": True,
    },
    "transposed groups": {
        "shape": (1, 4, 2, 3, 4),
        "weight": (4, 2, 1, 2, 2),
        "stride": (1, 2, 2),
        "transposed": True,
        "groups": 2,
    },
}
OPERANDS = ("x", "weight", "bias", "norm_weight", "norm_bias", "gamma", "beta", "slope", "dy")
CONSTANT = ("dropout_mask", "running_mean", "running_var")


def operands(form: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Values of every operand of a call, and its options."""
    options = dict(FORMS[form])
    shape, weight = options.pop("shape"), options.pop("weight")
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=generator).to(kind)

    co = weight[1] * options.get("groups", 1) if options.get("transposed") else weight[0]
    small = torch.float64 if dtype == torch.float64 else torch.float32
    given = {"x": draw(*shape, kind=dtype), "weight": draw(*weight, kind=dtype)}
    given |= {k: draw(co, kind=small) for k in ("bias", "norm_weight", "norm_bias", "slope")}
    given |= {k: draw(shape[0], co, kind=small) for k in ("gamma", "beta")}
    given["dropout_mask"] = (draw(shape[0], co) > -0.5).to(small) / 0.75
    given |= {"running_mean": draw(co, kind=small), "running_var": draw(co, kind=small).abs() + 1}
    return given, options


def results(
    given: dict[str, Tensor], options: dict[str, Any], twice: bool = False
) -> dict[str, Tensor]:
    """Output, gradients, running statistics, and with ``twice`` the gradients of a gradient's norm."""
    leaves = {
        k: t.detach().requires_grad_()
        for k, t in given.items()
        if k not in CONSTANT and k not in ("dy", "y") and t is not None
    }
    rest = {k: given[k] for k in CONSTANT}
    v = fastfilm.conv_norm_film(**leaves, **rest, **options, activation="prelu")
    assert isinstance(v, Tensor)
    dy = given.get("dy")
    found = {"output": v.detach()}
    names = list(leaves)
    weights = torch.cos(torch.arange(v.numel(), dtype=torch.float64)).view(v.shape).to(v)
    grads = torch.autograd.grad(
        v, [leaves[k] for k in names], weights if dy is None else dy, create_graph=twice
    )
    found |= {f"d {k}": g.detach() for k, g in zip(names, grads, strict=True)}
    if twice:
        total = sum(g.double().square().sum() for g in grads)
        second = torch.autograd.grad(total, [leaves[k] for k in names], allow_unused=True)
        found |= {f"dd {k}": g for k, g in zip(names, second, strict=True) if g is not None}
        if options["training"]:
            del found["dd bias"]  # batch norm takes it away again: rounding is left
    return found | {k: given[k].clone() for k in CONSTANT[1:]}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.double().norm() == 0:
            assert not found[name].any(), name
        else:
            assert relative_error(found[name], value.double()) < tolerance, name


def dense(t: Tensor) -> Tensor:
    """The same values, contiguous, in memory of their own."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def compared(strange: dict[str, Tensor], options: dict[str, Any], *how: Any) -> None:
    """A call of these operands is like one of dense ones with their values."""
    plain = {k: dense(t) for k, t in strange.items()}
    tolerance = TOLERANCE[strange["x"].dtype]
    same(results(strange, options, *how), results(plain, options, *how), tolerance)


def upstream(given: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """A gradient at the output."""
    v = fastfilm.conv_norm_film(given["x"], given["weight"], **options | {"norm": None})
    generator = torch.Generator().manual_seed(2)
    return torch.randn(v.shape, generator=generator).to(v)


@pytest.mark.parametrize("layout", READ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_in_any_layout_count_as_their_values(
    backend: str, form: str, dtype: torch.dtype, layout: Layout
) -> None:
    """All at once, in training, where statistics are moved, and in evaluation; the second derivatives too."""
    # a map of one number has no variance: its norm in training is rounding alone
    for training in (False,) if layout is one_number else (True, False):
        given, options = operands(form, dtype)
        options |= {"norm": "batch", "training": training}
        with fastfilm.backend(backend):
            given["dy"] = upstream(given, options)
            written = layout if layout in WRITTEN else column
            strange = {
                k: (written if k.startswith("running") else layout)(t) for k, t in given.items()
            }
            compared(strange, options)
            if dtype == torch.float64 and layout in (column, negated):
                compared(strange, options, True)


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("form", ["one 3D sample", "transposed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_operand_that_is_zeros_without_memory_counts_as_zeros(
    backend: str, form: str, name: str
) -> None:
    given, options = operands(form, torch.float32)
    options |= {"norm": "batch", "training": False}
    with fastfilm.backend(backend):
        given["dy"] = upstream(given, options)
        compared(given | {name: zeros(given[name])}, options)


@pytest.mark.parametrize("layout", [column, negated, conjugated, one_number])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_inference_of_a_block_with_strange_tensors(
    form: str, dtype: torch.dtype, layout: Layout
) -> None:
    """Twice, since a block keeps forms of its weight; with a weight of other sign in the same memory between."""
    given, options = operands(form, dtype)
    strange = {k: layout(t) for k, t in given.items() if not k.startswith("running")}
    geometry = [options.get(k, v) for k, v in GEOMETRY.items()]
    dims = given["x"].dim() - 2
    for i in (0, 1, 4):
        value = geometry[i]
        geometry[i] = (value,) * dims if isinstance(value, int) else value
    kept = PreparedWeight()
    chosen = Options(activation="prelu", order=spec.ORDERS[0], dropout_position="end")

    def inferred(given: dict[str, Tensor], prepared: PreparedWeight | None) -> Tensor:
        names = ("bias", "gamma", "beta", "dropout_mask", "slope")
        tensors = TailTensors(**{k: given[k] for k in names})
        call = Call(given["weight"], Geometry(*geometry), chosen, tensors, prepared=prepared)
        with torch.no_grad():
            v = run(given["x"], call)
        assert isinstance(v, Tensor)
        return v

    for weight in (strange["weight"], torch._neg_view(strange["weight"]), strange["weight"]):
        tensors = strange | {"weight": weight}
        expected = inferred({k: dense(t) for k, t in tensors.items()}, None).double()
        for _ in range(2):
            assert relative_error(inferred(tensors, kept), expected) < TOLERANCE[dtype]


GEOMETRY = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "transposed": False,
    "output_padding": 0,
    "groups": 1,
}


@pytest.mark.parametrize("layout", [column, negated, one_number, odd])
def test_the_packed_route_of_the_vendor_takes_any_layout(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise taken for dense weights in convolutions of oneDNN alone."""
    monkeypatch.setattr(vendor, "_packs", lambda *given: True)
    torch.manual_seed(0)
    for size, kernel, groups in (((2, 4, 5, 6), (3, 1), 2), ((1, 4, 3, 4, 5), (1, 1, 1), 1)):
        ones, none = (1,) * len(kernel), (0,) * len(kernel)
        tensors = torch.randn(size), torch.randn(8, 4 // groups, *kernel), torch.randn(8)
        x, weight, bias = (layout(t) for t in tensors)
        geometry = Geometry(ones, none, ones, False, none, groups)
        with torch.no_grad():
            y = vendor.convolution(
                spec.channels_last(x), weight, bias, geometry, lambda w, form, make: make(w)
            )
            wide = (dense(t).double() for t in (x, weight, bias))
            assert relative_error(y, torch.convolution(*wide, *geometry)) < 1e-5


@pytest.mark.parametrize("layout", [*READ, zeros])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_norms_views_and_joints_take_any_layout(backend: str, layout: Layout) -> None:
    if layout is zeros and backend == "reference":
        return  # PyTorch's own norms refuse them
    torch.manual_seed(0)
    x, other, gamma = (
        layout(torch.randn(2, 4, 6, 4)),
        layout(torch.randn(2, 4, 6, 4)),
        torch.rand(2, 4),
    )
    dy = layout(torch.randn(2, 4, 6, 4))

    def run(x: Tensor, other: Tensor, gamma: Tensor, dy: Tensor) -> list[Tensor]:
        x, other, gamma = (t.detach().requires_grad_() for t in (x, other, gamma))
        pending = fastfilm.norm_film(other, gamma=gamma, activation="silu", deferred=True)
        pooled: Any = torch.nn.functional.max_pool2d(pending, 2)
        shown = torch.nn.functional.interpolate(pooled, scale_factor=2, mode="nearest")
        joined: Any = torch.cat([x, shown, pending], 1)
        read = fastfilm.conv_norm_film(joined, torch.ones(4, 12, 1, 1), norm="instance")
        found = [
            add_act(x, pending, "relu"),
            fastfilm.norm_film(x, norm="group", num_groups=2, gamma=gamma),
            shown.tensor() if isinstance(shown, fastfilm.DeferredMap) else shown,
            read,
        ]
        grads = torch.autograd.grad(found, (x, other, gamma), [dy] * 4)
        return [*(t.detach() for t in found), *grads]

    with fastfilm.backend(backend):
        results = run(x, other, layout(gamma), dy)
        expected = run(*(dense(t) for t in (x, other, layout(gamma), dy)))
    for i, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())), i


@pytest.mark.parametrize("order", ["contiguous", "channels last"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [(3, 1), (1, 3), (3, 1, 3), (3, 3, 1)])
def test_strides_of_axes_of_one_element_may_be_any_numbers_for_the_vendor(
    kernel: tuple[int, ...], transposed: bool, order: str
) -> None:
    dims, groups = len(kernel), 4
    layout = spec.channels_last_format(dims + 2)
    if order == "contiguous":
        layout = torch.contiguous_format
    x, weight = torch.randn(2, 64, *[6] * dims), torch.randn(64, 16, *kernel)
    weight = weight.contiguous(memory_format=layout)
    strides = [s if n > 1 else 21 for n, s in zip(weight.shape, weight.stride(), strict=True)]
    strange = torch.empty_strided(weight.shape, strides).copy_(weight)
    one, padding = (1,) * dims, tuple(k // 2 for k in kernel)
    geometry = Geometry(one, padding, one, transposed, (0,) * dims, groups)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y64 = torch.convolution(*exact, None, *geometry)
    e = torch.randn(y64.shape)
    y64.backward(e.double())
    y = vendor.convolution(x, strange, None, geometry)
    dx, dw = vendor.convolution_backward(e, x, strange, geometry, (True, True))
    assert dx is not None and dw is not None
    for found, truth in ((y, y64), (dx, exact[0].grad), (dw, exact[1].grad)):
        assert truth is not None and relative_error(found, truth) < 1e-5


def test_kernels_of_the_cpu_refuse_tensors_of_other_devices() -> None:
    """Their address would be read as one of this memory."""
    y, coef = torch.zeros(1, 2, 3, 3), torch.zeros(7, 1, 2)
    for given in ((y.to("meta"), coef), (y, coef.to("meta"))):
        with pytest.raises(ValueError, match="must be on the CPU, got meta"):
            fastfilm.ops.launchers.of("cpu").apply(*given, "none")


@pytest.mark.parametrize("layout", [column, negated, odd])
def test_triton_kernels_take_any_layout(layout: Layout, device: str) -> None:
    given, options = operands("one channel", torch.float32)
    options |= {"norm": "batch", "training": True}
    given = {k: t.to(device) for k, t in given.items()}
    with fastfilm.backend("triton"):
        given["dy"] = upstream(given, options)
        compared({k: layout(t) for k, t in given.items()}, options)
