"""The groups that the conversion finds in a forward: which calls run as one, and which must not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfilm
from fastfilm.convert.groups import fit
from fastfilm.convert.rewrite import AS_FAST

from ..support.guided_diffusion import exact, small, stirred
from .test_same import compare

X = torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("letters", "homogeneous", "expected"),
    [
        ("", False, ("conv-norm-film-act", "end")),
        ("na", False, ("conv-norm-film-act", "end")),
        ("nfa", False, ("conv-norm-film-act", "end")),
        ("naf", False, ("conv-norm-act-film", "end")),
        ("anf", False, ("conv-act-norm-film", "end")),
        ("dna", False, ("conv-norm-film-act", "norm")),
        ("nda", False, ("conv-norm-film-act", "film")),
        ("nad", False, ("conv-norm-film-act", "end")),
        ("da", False, ("conv-norm-film-act", "film")),
        ("ndaf", False, None),
        ("ndaf", True, ("conv-norm-act-film", "film")),
        ("dan", False, None),
        ("dan", True, ("conv-act-norm-film", "norm")),
        ("fn", False, None),
        ("ana", False, None),
    ],
)
def test_steps_have_an_order_or_none(
    letters: str, homogeneous: bool, expected: tuple[str, str] | None
) -> None:
    assert fit(letters, homogeneous) == expected


class Forward(nn.Module):
    """Layers and a function of them that is the forward."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def conv(ci: int = 4, co: int = 4, **options: Any) -> nn.Module:
    return nn.Conv2d(ci, co, 3, padding=1, **options)


class Standardised(nn.Conv2d):
    """A convolution with standardised weights (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / std, self.bias, padding=self.padding)  # type: ignore[arg-type]


class NormAct(nn.BatchNorm2d):
    """A batch norm that holds its activation, as timm's do, and counts by itself."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return self.act(self.drop(x))  # type: ignore[no-any-return]


def film(m: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.silu(m.norm(m.conv(x)) * (1 + gamma[..., None, None]) + beta[..., None, None])


ROWS = (torch.randn(2, 4), torch.randn(2, 4))
FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[str, ...]]] = {
    "FiLM of its own": (
        lambda: Forward(film, conv=conv(), norm=nn.GroupNorm(2, 4)),
        (X, *ROWS),
        ("conv", "norm", "film", "act"),
    ),
    "FiLM by addcmul": (
        lambda: Forward(
            lambda m, x, g, b: torch.addcmul(
                b[..., None, None], F.relu(m.norm(m.conv(x))), g[..., None, None]
            ),
            conv=conv(),
            norm=nn.InstanceNorm2d(4),
        ),
        (X, *ROWS),
        ("conv", "norm", "act", "film"),
    ),
    "a scale of each channel": (
        lambda: Forward(lambda m, x, g: m.conv(x) * g[0][:, None, None], conv=conv()),
        (X, ROWS[0]),
        ("conv", "film"),
    ),
    "a norm that holds its activation": (
        lambda: nn.Sequential(conv(), NormAct(4, nn.ReLU6(inplace=True))),
        (X,),
        ("conv", "norm"),
    ),
    "the same with hardswish": (
        lambda: nn.Sequential(conv(), NormAct(4, nn.Hardswish(inplace=True))),
        (X,),
        ("conv", "norm"),
    ),
    "the same with SiLU": (
        lambda: nn.Sequential(conv(), NormAct(4, nn.SiLU())),
        (X,),
        ("conv", "norm", "act"),
    ),
    "an idle dropout without a norm": (
        lambda: nn.Sequential(conv(), nn.Dropout(0.0), nn.LeakyReLU()),
        (X,),
        ("conv", "act"),
    ),
    "a channel dropout without a norm": (
        lambda: nn.Sequential(conv(), nn.Dropout2d(0.4), nn.GELU()),
        (X,),
        ("conv", "dropout", "act"),
    ),
    "standardised weights": (
        lambda: nn.Sequential(Standardised(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU()),
        (X,),
        ("conv", "norm", "act"),
    ),
    "a sum": (
        lambda: Forward(
            lambda m, x: F.relu(m.norm(m.conv(x)) + x), conv=conv(), norm=nn.BatchNorm2d(4)
        ),
        (X,),
        ("conv", "norm", "add"),
    ),
}


@pytest.mark.parametrize("form", FOUND)
def test_what_can_run_as_one_does(form: str) -> None:
    make, args, roles = FOUND[form]
    torch.manual_seed(0)
    model = make()
    converted = fastfilm.convert(model, copy=True, verbose=False)
    compare(model, converted, *args, calls=2)
    first = fastfilm.conversion_report(converted).convolutions[0]
    assert first.group == roles, first
    with torch.no_grad():
        compare(model.eval(), converted.eval(), *args)


def writes(m: Any, x: Tensor) -> Tensor:
    """The input is written to between the convolution and its norm."""
    y = m.conv(x)
    x.detach().add_(1)
    return F.relu(m.norm(y)) + x


def twice(m: Any, x: Tensor) -> Tensor:
    """A convolution's output has two readers."""
    y = m.conv(x)
    return F.relu(m.norm(y)) + y


def single(m: Any, x: Tensor) -> Tensor:
    """The first sample's numbers are added to all: no FiLM of each sample."""
    return m.norm(m.conv(x)) * m.conv(x)[:1, :, :1, :1]


def batch_of_rows(m: Any, x: Tensor, g: Tensor) -> Tensor:
    """One map for each row, by broadcasting."""
    return m.norm(m.conv(x[:1])) * g[..., None, None]


def statistics(m: Any, x: Tensor) -> Tensor:
    """Running statistics are read and written around the norm."""
    y = m.conv(x)
    before = m.norm.running_mean.clone()
    y = m.norm(y)
    m.norm.running_mean.mul_(2)
    return F.relu(y) + before[:, None, None]


def weights(m: Any, x: Tensor) -> Tensor:
    """The norm's weight is written to before it is read."""
    y = m.conv(x)
    m.norm.weight.data.mul_(1.5)
    return F.relu(m.norm(y))


def late(m: Any, x: Tensor) -> Tensor:
    """What an activation in front of a convolution reads is written to before the convolution."""
    y = x * 1
    z = F.silu(y)
    y.detach().zero_()
    return m.conv(z)


def branches(m: Any, x: Tensor) -> Tensor:
    """In front of an activation that is not homogeneous a dropout keeps its place."""
    return m.norm(F.silu(F.dropout2d(m.conv(x), 0.5, m.training)))


@pytest.mark.parametrize(
    ("forward", "args"),
    [
        (writes, (X,)),
        (twice, (X,)),
        (single, (X,)),
        (batch_of_rows, (X, ROWS[0])),
        (statistics, (X,)),
        (weights, (X,)),
        (late, (X,)),
        (branches, (X,)),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_must_not_be_moved_is_not(
    forward: Callable[..., Tensor], args: tuple[Tensor, ...]
) -> None:
    torch.manual_seed(0)
    model = Forward(forward, conv=conv(), norm=nn.BatchNorm2d(4))
    converted = fastfilm.convert(model, copy=True, verbose=False)
    with torch.no_grad():
        compare(model, converted, *args, calls=2)
    if forward not in (writes, statistics, late):
        # autograd refuses these, converted or not
        compare(model, converted, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_norm_in_float32_between_16_bit_maps(dtype: torch.dtype) -> None:
    """guided-diffusion's form: the norm computes in float32 and gives back the map's type."""
    torch.manual_seed(0)
    model = Forward(
        lambda m, x: m.last(F.silu(m.norm(m.conv(x).float()).type(x.dtype))),
        conv=conv().to(dtype),
        norm=nn.GroupNorm(2, 4),
        last=conv().to(dtype),
    )
    converted = fastfilm.convert(model, copy=True, verbose=False)
    x = X.to(dtype)
    ours, theirs = converted(x), model(x)
    assert ours.dtype == theirs.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    groups = [c.group for c in fastfilm.conversion_report(converted).convolutions]
    assert groups == [("conv", "norm", "act"), ("pending", "conv")]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_guided_diffusions_unet_is_fused_without_condition(checkpoints: bool) -> None:
    torch.manual_seed(0)
    plain = stirred(small(use_checkpoint=checkpoints))
    model = exact(plain)
    converted = fastfilm.convert(copy.deepcopy(model), verbose=False)
    x, steps = torch.randn(2, 1, 16, 16), torch.tensor([3, 70])
    compare(model, converted, x, steps)
    fastfilm.convert(single := copy.deepcopy(plain), verbose=False)
    torch.testing.assert_close(single(x, steps), plain(x, steps), rtol=1e-4, atol=1e-4)
    report = fastfilm.conversion_report(single)
    # in training, the convolutions of its upsampled maps are left alone
    assert report.flops_share() >= 0.75, report.table()
    assert any("film" in c.group for c in report.convolutions)
    fastfilm.convert(still := copy.deepcopy(plain), verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(still(x, steps), plain(x, steps), rtol=1e-4, atol=1e-4)
    assert fastfilm.conversion_report(still).flops_share() >= 0.9


ENLARGED: dict[str, Callable[[Any, Tensor], Any]] = {
    "nearest": lambda m, x: m.conv(F.interpolate(x, scale_factor=2)),
    "of a sum": lambda m, x: m.conv(F.interpolate(x + x.roll(1, 2), (21, 17))),
    "bilinear, read twice": lambda m, x: [
        (up := F.interpolate(x, scale_factor=1.5, mode="bilinear")),
        m.conv(up),
    ],
    "in front of two": lambda m, x: [
        m.conv(up := F.interpolate(x, scale_factor=2)),
        F.relu(m.norm(m.last(up))),
    ],
    "written to afterwards": lambda m, x: [
        m.conv(F.interpolate(y := x * 2, scale_factor=2)),
        y.add_(1),
    ],
    "written to before it is read": lambda m, x: [
        up := F.interpolate(y := x * 2, scale_factor=2),
        y.add_(1),
        m.conv(up),
    ],
    "channels-last": lambda m, x: m.conv(
        F.interpolate(x.contiguous(memory_format=torch.channels_last), scale_factor=3)
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ENLARGED)
def test_enlarged_maps_in_front_of_convolutions(form: str, grad: bool) -> None:
    """In inference the convolution reads the small map."""
    torch.manual_seed(0)
    layers = {"conv": conv(), "last": conv(), "norm": nn.BatchNorm2d(4)}
    model = Forward(ENLARGED[form], **layers).double().eval()
    converted = fastfilm.convert(model, copy=True, verbose=False)
    x = X.double()
    with torch.set_grad_enabled(grad):
        ours, theirs = converted(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    first = fastfilm.conversion_report(converted).convolutions[0].group
    kept = grad or "twice" in form or form.startswith("written")
    assert first == (() if kept else ("pending", "conv")), first


def test_networks_of_much_reshaping_are_compiled_for_each_size() -> None:
    """A graph for any size of window attention would take TorchDynamo minutes."""

    def windows(m: Any, x: Tensor) -> Tensor:
        for _ in range(13):
            n, c, h, w = x.shape
            x = x.view(n, c, h * w).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)
        return F.relu(m.conv(x))

    model = Forward(windows, conv=conv())
    converted = fastfilm.convert(model, copy=True, verbose=False)
    for size in (6, 8, 10):
        x = torch.randn(2, 4, size, size)
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert fastfilm.conversion_report(converted).graphs == 3


def test_wide_layers_are_pytorchs_own_in_training_and_blocks_in_inference() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(128, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 128, 6, 6)
    for grad in (True, False):
        converted = fastfilm.convert(model, copy=True, verbose=False)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
        (found,) = fastfilm.conversion_report(converted).convolutions
        assert found.group == ("conv", "norm", "act")
        assert found.reason == (AS_FAST if grad else "")
