"""Contracts of the ops: schemas, layouts, dtypes, what is kept for backward, and bad input."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfilm
from fastfilm.ops import choice, launchers, settings, spec
from tests.support.case import SLOW

AVAILABLE = [b.name for b in choice.BACKENDS.values() if b.unavailable() is None]


@pytest.fixture(params=[n for n in ("cpu", "triton") if n in AVAILABLE])
def kernels(request: pytest.FixtureRequest) -> str:
    """A backend with kernels of its own that runs on CPU tensors here."""
    name = str(request.param)
    if name == "triton" and not choice.interpreting():
        pytest.skip("Triton's interpreter is not active")
    return name


def block(**options: Any) -> Tensor:
    defaults: dict[str, Any] = {
        "x": torch.randn(2, 3, 6, 5),
        "weight": torch.randn(4, 3, 3, 3),
        "padding": 1,
        "norm": "instance",
        "activation": "relu",
    }
    v = fastfilm.conv_norm_film(**(defaults | options))
    assert isinstance(v, Tensor)
    return v


def test_import_needs_nothing_heavier_than_torch_and_numpy() -> None:
    code = (
        "import torch, numpy, sys; before = set(sys.modules); import fastfilm;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'triton', 'nibabel', 'scipy', 'matplotlib', 'pandas', 'monai'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_output_and_gradient_are_channels_last_for_any_layout(
    layout: str, dims: int, kernels: str
) -> None:
    if kernels == "triton" and dims == 3 and layout != "sliced" and not SLOW:
        pytest.skip("interpreted slowly; set FASTFILM_SLOW_TESTS=1 to run it")
    size = (6, 5, 4)[:dims]
    fmt = spec.channels_last_format(dims + 2)
    if layout == "sliced":
        x = torch.randn(2, 6, *[2 * s for s in size])[:, ::2, ::2, ::2]
        x = x[..., ::2] if dims == 3 else x
    elif layout == "expanded":
        x = torch.randn(1, 3, *size).expand(2, 3, *size)
    else:
        x = torch.randn(2, 3, *size)
        if layout == "channels_last":
            x = x.contiguous(memory_format=fmt)
    hidden = x.detach().requires_grad_()
    weight = torch.randn(4, 3, *[3] * dims)
    with fastfilm.backend(kernels):
        v = block(x=hidden, weight=weight)
    assert v.is_contiguous(memory_format=fmt)
    (grad,) = torch.autograd.grad(v.sum(), hidden)
    assert grad.is_contiguous(memory_format=fmt)
    with fastfilm.backend("reference"):
        expected = block(x=x.detach().clone(), weight=weight)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)


def test_gradient_that_arrives_contiguous(kernels: str) -> None:
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3)
    grad = torch.randn(2, 4, 6, 5)
    found = []
    for name in (kernels, "reference"):
        with fastfilm.backend(name):
            v = block(x=x, weight=weight)
        found.append(torch.autograd.grad(v, x, grad)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_only_raw_maps_and_channel_sized_numbers_are_kept(kernels: str) -> None:
    """Three blocks in a row keep the input and three raw maps; no activated map, no mask."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(8, 8, 3, 3, requires_grad=True) for _ in range(3)]
    film = torch.randn(2, 8, requires_grad=True)
    with fastfilm.backend(kernels), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        v: Any = x
        for i, weight in enumerate(weights):
            v = fastfilm.conv_norm_film(
                v,
                weight,
                padding=1,
                norm="batch",
                training=True,
                activation="relu",
                gamma=film,
                beta=film,
                deferred=i < 2,
            )
    assert isinstance(v, Tensor)
    big = [n for n in saved.values() if n >= x.numel() * 4]
    assert len(big) == 4
    assert sum(n for n in saved.values() if n < x.numel() * 4) < 0.2 * sum(big) + 3 * 8 * 8 * 9 * 4
    v.sum().backward()


@pytest.mark.parametrize("bias", [False, True])
def test_the_result_of_a_bare_convolution_may_be_written_to(bias: bool, kernels: str) -> None:
    """As that of ``torch.nn.functional.conv2d``: nothing behind it needs it for its gradient."""
    torch.manual_seed(0)
    shapes = (2, 3, 6, 5), (3, 3, 3, 3), (3,)
    leaves = [torch.randn(s, requires_grad=True) for s in shapes[: 2 + bias]]

    def gradients(name: str) -> tuple[Tensor, ...]:
        with fastfilm.backend(name):
            y = fastfilm.conv_norm_film(*leaves, padding=1)
            y += leaves[0]
        return torch.autograd.grad(y.square().sum(), leaves)

    for ours, theirs in zip(gradients(kernels), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x", [None, 3, [1.0], "a"])
def test_an_input_that_is_no_map_is_named(x: object) -> None:
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got"):
        fastfilm.conv_norm_film(x, torch.randn(1, 1, 1, 1))  # type: ignore[arg-type]


def test_autocast_runs_in_16_bit_with_float32_parameters(kernels: str) -> None:
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    gamma = torch.randn(2, 4, dtype=torch.float16, requires_grad=True)
    with fastfilm.backend(kernels), torch.autocast("cpu", dtype=torch.bfloat16):
        v = block(x=x, weight=weight, gamma=gamma)
    assert v.dtype == torch.bfloat16
    v.float().sum().backward()
    for t in (x, weight, gamma):
        assert t.grad is not None and t.grad.dtype == t.dtype and t.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 5, "padding": 2},
        {"stride": 3},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"transposed": True, "stride": 2, "output_padding": 1},
    ],
    ids=lambda o: next(iter(o)),
)
def test_composed_covers_every_convolution(options: dict[str, Any], kernels: str) -> None:
    options = dict(options)
    k = options.pop("kernel", 3)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    weight = torch.randn(4, 4 // options.get("groups", 1), k, k)
    results = []
    for name in (kernels, "reference"):
        with fastfilm.backend(name):
            v = block(x=x, weight=weight, **options)
        results.append([v, *torch.autograd.grad(v.square().sum(), x)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    if kernels == "triton":
        with (
            fastfilm.backend("triton", "fused"),
            pytest.raises(NotImplementedError, match="route 'fused'"),
        ):
            block(x=x, weight=weight, **options)


def test_float64_is_refused_by_triton_by_name() -> None:
    if "triton" not in AVAILABLE:
        pytest.skip("triton is not available")
    x, weight = torch.randn(1, 3, 4, 4).double(), torch.randn(4, 3, 3, 3).double()
    with fastfilm.backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        block(x=x, weight=weight)


BAD = [
    ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "x must be float16"),
    ({"x": torch.zeros(3, 4, 4)}, ValueError, "x must be"),
    ({"x": torch.zeros(2, 5, 4, 4)}, ValueError, "x must have 3 channels"),
    ({"weight": torch.zeros(4, 3, 3)}, ValueError, "weight must have 4 dimensions"),
    ({"weight": torch.zeros(4, 3, 3, 3).double()}, TypeError, "weight must have x's dtype"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(4,\)"),
    ({"gamma": torch.zeros(3, 4)}, ValueError, "gamma must have shape"),
    ({"gamma": torch.zeros(2, 4, 1, 1)}, ValueError, "gamma must have shape"),
    ({"beta": torch.zeros(4, dtype=torch.int64)}, TypeError, "beta must be a floating point"),
    ({"gamma": torch.zeros(2, 4, device="meta")}, ValueError, "gamma is on meta"),
    ({"norm": "group", "num_groups": 3}, ValueError, "num_groups must divide the 4 channels"),
    ({"norm": "group"}, ValueError, "num_groups"),
    ({"norm": "batchnorm"}, ValueError, "norm must be one of"),
    ({"activation": "swish"}, ValueError, "activation must be one of"),
    ({"order": "film-conv"}, ValueError, "order must be one of"),
    ({"slope": 0.1}, ValueError, "slope has no meaning"),
    ({"stride": 0}, ValueError, "stride must be"),
    ({"stride": 1.5}, TypeError, "stride must be"),
    ({"padding": (1, 1, 1)}, ValueError, "padding must be"),
    ({"groups": 3}, ValueError, "channels for weight"),
    ({"groups": 0}, ValueError, "groups must be"),
    ({"norm": "batch"}, ValueError, "needs running_mean"),
    ({"running_mean": torch.zeros(4)}, ValueError, "together"),
    ({"x": torch.zeros(2, 3, 1, 1), "padding": 0}, ValueError, "larger than the padded input"),
    ({"x": torch.zeros(2, 3, 1, 1)}, ValueError, "more than 1 spatial element"),
    ({"dropout_mask": torch.ones(2, 3)}, ValueError, "dropout_mask must have shape"),
    (
        {"norm": None, "dropout_mask": torch.ones(2, 4), "dropout_position": "norm"},
        ValueError,
        "norm",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[m[2][:30] for m in BAD])
def test_bad_input_names_the_argument(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        block(**options)


def test_unknown_backend_and_environment() -> None:
    with pytest.raises(ValueError, match="backend must be one of"), fastfilm.backend("cudnn"):
        pass
    with pytest.raises(ValueError, match="route must be one of"), fastfilm.backend(None, "fast"):
        pass
    out = subprocess.run(
        [sys.executable, "-c", "import fastfilm; fastfilm.conv_norm_film"],
        env={"FASTFILM_BACKEND": "nonsense", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert out.returncode != 0 and "FASTFILM_BACKEND must be one of" in out.stderr


def test_backend_is_restored_and_per_thread() -> None:
    import threading

    with fastfilm.backend("reference"):
        seen: list[str | None] = []
        thread = threading.Thread(target=lambda: seen.append(settings.forced()[0]))
        thread.start()
        thread.join()
        assert seen == [None]
        with pytest.raises(RuntimeError), fastfilm.backend(None):
            raise RuntimeError
        assert settings.forced() == ("reference", None)


def test_a_forced_backend_holds_in_the_threads_of_autograd(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's backward pass runs in a thread of its own, where nothing is forced."""
    import threading

    seen: list[tuple[str | None, str | None]] = []
    backend = launchers.of(kernels)
    for name in ("apply_backward", "block_coefficients_backward", "moments_backward"):
        real = getattr(backend, name)

        def spy(*args: Any, real: Any = real, **options: Any) -> Any:
            seen.append(settings.forced())
            return real(*args, **options)

        monkeypatch.setattr(backend, name, spy)

    def differentiate(threaded: bool) -> list[Tensor]:
        torch.manual_seed(0)
        first = fastfilm.ConvNormFiLM2d(2, 4, norm="instance")
        second = fastfilm.ConvNormFiLM2d(8, 3, norm="batch")
        with fastfilm.backend(kernels, "composed"):
            hidden = first(torch.randn(2, 2, 6, 5), torch.rand(2, 4), deferred=True)
            pooled = torch.nn.functional.avg_pool2d(hidden, 3, 1, 1)
            v = second(torch.cat([hidden, pooled], 1))
        if threaded:
            thread = threading.Thread(target=lambda: v.square().sum().backward())
            thread.start()
            thread.join()
        else:
            v.square().sum().backward()
        return [p.grad for p in (*first.parameters(), *second.parameters())]

    for a, b in zip(differentiate(True), differentiate(False), strict=True):
        assert torch.equal(a, b)
    # all of the three kinds, in both runs
    assert len(seen) >= 6 and set(seen) == {(kernels, "composed")}
    assert settings.forced() == (None, None)


@pytest.mark.parametrize("shape", [(0, 3, 6, 5), (2, 3, 0, 5)])
def test_empty_batch_or_map_behaves_as_pytorch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)

    def run(ours: bool) -> tuple[Any, ...]:
        try:
            if ours:
                v = block(x=x, weight=weight, norm=None)
            else:
                v = torch.nn.functional.conv2d(x, weight, padding=1).relu()
            grads = torch.autograd.grad(v.sum(), (x, weight))
        except Exception as error:
            return (type(error),)
        return (tuple(v.shape), *[g.tolist() for g in grads])

    ours, theirs = run(True), run(False)
    assert ours == theirs or (len(ours) == 1 and len(theirs) == 1)


def test_nan_and_inf_pass_through(kernels: str) -> None:
    x = torch.randn(2, 3, 6, 5)
    x[0, 1, 2, 2], x[1, 0, 0, 0] = float("nan"), float("inf")
    weight = torch.randn(4, 3, 1, 1)
    for norm in (None, "instance"):
        with fastfilm.backend(kernels):
            ours = block(x=x, weight=weight, padding=0, norm=norm)
        with fastfilm.backend("reference"):
            theirs = block(x=x, weight=weight, padding=0, norm=norm)
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("call", ["conv_norm_film", "norm_film"])
def test_gradients_of_a_slope_by_both_ways_are_added_before_they_are_rounded(call: str) -> None:
    """An instance norm takes away the slope of values below 0, but for its eps: the two ways nearly cancel."""
    generator = torch.Generator().manual_seed(0)
    x = -1 - torch.rand(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    given = (x, torch.eye(4, dtype=torch.float64)[..., None, None]) if "conv" in call else (x,)
    found = []
    for slope in (torch.full((4,), 0.25), torch.full((4,), 0.25, dtype=torch.float64)):
        options: dict[str, Any] = {"norm": "instance", "order": "conv-act-norm-film"}
        options |= {"activation": "prelu", "slope": slope.requires_grad_()}
        (getattr(fastfilm, call)(*given, **options) * weights).sum().backward()
        found.append(slope.grad)
    assert torch.allclose(found[0].double(), found[1], rtol=1e-6, atol=0)
