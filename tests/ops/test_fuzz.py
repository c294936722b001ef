"""Random calls: both the kernels and the reference refuse one, naming the argument, or both agree on it.

FASTFILM_FUZZ_EXAMPLES=N draws N calls, another set each time (``pytest --hypothesis-seed=S`` repeats one); without
it the set is always the same 2,000.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastfilm
from fastfilm.ops import choice, launchers, spec
from fastfilm.ops.settings import environment

pytestmark = pytest.mark.skipif(
    choice.BACKENDS["cpu"].unavailable() is not None, reason="the C++ extension was not built"
)
ASKED = environment.read("FASTFILM_FUZZ_EXAMPLES")
REFUSALS = (TypeError, ValueError, NotImplementedError)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")
CONTENTS = ("normal", "normal", "normal", "zero", "nan", "inf", "shifted")
# of float32 and float64 where variances are small; PyTorch in float64 is the measure itself
TOLERANCE = {torch.finfo(t).eps: n for t, n in zip(DTYPES[1:], (2**12, 2**20, 32, 32), strict=True)}

BAD: dict[str, tuple[Any, ...]] = {
    "x": (None, [1.0], "int", "flat", "meta", "complex"),
    "weight": (None, 3.0, "int", "flat", "meta", "other", "channels"),
    "bias": (1.0, "int", "long", "meta"),
    "stride": (0, -1, 1.5, (1,), "2", None),
    "padding": (-1, "same", 1.5, None, (1, 1, 1, 1)),
    "dilation": (0, 1.5, None),
    "output_padding": (-1, 0.5),
    "groups": (0, -2, 7, 1.5, None, "1"),
    "norm": ("batchnorm", 3, ["batch"]),
    "num_groups": (0, 7, -1, 1.5, "2"),
    "norm_weight": (1.0, "int", "long", "meta"),
    "norm_bias": ("int", "long", "meta"),
    "running_mean": ("int", "long", "meta"),
    "running_var": (1.0, "int", "long", "meta"),
    "eps": ("small", None, -1.0),
    "momentum": ("fast", None),
    "activation": ("swish", 5),
    "slope": ("steep", "int", "long", "meta"),
    "gamma": (2.0, "int", "long", "meta", "map"),
    "beta": ([0.0], "int", "long", "meta", "map"),
    "order": ("film-conv", None, 1),
    "dropout_mask": (0.5, "int", "long", "meta"),
    "dropout_position": ("start", 1),
}


@dataclass
class Call:
    """A function of the library, its tensors and its other arguments."""

    function: str
    tensors: dict[str, Any]
    options: dict[str, Any]
    gradients: bool
    contents: str
    wrong: str | None = None
    value: Any = None
    leaves: list[str] = field(default_factory=list)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` (of its first sample, if expanded) in another layout."""
    if layout == "channels_last":
        return t.contiguous(memory_format=spec.channels_last_format(t.dim()))
    if layout == "sliced":
        return torch.cat([t, t], -1)[..., : t.shape[-1]]
    if layout == "expanded" and t.shape[0] > 0:
        return t[:1].expand(t.shape)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return t


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A call, wrong in one argument now and then."""
    pick = st.sampled_from
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    function = draw(pick(("conv_norm_film", "conv_norm_film", "norm_film", "block")))
    dims = draw(pick((2, 2, 3)))
    size = draw(st.lists(st.integers(0, 5), min_size=dims, max_size=dims))
    if draw(st.integers(0, 9)):
        size = [s + 1 for s in size]
    batch, ci, co = draw(pick((1, 2, 3, 0))), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    dtype, contents = draw(pick(DTYPES)), draw(pick(CONTENTS))
    norm = draw(pick((None, *spec.NORMS)))
    activation = draw(pick((None, *spec.ACTIVATIONS)))
    flags = draw(st.integers(0, 2**12 - 1))
    training, transposed = bool(flags & 1), not flags & 14
    groups = draw(pick((1, 1, 1, 2, 3))) if function != "norm_film" else 1
    ci, co = ci * groups, co * groups
    if function == "norm_film":
        co = ci

    def numbers(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    x = numbers(batch, ci, *size, kind=dtype)
    if contents == "zero":
        x.zero_()
    elif contents == "shifted" and dtype.itemsize > 2:
        x += 30
    elif contents in ("nan", "inf") and x.numel():
        x.view(-1)[flags % x.numel()] = float(contents) * (1 if flags & 16 else -1)
    tensors: dict[str, Any] = {"x": laid_out(x, draw(pick(LAYOUTS)))}
    options: dict[str, Any] = {
        "norm": norm,
        "activation": activation,
        "order": draw(pick(spec.ORDERS)),
        "num_groups": draw(pick((1, co, 2))) if norm == "group" else None,
    }
    if function != "norm_film":
        kernel = draw(st.integers(1, 3))
        options |= {
            "stride": draw(pick((1, 1, 2, 3))),
            "padding": draw(st.integers(0, 2)),
            "dilation": draw(pick((1, 1, 2))),
            "groups": groups,
        }
        if function == "block":
            options |= {"in_channels": ci, "out_channels": co, "kernel_size": kernel}
        else:
            ends = (ci, co // groups) if transposed else (co, ci // groups)
            weight = numbers(*ends, *[kernel] * dims, kind=dtype) / (ci * kernel**dims) ** 0.5
            tensors["weight"] = weight
            options["transposed"] = transposed
            if transposed and flags & 32:
                options["output_padding"] = 1
            if flags & 64:
                tensors["bias"] = numbers(co)
    if function != "block":
        options["training"] = training
        if flags & 128:
            tensors |= {"norm_weight": numbers(co), "norm_bias": numbers(co)}
        if norm in ("batch", "instance") and (flags & 256 or not training):
            tensors |= {"running_mean": numbers(co), "running_var": numbers(co).abs() + 0.5}
        if activation in ("leaky_relu", "prelu", "elu") and flags & 512:
            slope = numbers(draw(pick((1, co)))).abs()
            tensors["slope"] = slope
        if flags & 1024:
            tensors["dropout_mask"] = (numbers(batch, co) > 0).float() * 2
            options["dropout_position"] = draw(pick(spec.DROPOUT_POSITIONS))
    else:
        options["training"] = training
        options["bias"] = bool(flags & 64)
    for name in ("gamma", "beta"):
        shape = draw(pick((None, (batch, co), (1, co), (co,))))
        if shape is not None:
            tensors[name] = numbers(*shape, kind=draw(pick((torch.float32, dtype))))
    call = Call(function, tensors, options, bool(flags & 2048), contents)
    if draw(st.integers(0, 3)) == 0:
        spoil(call, draw(pick(sorted(BAD))), draw(st.integers(0, 6)))
    return call


def spoil(call: Call, name: str, which: int) -> None:
    """Makes one argument wrong, if the call has it."""
    function = fastfilm.norm_film if call.function == "norm_film" else fastfilm.conv_norm_film
    known = inspect.signature(function).parameters
    if call.function == "block":
        known = {"x": None, "gamma": None, "beta": None}  # type: ignore[assignment]
    if name not in known:
        return
    value = BAD[name][which % len(BAD[name])]
    now = call.tensors.get(name)
    if isinstance(value, str) and value in _SPOILT:
        if not isinstance(now, Tensor):
            now = torch.ones(3)
        value = _SPOILT[value](now)
    call.wrong, call.value = name, value
    call.tensors.pop(name, None)
    call.options.pop(name, None)
    (call.tensors if isinstance(value, Tensor) else call.options)[name] = value


_SPOILT: dict[str, Any] = {
    "int": lambda t: torch.ones(t.shape, dtype=torch.int64),
    "complex": lambda t: torch.ones(t.shape, dtype=torch.complex64),
    "flat": lambda t: torch.ones(3, dtype=t.dtype),
    "long": lambda t: torch.ones(97, dtype=t.dtype),
    "meta": lambda t: t.to("meta"),
    "other": lambda t: t.to(torch.float32 if t.dtype == torch.float64 else torch.float64),
    "channels": lambda t: torch.cat([t, t, t], 1),
    "map": lambda t: torch.ones((*t.shape, 1, 1), dtype=t.dtype),
}


def run(call: Call, backend: str, exact: bool = False) -> dict[str, Tensor] | Exception:
    """Output, gradients and running statistics, or what was raised."""

    def cast(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.device.type == "meta":
            return t
        t = t.detach()
        return t.double() if exact and t.is_floating_point() else t

    given = {k: cast(v) for k, v in call.tensors.items()}
    for name in ("running_mean", "running_var"):
        if isinstance(given.get(name), Tensor) and given[name].device.type == "cpu":
            given[name] = given[name].clone()
    leaves = []
    if call.gradients:
        for name, t in given.items():
            fixed = name in ("running_mean", "running_var", "dropout_mask")
            if isinstance(t, Tensor) and t.is_floating_point() and t.device.type == "cpu":
                leaves += [] if fixed else [(name, t.requires_grad_())]
    try:
        with fastfilm.backend(backend):
            if call.function == "block":
                v = run_block(call, given, leaves, exact)
            else:
                v = getattr(fastfilm, call.function)(**given, **call.options)
            found = {"output": v.detach()}
            if leaves and v.requires_grad:
                weights = torch.cos(torch.arange(v.numel(), dtype=torch.float64)).reshape(v.shape)
                grads = torch.autograd.grad(
                    (v * weights.to(v.dtype)).sum(), [t for _, t in leaves], allow_unused=True
                )
                for (name, t), grad in zip(leaves, grads, strict=True):
                    found[f"gradient of {name}"] = torch.zeros_like(t) if grad is None else grad
    except Exception as error:
        return error
    finally:
        for _, t in leaves:
            t.requires_grad_(False)
    for name in ("running_mean", "running_var"):
        if name in given and call.wrong is None:
            found[name] = given[name]
    return found


def run_block(call: Call, given: dict[str, Any], leaves: list[Any], exact: bool) -> Tensor:
    """The module with the call's options, in the type of its input."""
    options = {k: v for k, v in call.options.items() if k not in ("training", "x", "gamma", "beta")}
    wrong = {k: v for k, v in call.options.items() if k in ("x", "gamma", "beta")}
    torch.manual_seed(7)
    x = call.tensors.get("x")
    three = isinstance(x, Tensor) and x.dim() == 5
    block = (fastfilm.ConvNormFiLM3d if three else fastfilm.ConvNormFiLM2d)(**options)
    if isinstance(x, Tensor) and x.is_floating_point():
        block.weight.data = block.weight.data.to(x.dtype).to(torch.float64 if exact else x.dtype)
    block.train(call.options["training"])
    if call.gradients:
        leaves.append(("weight", block.weight))
    out = block(**given, **wrong)
    assert isinstance(out, Tensor)
    return out


def error_of(value: Tensor, exact: Tensor, floor: float) -> float:
    """Largest error relative to the largest value, where both are finite."""
    if value.numel() == 0:
        return 0.0
    value, exact = value.double(), exact.double()
    both = value.isfinite() & exact.isfinite()
    if not both.any():
        return 0.0
    value, exact = value[both], exact[both]
    return float((value - exact).abs().max()) / max(float(exact.abs().max()), floor)


def is_constant(call: Call, few: int) -> bool:
    """Whether a norm makes the same of any values, so that gradients are 0, a difference of large numbers.

    It divides by the root of its eps alone for a group of one value, a map of zeros, and windows that all lie in
    the padding; two values become 1 and -1. Groups of so ``few`` values count.
    """
    norm, groups = call.options.get("norm"), call.options.get("num_groups")
    kept = norm == "batch" or "running_mean" in call.tensors
    if norm in (None, "none") or (kept and not call.options["training"]):
        return False
    before = Call(call.function, dict(call.tensors), dict(call.options), False, call.contents)
    for name in ("norm_weight", "norm_bias", "running_mean", "running_var", "gamma", "beta"):
        before.tensors.pop(name, None)
    before.tensors.pop("dropout_mask", None)
    before.options |= {"norm": None, "num_groups": None}
    if not str(call.options["order"]).startswith("conv-act"):
        before.options["activation"] = None
        before.tensors.pop("slope", None)
    found = run(before, "reference", exact=True)
    assert not isinstance(found, Exception), repr(found)
    values = found["output"]
    if not values.numel():
        return False
    if norm == "batch":
        rows = values.transpose(0, 1).flatten(1)
    else:
        count = {"instance": values.shape[1], "layer": 1, "group": groups}[norm]
        rows = values.reshape(len(values) * count, -1)
    return rows.shape[1] <= few or bool((rows.var(1, unbiased=False) < 1e-5).any())


def bends_at_nothing(call: Call) -> bool:
    """Whether an activation with two slopes meets values that are 0 but for their rounding, on either side."""
    bends = call.options.get("activation") in ("relu", "leaky_relu", "prelu", "elu")
    behind = not str(call.options.get("order")).startswith("conv-act")
    return bends and behind and is_constant(call, 1)


def assert_agrees(call: Call, ours: Any, theirs: Any) -> None:
    """As close to float64 as PyTorch is, but for a factor; not a number where PyTorch's is not one."""
    finite = call.contents not in ("nan", "inf")
    exact: Any = run(call, "reference", exact=True)
    assert not isinstance(exact, Exception), repr(exact)
    assert ours.keys() == theirs.keys()
    largest = max(
        (float(t.abs().nan_to_num(0, 0, 0).max()) for t in exact.values() if t.numel()), default=0
    )
    narrow = call.tensors["x"].dtype.itemsize == 2 and is_constant(call, 2)
    for name, value in ours.items():
        other = theirs[name]
        assert value.shape == other.shape and value.dtype == other.dtype, name
        if not finite and name != "output":
            continue
        if name.startswith("gradient") and (value.dtype.itemsize == 2 or narrow):
            # of maps this small, one value that changes its side of a ReLU is all of it
            assert value.isfinite().all() or not other.isfinite().all(), name
            continue
        ends, others = ~value.isfinite(), ~other.isfinite()
        if value.dtype == torch.bfloat16:
            # some of oneDNN's kernels multiply a neighbour of a voxel by 0
            others = ~exact[name].isfinite()
            ends = ends & others
        assert torch.equal(ends, others), f"{name}: other elements are finite"
        floor = 1e-2 * max(largest, 1.0)
        own, eager = (error_of(t, exact[name], floor) for t in (value, other))
        ulp = torch.finfo(call.tensors["x"].dtype).eps
        bound = 8 * eager + TOLERANCE[ulp] * ulp
        if own > bound and name.startswith("gradient") and bends_at_nothing(call):
            continue
        assert own <= bound, f"{name}: error {own:.1e}, PyTorch's {eager:.1e}, {call}"


@settings(
    max_examples=int(ASKED or 2000),
    derandomize=ASKED is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def test_random_calls_agree_with_the_reference_or_are_refused_by_name(call: Call) -> None:
    ours, theirs = run(call, "cpu"), run(call, "reference")
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert isinstance(ours, REFUSALS) and isinstance(theirs, Exception), (call, ours, theirs)
        names = {*call.tensors, *call.options, "backend"}
        assert any(name in str(ours) for name in names), (call, ours)
        assert "positional argument" not in str(ours), (call, ours)
        return
    assert_agrees(call, ours, theirs)


@pytest.mark.parametrize("name", ["apply", "moments"])
def test_a_wrong_kernel_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = launchers.of("cpu")
    real = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args, **options: real(*args, **options) * 1.01)
    inner = test_random_calls_agree_with_the_reference_or_are_refused_by_name.hypothesis.inner_test
    once = settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(calls())(inner))
    with pytest.raises(AssertionError, match="error"):
        once()


def test_both_ends_are_reached() -> None:
    """A good share of the calls is run, and a good share refused."""
    ends: list[bool] = []

    @settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def count(call: Call) -> None:
        ends.append(isinstance(run(call, "cpu"), Exception))

    count()
    assert 0.1 < sum(ends) / len(ends) < 0.7


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "shape", "weight", "options"),
    [
        (torch.float32, (1, 8, 5, 2, 1), (10, 4, 1, 1, 1), {"groups": 2, "dilation": 2}),
        (torch.bfloat16, (1, 1, 5, 5, 1), (6, 1, 1, 1, 1), {"dilation": 2}),
        (torch.bfloat16, (1, 3, 2, 1), (4, 3, 1, 1), {"dilation": 2}),
        (torch.bfloat16, (3, 1, 1, 6, 6), (5, 1, 3, 3, 3), {}),
        (torch.bfloat16, (2, 1, 1, 5, 5), (5, 1, 3, 3, 3), {"stride": 3}),
    ],
)
def test_padded_maps_of_one_slice(
    dtype: torch.dtype, shape: Any, weight: Any, options: dict[str, Any], backend: str
) -> None:
    """oneDNN crashes on these or returns garbage where they are channels-last."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    w, bias = torch.randn(weight, generator=generator).to(dtype), torch.zeros(weight[0])
    options = {"stride": 3, "padding": 2, **options}
    with fastfilm.backend(backend):
        found = fastfilm.conv_norm_film(x, w, bias, **options)
    with fastfilm.backend("reference"):
        exact = fastfilm.conv_norm_film(x.double(), w.double(), **options)
    assert isinstance(found, Tensor) and isinstance(exact, Tensor)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)
