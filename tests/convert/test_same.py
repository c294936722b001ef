"""A converted model is the same function as before: side effects, later changes, errors and layouts too."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfilm

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
FLAG = False


def block(ci: int = 3, co: int = 4, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ci, co, 3, padding=1),
        nn.BatchNorm2d(co),
        nn.LeakyReLU(0.1) if act is None else act,
    )


def pair(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """A model and its converted copy."""
    torch.manual_seed(0)
    model = make()
    return model, fastfilm.convert(model, copy=True, verbose=False)


def compare(
    model: nn.Module, converted: nn.Module, *args: Any, calls: int = 1, **kwargs: Any
) -> None:
    """Outputs, gradients and buffers of some calls in float64, where they differ by rounding alone."""
    model.double(), converted.double()
    for _ in range(calls):
        found = []
        for m in (model, converted):
            m.zero_grad()
            given = [_leaf(a) if isinstance(a, Tensor) else a for a in args]
            torch.manual_seed(1)
            outputs = m(*given, **kwargs)
            flat = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
            grads: list[Any] = []
            if any(t.requires_grad for t in flat):
                loss = sum((t * torch.linspace(-1, 2, t.numel()).view(t.shape)).sum() for t in flat)
                loss.backward()
                grads = [a.grad for a in given if isinstance(a, Tensor)]
                grads += [p.grad for p in m.parameters()]
            found.append((outputs, [*flat, *grads, *m.buffers()]))
        (theirs, exact), (ours, values) = found
        assert torch.utils._pytree.tree_structure(ours) == torch.utils._pytree.tree_structure(
            theirs
        )
        assert len(values) == len(exact)
        for a, b in zip(values, exact, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype and a.is_contiguous() == b.is_contiguous()
                rounding = 1e-3 if b.dtype == torch.bfloat16 else 1e-9
                torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def _leaf(t: Tensor) -> Tensor:
    t = t.detach().clone().double() if t.is_floating_point() else t.clone()
    return t.requires_grad_() if t.is_floating_point() else t


# side effects


class Effects(nn.Module):
    """A forward that counts, keeps and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.steps, self.log = block(), 0, []
        self.feats: dict[str, Tensor] = {}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        y: Tensor = self.block(x)
        self.feats["y"] = y
        self.log.append(tuple(y.shape))
        self.seen += 1
        return y


def test_side_effects_happen_at_each_call_and_not_before() -> None:
    model, converted = pair(Effects)
    assert converted.steps == 0 and converted.block[1].num_batches_tracked == 0
    for calls in (1, 2, 3):
        y = converted(X)
        assert converted.steps == calls == len(converted.log) == int(converted.seen)
        assert int(converted.block[1].num_batches_tracked) == calls
        assert converted.feats["y"] is y and type(y) is Tensor
    for _ in range(3):
        model(X)
    torch.testing.assert_close(converted.block[1].running_var, model.block[1].running_var)


def test_conversion_and_its_report_leave_everything_as_it_was() -> None:
    model = Effects()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    fastfilm.convert(model, verbose=False)
    assert torch.equal(torch.get_rng_state(), drawn)
    fastfilm.conversion_report(model, X)
    assert model.steps == 0 and not model.log and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# later changes


class Net(nn.Module):
    """An encoder, a decoder and a head, with options of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = block(), block(4, 4, nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1))
        self.cfg = SimpleNamespace(flag=False, names=["a"])
        self.alpha, self.table = 1.0, {"scale": 1.0}

    @property
    def factor(self) -> float:
        return 2.0 if self.cfg.flag else 1.0

    def forward(self, x: Tensor) -> Any:
        y = self.decoder(self.encoder(x)) * self.factor * self.table["scale"]
        y = self.head(y) * self.alpha
        if FLAG or len(self.cfg.names) > 1:
            y = -y
        if not torch.is_grad_enabled():
            return [y]
        return y if self.encoder[2].negative_slope < 0.5 else y + 1


class Adapted(nn.Module):
    """A layer with a low-rank addition, as adapters put it in place of the layer."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Conv2d(inner.in_channels, 1, 1, bias=False)
        self.up = nn.Conv2d(1, inner.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


def _adapt(m: Any) -> None:
    torch.manual_seed(3)
    m.decoder[0] = Adapted(m.decoder[0])


def _replace_forward(m: Any) -> None:
    layer = m.encoder[0]
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2


CHANGES: dict[str, Callable[[Any], None]] = {
    "a layer appended": lambda m: m.head.append(nn.Sigmoid()) and None,
    "a head replaced": lambda m: setattr(m, "head", nn.Sequential(nn.Flatten(2), nn.Softmax(2))),
    "a layer wrapped": _adapt,
    "a layer deleted": lambda m: m.decoder.__delitem__(1),
    "a layer exchanged": lambda m: m.encoder.__setitem__(1, nn.GroupNorm(2, 4)),
    "an option of a child object": lambda m: setattr(m.cfg, "flag", True),
    "a list": lambda m: m.cfg.names.append("b"),
    "a dictionary": lambda m: m.table.update(scale=3.0),
    "a number": lambda m: setattr(m, "alpha", 0.25),
    "a slope": lambda m: setattr(m.encoder[2], "negative_slope", 0.7),
    "padding": lambda m: (
        setattr(m.encoder[0], "padding_mode", "circular")
        or setattr(m.encoder[0], "_reversed_padding_repeated_twice", [1, 1, 1, 1])
    ),
    "eps": lambda m: setattr(m.encoder[1], "eps", 0.5),
    "a frozen norm": lambda m: m.decoder[1].eval() and None,
    "evaluation": lambda m: m.eval() and None,
    "a forward of a layer": _replace_forward,
    "a hook": lambda m: m.encoder[1].register_forward_hook(lambda m, i, o: o * 3) and None,
    "a pre-hook": lambda m: (
        m.decoder[0].register_forward_pre_hook(lambda m, i: (i[0] + 1,)) and None
    ),
    "a hook of the model": lambda m: (
        m.register_forward_hook(
            lambda m, i, o: [t - 1 for t in o] if isinstance(o, list) else o - 1
        )
        and None
    ),
    "weights": lambda m: (
        m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}) and None
    ),
    "a frozen weight": lambda m: setattr(m.encoder[0].weight, "requires_grad", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_counts(change: str) -> None:
    model, converted = pair(Net)
    compare(model, converted, X)
    for m in (model, converted):
        CHANGES[change](m)
    compare(model, converted, X, calls=2)
    with torch.no_grad():
        compare(model, converted, X)


def test_a_global_and_the_grad_mode_are_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = pair(Net)
    compare(model, converted, X)
    monkeypatch.setitem(globals(), "FLAG", True)
    compare(model, converted, X)
    with torch.no_grad():
        assert isinstance(converted(X.double()), list)
    with torch.inference_mode():
        assert isinstance(converted(X.double()), list)


def test_a_hook_of_all_modules_is_called() -> None:
    model, converted = pair(Net)
    converted(X)
    names: list[list[str]] = []
    for m in (model, converted):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o, seen=seen: seen.append(type(m).__name__)
        )
        m(X)
        handle.remove()
        names.append(seen)
    assert names[0] == names[1] and "Conv2d" in names[1]


def test_an_annealed_number_makes_few_graphs() -> None:
    model, converted = pair(Net)
    for i in range(20):
        model.alpha = converted.alpha = 0.05 * i
        torch.testing.assert_close(converted(X), model(X), rtol=1e-4, atol=1e-5)
    assert fastfilm.conversion_report(converted).graphs <= 6


def test_sizes_that_vary_make_few_graphs() -> None:
    model, converted = pair(Net)
    for i in range(12):
        x = torch.randn(1 + i % 3, 3, 6 + i, 9 + i // 2)
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    report = fastfilm.conversion_report(converted)
    assert report.graphs <= 8 and report.share(3) == 1.0


# the shapes of forwards


class Alias(nn.Module):
    """A map that has a second name when it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x)
        other = y
        other += 1
        shown = y.flatten(2)
        shown *= 2
        return y, other


class WrittenThroughView(nn.Module):
    """A map that is written to through a view of another shape, before it is read for itself."""

    def __init__(self, write: Callable[[Tensor], Any], read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.write, self.read = block(), write, read

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x)
        shown = y.view(y.shape[0], -1)
        self.write(shown)
        return self.read(y), shown


class OnesOwnInput(nn.Module):
    """A forward that writes to its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        x += y.detach()
        return F.relu(y) + x.mean()


class Views(nn.Module):
    """Views, strides and permutations of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = block(), block(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.block(x)
        n, c, h, w = y.shape
        z = y.view(n, c, h * w).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)
        z = self.last(z)
        flat = (
            z.permute(0, 2, 3, 1).view(n, -1)
            if z.permute(0, 2, 3, 1).is_contiguous()
            else z.view(n, -1)
        )
        return y, z, flat, y.stride()[1]


class Regions(nn.Module):
    """Grad mode and autocast that change inside of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
        y = F.silu(self.norm(y))
        with torch.autocast("cpu", torch.bfloat16):
            y = self.last(y)
        return F.relu(y.float())


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = block(), block(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = torch.utils.checkpoint.checkpoint(self.second, y, use_reentrant=self.reentrant)
        return z


class Random(nn.Module):
    """Dropouts of every kind, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU()
        )
        self.second = nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.Dropout2d(0.3), nn.InstanceNorm2d(4), nn.ReLU()
        )
        self.third = nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.Dropout2d(0.5), nn.SiLU(), nn.Conv2d(4, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return self.third(x + torch.rand(())) + torch.rand_like(x[:, :1, :1, :1])


class Draw(nn.Module):
    """Numbers drawn between a channel dropout and the end of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout2d(self.conv(x), 0.4, self.training)
        drawn = torch.rand(4, 1, 1)
        return F.relu(self.norm(y)) + drawn


class Swish(nn.Module):
    """Swishes written out, gates of channels, and a shift between convolution and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y = self.conv(x) + shift[:, :, None, None]
        y = self.norm(y)
        y = y * torch.sigmoid(y)
        g = torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.gate(y * g).mul(shift[:, :, None, None]).relu()


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "an alias": (Alias, (X,)),
    "views": (Views, (X,)),
    "regions": (Regions, (X,)),
    "checkpoints": (lambda: Checkpointed(False), (X,)),
    "reentrant checkpoints": (lambda: Checkpointed(True), (X,)),
    "random numbers": (Random, (X,)),
    "numbers drawn inside of a group": (Draw, (X,)),
    "swish, gates, shifts": (Swish, (X, torch.randn(2, 4))),
    "unbatched": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)),
        (X[0],),
    ),
    "unbatched 3D": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4), nn.ReLU()),
        (torch.randn(3, 6, 6, 6),),
    ),
    "channels-last": (Net, (X.contiguous(memory_format=torch.channels_last),)),
    "strided": (Net, (torch.randn(2, 3, 12, 24)[..., ::2],)),
    "one voxel": (lambda: block().eval(), (torch.randn(2, 3, 1, 1),)),
    "a sum of single voxels": (
        lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Hardswish(inplace=True)
        ),
        (X,),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_forwards_of_every_form_compute_what_they_did(form: str, training: bool) -> None:
    make, args = FORMS[form]
    model, converted = pair(make)
    if form != "one voxel":
        model.train(training), converted.train(training)
    compare(model, converted, *args, calls=2)
    with torch.no_grad():
        compare(model, converted, *args)


def test_a_view_of_a_map_writes_to_the_map() -> None:
    model, converted = pair(Alias)
    for ours, theirs in zip(converted.eval()(X), model.eval()(X), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("written", ["whole", "a part"])
@pytest.mark.parametrize("read", ["sigmoid", "convolution"])
def test_a_map_is_read_after_a_view_of_another_shape_was_written(written: str, read: str) -> None:
    def write(shown: Tensor) -> None:
        (shown if written == "whole" else shown[:, :3]).mul_(2)

    def make() -> nn.Module:
        reader: Callable[[Tensor], Tensor] = torch.sigmoid
        if read == "convolution":
            reader = nn.Conv2d(4, 4, 3, padding=1)
        return WrittenThroughView(write, reader)

    model, converted = pair(make)
    for m in (model, converted):
        m.eval()
    for ours, theirs in zip(converted(X), model(X), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_forward_writes_to_its_argument_as_before() -> None:
    model, converted = pair(OnesOwnInput)
    a, b = X.clone(), X.clone()
    torch.testing.assert_close(converted(b), model(a))
    torch.testing.assert_close(b, a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_and_autocast_give_what_they_gave(dtype: torch.dtype) -> None:
    model, converted = pair(Net)
    if dtype == torch.float64:
        compare(model.double(), converted.double(), X.double())
        return
    for m in (model.float(), converted.float()):
        m.eval()
    with torch.autocast("cpu", dtype):
        theirs, ours = model(X), converted(X)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05)
    theirs, ours = model.to(dtype)(X.to(dtype)), converted.to(dtype)(X.to(dtype))
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05)


# errors


@pytest.mark.parametrize(
    ("make", "args"),
    [
        (Net, (torch.randn(2, 5, 12, 12),)),
        (Net, (torch.randn(12, 12),)),
        (Net, (torch.randn(2, 3, 12, 12).double(),)),
        (Net, (torch.zeros(2, 3, 12, 12, dtype=torch.long),)),
        (Net, ("text",)),
        (Net, ()),
        (Net, (X, X)),
        (lambda: block(), (torch.randn(1, 3, 1, 1),)),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU()),
            (torch.randn(1, 3, 3, 3),),
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU()), (torch.randn(1, 3, 3, 3),)),
    ],
)
def test_errors_are_of_the_type_that_they_were(make: Callable[[], nn.Module], args: Any) -> None:
    model, converted = pair(make)
    kinds = []
    for m in (model, converted):
        with pytest.raises(Exception) as caught:
            m(*args)
        kinds.append(caught.type)
    assert issubclass(kinds[1], kinds[0]), kinds
    # and nothing is broken by it
    compare(model, converted, X)
    assert fastfilm.conversion_report(converted).graphs >= 1


class Interrupted(nn.Module):
    """A forward that is interrupted the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.first = block(), True

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.first = False
            signal.raise_signal(signal.SIGINT)
        y: Tensor = self.block(x)
        return y


def test_an_interrupt_leaves_nothing_behind() -> None:
    call, attribute = nn.Module.__call__, nn.Module.__getattr__
    model = fastfilm.convert(Interrupted(), verbose=False)
    # processes in the background ignore the signal
    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            model(X)
    finally:
        signal.signal(signal.SIGINT, before_test)
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is attribute
    plain = Interrupted()
    plain.load_state_dict(model.state_dict())
    plain.first = False
    compare(plain, model, X)


def test_a_model_that_compiles_without_end_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Endless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.name = block(), ""

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x)
            return y * len(self.name)

    model, converted = pair(Endless)
    for i in range(70):
        model.name = converted.name = "x" * i
        torch.testing.assert_close(converted(X), model(X), rtol=1e-4, atol=1e-5)
    said = [r for r in caplog.records if "recompile_limit" in r.getMessage()]
    assert len(said) == 1 and "name" in said[0].getMessage()
