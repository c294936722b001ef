"""``fastfilm.convert`` on small models: what it fuses, what it leaves, and that nobody can tell from outside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fastfilm


class DoubleConv(nn.Module):
    """The classic block of a U-Net."""

    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(ci, co, 3, padding=1, bias=False),
            nn.BatchNorm2d(co),
            nn.ReLU(inplace=True),
            nn.Conv2d(co, co, 3, padding=1, bias=False),
            nn.BatchNorm2d(co),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Small(nn.Module):
    """A U-Net of one level whose forward looks at sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down = DoubleConv(1, 8), DoubleConv(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.conv, self.outc = DoubleConv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        up = self.up(self.down(F.max_pool2d(skip, 2)))
        if up.shape[2:] != skip.shape[2:]:
            up = F.interpolate(up, skip.shape[2:])
        return self.outc(self.conv(torch.cat([skip, up], 1)))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, input gradient and parameter gradients of one training forward and backward."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(2)
    (y * torch.randn(y.shape).to(y.dtype)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def agree(converted: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and buffers by the yardstick: at most 1.5 of eager's error against float64."""
    exact = copy.deepcopy(model).double()
    ours, eager, true = (
        gradients(m, v) for m, v in ((converted, x), (model, x), (exact, x.double()))
    )
    for tensors in (
        zip(ours, eager, true, strict=True),
        zip(converted.buffers(), model.buffers(), exact.buffers(), strict=True),
    ):
        for a, b, t in tensors:
            scale = float(t.abs().max()) + 1e-30
            error, allowed = (float((v.double() - t).abs().max()) for v in (a, b))
            assert error <= 1.5 * allowed + 2e-6 * scale + 1e-6, (a.shape, error, allowed, scale)
    for m in (converted, model, exact):
        m.eval()
    with torch.no_grad():
        y, e, t = converted(x), model(x), exact(x.double())
    scale = float(t.abs().max())
    assert float((y - t).abs().max()) <= 1.5 * float((e - t).abs().max()) + 2e-6 * scale
    for m in (converted, model):
        m.train()


def test_a_model_whose_forward_looks_at_sizes_is_one_graph() -> None:
    torch.manual_seed(0)
    model = Small()
    converted = fastfilm.convert(model, copy=True, verbose=False)
    x = torch.randn(2, 1, 16, 16)
    report = fastfilm.conversion_report(converted, x)
    assert report.share() == 1.0 and report.graphs == 1
    assert {c.name: c.group for c in report.convolutions}["up"] == ("pending", "conv")
    agree(converted, model, x)


def test_keys_parameters_and_values_stay_the_same_objects() -> None:
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    assert fastfilm.convert(model, verbose=False) is model
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    other = Small()
    other.load_state_dict(model.state_dict())
    model.load_state_dict(before)


def test_restore_brings_back_classes_strides_and_bits() -> None:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(1, 1, 16, 16)
    kinds = [type(m) for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    before = model(x)
    fastfilm.convert(model, verbose=False)
    assert isinstance(model.inc, DoubleConv)
    assert [p.stride() for p in model.parameters()] == strides
    assert fastfilm.restore(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert [p.stride() for p in model.parameters()] == strides
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_and_pickles_run_fused_and_apart(how: str) -> None:
    torch.manual_seed(0)
    model = fastfilm.convert(Small().eval(), verbose=False)
    x = torch.randn(1, 1, 16, 16)
    before = model(x)
    twin = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), before)
    assert type(twin) is Small and fastfilm.conversion_report(twin).share(3) == 1.0
    with torch.no_grad():
        twin.outc.bias.add_(1.0)
    assert torch.equal(model(x), before)


def test_output_keeps_the_layout_of_the_input() -> None:
    model = fastfilm.convert(Small(), verbose=False)
    x = torch.randn(2, 1, 16, 16)
    assert model(x).is_contiguous()
    model(x).view(2, -1)


class Residual(nn.Module):
    """conv-norm-act-conv-norm, the sum with the input, act; one activation module for both."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(c, c, 3, padding=1), nn.Conv3d(c, c, 3, padding=1)
        self.norm1, self.norm2 = nn.InstanceNorm3d(c, affine=True), nn.InstanceNorm3d(c)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.act(out)


class PreActivation(nn.Module):
    """norm-act-conv twice and the sum."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, c), nn.GroupNorm(4, c)
        self.conv1, self.conv2 = nn.Conv3d(c, c, 3, padding=1), nn.Conv3d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(out)))


class ActivationFirst(nn.Module):
    """conv, functional ReLU, norm, channel dropout: the order of ivadomed."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(c, c, 3, padding=1), nn.BatchNorm3d(c, momentum=None)
        self.drop = nn.Dropout3d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(F.relu(self.conv(x))))


class Twice(nn.Module):
    """One block that runs twice in a forward."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(c, c, 3, padding=1), nn.BatchNorm3d(c)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.conv(x)), 0.3)
        return self.norm(self.conv(x)).relu()


def _sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


FORMS = {
    "residual": (lambda: Residual(4), 2),
    "pre-activation": (lambda: PreActivation(4), 2),
    "activation first": (lambda: ActivationFirst(4), 1),
    "twice": (lambda: Twice(4), 1),
    "prelu, dropout of p 0": (
        lambda: _sequence(nn.Conv3d(4, 4, 3), nn.InstanceNorm3d(4), nn.Dropout(0.0), nn.PReLU(4)),
        1,
    ),
    "channel dropout between norm and elu": (
        lambda: _sequence(nn.Conv3d(4, 6, 3, 2), nn.BatchNorm3d(6), nn.Dropout3d(0.4), nn.ELU(0.5)),
        1,
    ),
    "channel dropout in front of the norm": (
        lambda: _sequence(
            nn.Conv3d(4, 6, 3, padding="same"), nn.Dropout3d(0.4), nn.BatchNorm3d(6), nn.ReLU()
        ),
        1,
    ),
    "transposed": (
        lambda: _sequence(nn.ConvTranspose3d(4, 6, 3, 2, 1, 1), nn.BatchNorm3d(6, 0.1), nn.GELU()),
        1,
    ),
    "no norm": (lambda: _sequence(nn.Conv3d(4, 6, 3, groups=2), nn.LeakyReLU(0.3)), 1),
    "running statistics of an instance norm": (
        lambda: _sequence(
            nn.Conv3d(4, 6, 3), nn.InstanceNorm3d(6, 0.01, 0.3, track_running_stats=True), nn.ReLU()
        ),
        1,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_gradients_and_statistics_are_the_originals(form: str) -> None:
    make, fused = FORMS[form]
    torch.manual_seed(0)
    model = make()
    converted = fastfilm.convert(model, copy=True, verbose=False)
    agree(converted, model, torch.randn(2, 4, 7, 8, 9))
    assert len(fastfilm.conversion_report(converted).fused) == fused


def test_dropout_of_single_values_is_left_to_pytorch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 1, 1)
    )
    fastfilm.convert(model, verbose=False)
    y = nn.Sequential(*list(model)[:4])(torch.randn(1, 1, 30, 30))
    whole = [float((c == 0).float().mean()) for c in y[0]]
    assert all(0.5 < share < 1.0 for share in whole)
    model.eval()
    model(torch.randn(1, 1, 9, 9))


@pytest.mark.parametrize("mode", ["frozen norm", "training"])
def test_a_frozen_batch_norm_stays_frozen(mode: str) -> None:
    torch.manual_seed(0)
    model = DoubleConv(2, 4)
    converted = fastfilm.convert(model, copy=True, verbose=False)
    if mode == "frozen norm":
        for m in (model, converted):
            for norm in (m.double_conv[1], m.double_conv[4]):
                norm.eval()
    x = torch.randn(2, 2, 9, 9)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(
        converted.double_conv[1].running_var, model.double_conv[1].running_var
    )
    assert int(converted.double_conv[1].num_batches_tracked) == (mode == "training")


def test_hooks_on_a_layer_inside_a_group_are_called() -> None:
    model = fastfilm.convert(DoubleConv(1, 4).eval(), verbose=False)
    x, seen = torch.randn(1, 1, 9, 9), []
    before = model(x)
    handle = model.double_conv[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    torch.testing.assert_close(model(x), before)
    assert seen == [(1, 4, 9, 9)]
    handle.remove()
    assert torch.equal(model(x), before) and len(seen) == 1


def test_a_layer_that_is_replaced_after_conversion_is_the_one_that_runs() -> None:
    model = fastfilm.convert(DoubleConv(1, 4).eval(), verbose=False)
    model.double_conv[3] = nn.Conv2d(4, 4, 1)
    expected = nn.Sequential.forward(model.double_conv, torch.ones(1, 1, 9, 9))
    torch.testing.assert_close(model(torch.ones(1, 1, 9, 9)), expected)


@pytest.mark.parametrize("wrap", ["weight_norm", "old weight_norm", "prune", "reflect", "own conv"])
def test_convolutions_of_computed_weights_are_what_they_compute(wrap: str) -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    conv: nn.Module = nn.Conv2d(2, 4, 3, padding=1)
    if wrap == "weight_norm":
        conv = nn.utils.parametrizations.weight_norm(conv)
    elif wrap == "old weight_norm":
        conv = nn.utils.weight_norm(conv)
    elif wrap == "prune":
        conv = prune.l1_unstructured(conv, "weight", amount=0.5)
    elif wrap == "reflect":
        conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
    else:
        conv = Own(2, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    x = torch.randn(2, 2, 8, 8)
    if wrap in ("old weight_norm", "prune"):
        # PyTorch cannot copy their weights
        before = model(x).detach()
        converted = fastfilm.convert(model, verbose=False)
        torch.testing.assert_close(converted(x), before)
    else:
        converted = fastfilm.convert(copy.deepcopy(model), verbose=False)
        agree(converted, model, x)
    first, second = fastfilm.conversion_report(converted).convolutions
    assert (first.name, second.name) == ("0", "3") and second.fused
    # something stands between the convolution and its norm
    assert first.fused == (wrap != "own conv") and bool(first.reason) != first.fused


class Branches(nn.Module):
    """A forward whose course depends on arguments and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deep = True

    def forward(self, x: Tensor, skip: Tensor | None = None, scale: int = 1) -> list[Tensor]:
        if skip is not None:
            x = x + skip
        y = torch.relu(self.norm(self.conv(x))) * scale
        return [y, F.avg_pool2d(y, 2)] if self.deep else [y]


def test_other_arguments_and_attributes_take_the_originals_course() -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    converted = fastfilm.convert(model, copy=True, verbose=False)
    x, skip = torch.randn(2, 1, 2, 8, 8)
    for deep in (True, False, True):
        model.deep = converted.deep = deep
        for args, kwargs in (((x,), {}), ((x, skip), {}), ((x,), {"skip": skip, "scale": 3})):
            ours, theirs = converted(*args, **kwargs), model(*args, **kwargs)
            assert len(ours) == len(theirs) == 1 + deep
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


class Lost(nn.Module):
    """Forwards that do more than compute."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.last = way, None
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "no_grad":
            with torch.no_grad():
                x = self.conv(x)
            return self.norm(x)
        if self.way == "attribute":
            self.last = x
        if self.way == "random" and torch.rand(()) < 0.5:
            return self.norm(self.conv(x)) * 0
        return self.norm(self.conv(x))


@pytest.mark.parametrize("way", ["no_grad", "attribute", "random"])
def test_side_effects_and_modes_of_a_forward_are_those_of_each_call(way: str) -> None:
    torch.manual_seed(0)
    model = fastfilm.convert(Lost(way), verbose=False)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    state = torch.get_rng_state()
    outputs = [model(x) for _ in range(16)]
    if way == "no_grad":
        outputs[0].sum().backward()
        assert x.grad is None
    elif way == "attribute":
        assert model.last is x
    else:
        torch.set_rng_state(state)
        zero = [bool(torch.rand(()) < 0.5) for _ in range(16)]
        assert [not y.any() for y in outputs] == zero
    assert fastfilm.conversion_report(model).share() == (way != "no_grad")


def test_a_sync_batch_norm_put_in_later_is_the_norm_that_runs() -> None:
    torch.manual_seed(0)
    model = fastfilm.convert(DoubleConv(1, 4), verbose=False)
    x = torch.randn(2, 1, 8, 8)
    plain = copy.deepcopy(model)(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(synced(x), plain)
    assert isinstance(synced.double_conv[1], nn.SyncBatchNorm)


def test_convert_twice_is_convert_once_and_says_what_it_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = fastfilm.convert(fastfilm.convert(Small(), verbose=False))
    assert capsys.readouterr().out == ""
    for _ in range(2):
        model(torch.randn(1, 1, 16, 16))
    said = "fastfilm: 8 of 8 convolutions fused (6 of 6 with kernel 3)\n"
    assert capsys.readouterr().out == said
    fastfilm.restore(model)
    assert set(model.__dict__) == set(Small().__dict__)
    with pytest.raises(ValueError, match="not converted"):
        fastfilm.conversion_report(model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        fastfilm.convert([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        fastfilm.restore({})  # type: ignore[arg-type]


def test_devices_and_tracers_that_fused_groups_do_not_know_get_the_models_own_layers() -> None:
    model = fastfilm.convert(Small().eval(), verbose=False)
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    shape = copy.deepcopy(model).to("meta")(x.to("meta")).shape
    assert shape == (1, 2, 16, 16)
    torch.testing.assert_close(torch.fx.symbolic_trace(model.inc)(x), model.inc(x))


def test_functional_calls_and_per_sample_gradients_work() -> None:
    torch.manual_seed(0)
    model = fastfilm.convert(Small().eval(), verbose=False)
    parameters, x = dict(model.named_parameters()), torch.randn(2, 1, 16, 16)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, p, (x[None],))
        return y.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        for name, grad in grads.items():
            torch.testing.assert_close(each[name][i], grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_wide_batch_norm_layers_on_a_cpu_are_pytorchs_own(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), norm(128), nn.ReLU())
    fused = fastfilm.convert(model, copy=True, verbose=False)
    x = torch.randn(2, 128, 16, 16, requires_grad=True)
    for training in (True, False):
        y = fused.train(training)(x)
        own = norm is nn.BatchNorm2d
        assert (type(y.grad_fn).__name__ == "ReluBackward0") == own
        if own:
            assert torch.equal(y, model.train(training)(x))
    # with FiLM behind it the group is one pass again
    fastfilm.condition(fused, metadata_size=2, where="all")
    assert type(fused(x, torch.randn(2, 2)).grad_fn).__name__ != "ReluBackward0"
