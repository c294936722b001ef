"""The fused [N, C] algebra of a backend against its definition in PyTorch, value and gradient."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastfilm.ops import choice, launchers, reference, spec
from fastfilm.ops.block import recipe
from fastfilm.ops.spec import Kind, TailTensors
from tests.support.yardstick import relative_error

FUSED = ("cpu", "triton")
MOMENTUM = 0.3
NAMES = ("norm_weight", "norm_bias", "running_mean", "running_var", "gamma", "beta", "dropout_mask")


def kernels_of(name: str) -> Any:
    backend = choice.BACKENDS[name]
    reason = backend.unavailable()
    if reason is None and name == "triton" and not choice.interpreting():
        reason = "the interpreter is not active"
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return launchers.of(name)


class Fused(torch.autograd.Function):
    """A backend's coefficients, with its gradients, as a block takes them."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, kind: Kind, *tensors: Tensor | None) -> Tensor:
        ctx.kernels, ctx.kind = kernels, kind
        # running statistics have moved on by the backward pass
        ctx.save_for_backward(*((None, None, *tensors[2:]) if kind.update else tensors))
        given = TailTensors(*tensors)
        coef: Tensor = kernels.block_coefficients(kind, MOMENTUM, given, torch.device("cpu"))
        return coef

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        wanted, given = ctx.needs_input_grad[2:], TailTensors(*ctx.saved_tensors)
        return (
            None,
            None,
            *ctx.kernels.block_coefficients_backward(ctx.kind, given, grads[0], wanted),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    norm: str = "batch"
    order: str = "conv-norm-film-act"
    position: str | None = None
    use_input: bool = True
    running: bool = True
    absent: tuple[str, ...] = ()
    rows: tuple[int, int] = (3, 3)
    batch: int = 3
    channels: int = 6
    slopes: int | None = None
    dtype: torch.dtype = torch.float32
    count: int = 35
    eps: float = 1e-5

    def kind(self, wide: bool) -> Kind:
        needs_input = self.norm in ("group", "layer")
        use_input = self.norm != "none" and (self.use_input or needs_input)
        return Kind(
            norm=self.norm,
            activation="leaky_relu" if self.slopes is not None else "relu",
            order=self.order,
            dropout_position=self.position or "end",
            groups=2 if self.norm == "group" else 1,
            eps=self.eps,
            slope=0.0 if self.slopes is not None else 0.01,
            batch=self.batch,
            channels=self.channels,
            count=self.count,
            wide=wide,
            training=use_input,
            uses_input=use_input,
            update=use_input and self.running and self.norm in ("batch", "instance"),
        )

    def run(
        self,
        kernels: Any,
        dtype: torch.dtype,
        strided: bool = False,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Coefficients, gradients and running statistics; inputs rounded to ``self.dtype`` first."""
        generator = torch.Generator().manual_seed(seed)
        n, c = self.batch, self.channels

        def draw(*shape: int, stored: torch.dtype = self.dtype) -> Tensor:
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(stored)
            # the kernel reads the stored type itself; PyTorch's float64 run reads the same numbers
            return value if dtype != torch.float64 else value.double()

        small = torch.float64 if dtype == torch.float64 else torch.float32
        kind = self.kind(small == torch.float64)
        stats = torch.stack(
            [draw(n, c, stored=torch.float32), draw(n, c, stored=torch.float32).abs()]
        )
        made: dict[str, Tensor | None] = {
            "norm_weight": draw(c),
            "norm_bias": draw(c),
            "running_mean": draw(c),
            "running_var": draw(c).abs() + 0.5,
            "gamma": draw(self.rows[0], c),
            "beta": draw(c) if self.rows[1] == 0 else draw(self.rows[1], c),
            "dropout_mask": (draw(n, c) > -0.5).to(self.dtype).to(small) / 0.75,
        }
        bias: Tensor | None = draw(c)
        slope = None if self.slopes is None else draw(self.slopes)
        if not self.running and kind.uses_input:
            made |= {"running_mean": None, "running_var": None}
        if self.position is None:
            made["dropout_mask"] = None
        for name in self.absent:
            if name == "bias":
                bias = None
            else:
                made[name] = None
        leaves = {
            k: v for k, v in made.items() if k in ("norm_weight", "norm_bias", "gamma", "beta")
        }
        leaves |= {"bias": bias, "slope": slope, "stats": stats if kind.uses_input else None}
        for leaf in leaves.values():
            if leaf is not None:
                leaf.requires_grad_()
        if strided:
            for name in ("gamma", "beta", "norm_weight"):
                made[name] = torch.stack([made[name], made[name]], -1)[..., 0]  # type: ignore[list-item]
        tensors = TailTensors(
            **{k: made[k] for k in NAMES}, bias=bias, slope=slope, stats=leaves["stats"]
        )
        if kernels is not None and kernels.covers_block(kind):
            coef = Fused.apply(kernels, kind, *tensors)
        else:
            coef = reference.of_block(kind, tensors, stats.device, MOMENTUM)
        # the pivots are constants of a backend's own choosing near the mean: compare what they make
        a, b, g, s, p, q, row = coef
        weights = torch.cos(torch.arange(coef.numel(), dtype=torch.float64)).reshape(coef.shape)
        found = {
            "a": a,
            "b": b - a * p,
            "g": g,
            "s": s - g * q,
            "slope": row,
            "p": p,
            "q": q,
        }
        if coef.requires_grad:
            (coef * weights.to(coef.dtype))[[0, 1, 2, 3, 6]].sum().backward()
        for name, leaf in leaves.items():
            if leaf is not None and leaf.grad is not None:
                found["d" + name] = leaf.grad
        if kind.update:
            found |= {k: made[k] for k in ("running_mean", "running_var")}  # type: ignore[misc]
        return {k: v.detach() for k, v in found.items()}


def check(case: Case, kernels: Any) -> None:
    """Error against float64 at most 1.5 times the definition's in float32, plus an ulp.

    The error of a sum of a few numbers is itself random: the definition's is the largest over some draws.
    """
    exact = case.run(None, torch.float64)
    ours = case.run(kernels, torch.float32)
    draws = [(case.run(None, torch.float32), exact)]

    def good(name: str, value: Tensor, own: float) -> bool:
        eps = torch.finfo(value.dtype).eps
        theirs = max(relative_error(e[name], x[name]) for e, x in draws)
        # a sum of numbers of order one may cancel: its rounding does not
        rounding = 4 * eps * value.numel() ** 0.5 / exact[name].norm().item()
        return own <= max(1.5 * theirs + eps, rounding)

    for name, value in ours.items():
        if name not in exact:
            # a gradient that is zero by construction: PyTorch has none
            assert not value.any(), name
            continue
        own = relative_error(value, exact[name])
        scale = exact[name].norm().item()
        if scale < 1e-12:
            # zero but for rounding, as a bias in front of a norm
            assert own * (scale or 1.0) < 1e-5, name
            continue
        for seed in range(1, 9):
            if good(name, value, own):
                break
            draws.append(
                (case.run(None, torch.float32, seed=seed), case.run(None, torch.float64, seed=seed))
            )
        assert good(name, value, own), f"{name}: error {own:.3e}"
    assert set(exact) <= set(ours) | {"p", "q"}, set(exact) - set(ours)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("norm", "order", "position"),
    list(itertools.product(spec.NORMS, spec.ORDERS, (None, *spec.DROPOUT_POSITIONS))),
)
def test_every_norm_order_and_dropout(
    norm: str, order: str, position: str | None, backend: str
) -> None:
    kernels = kernels_of(backend)
    if norm == "none" and position == "norm":
        with pytest.raises(ValueError, match="needs a norm"):
            Case(norm=norm, order=order, position=position).run(None, torch.float32)
        return
    check(Case(norm=norm, order=order, position=position), kernels)
    check(Case(norm=norm, order=order, position=position, use_input=False), kernels)


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_absent_shared_rows_and_types(backend: str, data: st.DataObject) -> None:
    kernels = kernels_of(backend)
    absent = ("bias", "norm_weight", "norm_bias", "gamma", "beta")
    batch = data.draw(st.sampled_from((1, 3)))
    channels = data.draw(st.sampled_from((2, 6, 34)))
    case = Case(
        norm=data.draw(st.sampled_from(spec.NORMS)),
        order=data.draw(st.sampled_from(spec.ORDERS)),
        position=data.draw(st.sampled_from((None, "end", "film"))),
        use_input=data.draw(st.booleans()),
        running=data.draw(st.booleans()),
        absent=tuple(data.draw(st.sets(st.sampled_from(absent)))),
        rows=(data.draw(st.sampled_from((1, batch))), data.draw(st.sampled_from((0, 1, batch)))),
        batch=batch,
        channels=channels,
        slopes=data.draw(st.sampled_from((None, 1, channels))),
        dtype=data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        count=data.draw(st.sampled_from((2, 35))),
        eps=data.draw(st.sampled_from((1e-5, 0.1))),
    )
    check(case, kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_as_pytorch_rounds_them(dtype: torch.dtype) -> None:
    """Halves to even, numbers below the smallest normal one, infinities and NaN."""
    kernels = kernels_of("cpu")
    scale = torch.logspace(-9, 5, 29)
    numbers = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    # half way between two neighbours, and a little beside it
    between = numbers * (1 + torch.finfo(dtype).eps / 2)
    special = torch.tensor([0.0, -0.0, 65519.9, 65520.0, 1e30, float("inf"), float("nan")])
    x = torch.cat([numbers.outer(scale).flatten(), between, between * 2**-16, special, -special])
    case = Case(norm="none", order="conv-norm-act-film", batch=1, channels=len(x))
    beta = torch.zeros(1, len(x), dtype=dtype)
    tensors = TailTensors(beta=beta)
    dcoef = torch.zeros(7, 1, len(x))
    dcoef[spec.S, 0] = x
    wanted = [t is not None for t in tensors]
    grads = kernels.block_coefficients_backward(case.kind(wide=False), tensors, dcoef, wanted)
    found = TailTensors(*grads).beta
    assert found is not None
    assert torch.equal(found[0].nan_to_num(1.5), x.to(dtype).nan_to_num(1.5))
    assert torch.equal(found[0].isnan(), x.isnan())


@pytest.mark.parametrize("backend", FUSED)
def test_strided_numbers_are_read_where_they_lie(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """γ and β are halves of one tensor; memory that is free again is overwritten at once."""
    kernels = kernels_of(backend)
    case = Case(rows=(3, 3))
    expected = case.run(kernels, torch.float32)
    contiguous = Tensor.contiguous

    def overwritten(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if t.is_contiguous():
            return contiguous(t, *args, **kwargs)
        copy = torch.from_numpy(np.array(t.detach().numpy(), order="C"))
        weakref.finalize(copy, lambda memory: memory.fill(np.nan), copy.numpy())
        return copy

    monkeypatch.setattr(Tensor, "contiguous", overwritten)
    found = case.run(kernels, torch.float32, strided=True)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", FUSED)
def test_the_block_calls_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, calls = kernels_of(backend), []
    real = kernels.block_coefficients
    monkeypatch.setattr(kernels, "block_coefficients", lambda *a: (calls.append(1), real(*a))[1])
    import fastfilm

    with fastfilm.backend(backend):
        fastfilm.conv_norm_film(torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), norm="instance")
    assert calls == [1]


@pytest.mark.parametrize("backend", FUSED)
def test_a_mask_with_a_gradient_takes_the_definition(backend: str) -> None:
    kernels_of(backend)
    import fastfilm

    mask = torch.rand(2, 3, requires_grad=True)
    with fastfilm.backend(backend):
        v = fastfilm.conv_norm_film(
            torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3), norm="instance", dropout_mask=mask
        )
    assert isinstance(v, Tensor)
    v.square().sum().backward()
    assert mask.grad is not None and mask.grad.abs().sum() > 0


def test_recipes_are_found_again_and_forms_are_told_apart() -> None:
    import fastfilm

    call = functools.partial(fastfilm.conv_norm_film, weight=torch.randn(3, 2, 3, 3), padding=1)
    call(torch.randn(1, 2, 4, 4))
    before = len(recipe._recipes)
    call(torch.randn(1, 2, 4, 4))
    assert len(recipe._recipes) == before
    call(torch.randn(2, 2, 4, 4))
    assert len(recipe._recipes) == before + 1
    with pytest.raises(ValueError, match="gamma"):
        call(torch.randn(2, 2, 4, 4), gamma=torch.rand(3, 3))
    # an option that cannot be a key is served all the same
    assert call(torch.randn(2, 2, 4, 4), padding=[1, 1]).shape == (2, 3, 4, 4)
