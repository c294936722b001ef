"""Tensor subclasses as operands: plain tensors beneath are unwrapped once, all others dispatched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.ops import add_act
from fastfilm.ops.spec import subclasses
from tests.support.yardstick import relative_error


class Noted(Tensor):
    """A note beside a tensor, which results inherit from the first operand; counts the functions it is asked."""

    asked = 0
    note: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Noted.asked += 1
        result = super().__torch_function__(func, types, args, kwargs or {})
        flat: Any = torch.utils._pytree.tree_leaves((args, kwargs))
        first = next((a for a in flat if isinstance(a, Noted)), None)
        if isinstance(result, Noted) and first is not None:
            result.__dict__.update(first.__dict__)
        return result

    def new_empty(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this class has other arguments")


class Plain(Tensor):
    """Its functions give plain tensors, as torchvision's do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Dispatching(Tensor):
    """Decides itself what is done with its values; counts the operators that it sees."""

    inner: Tensor
    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> Dispatching:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))

        def inner(t: Any) -> Any:
            return t.inner if isinstance(t, Dispatching) else t

        return func(*torch.utils._pytree.tree_map(inner, args), **(kwargs or {}))


def noted(t: Tensor, note: str = "mine") -> Noted:
    made = t.as_subclass(Noted)
    made.note = note
    return made


class Custom(nn.Module):
    """A layer that reads what only the subclass has, if that is what comes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if getattr(x, "note", "") == "mine" else x


class Skip(nn.Module):
    """A network of its own with two outputs."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down = nn.MaxPool2d(2)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU())
        self.middle = middle or nn.Identity()
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        deep = self.middle(self.second(self.down(x)))
        return self.out(torch.cat([x, nn.functional.interpolate(deep, scale_factor=2)], 1)), deep


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = make()
    return net, fastfilm.convert(copy.deepcopy(net), verbose=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["noted", "plain", "tensor"])
@pytest.mark.parametrize("middle", [None, Custom])
def test_a_converted_network_gives_back_what_the_original_does(
    middle: Callable[[], nn.Module] | None, kind: str, training: bool
) -> None:
    wrap = {"noted": noted, "plain": lambda t: t.as_subclass(Plain), "tensor": lambda t: t}[kind]
    found = []
    for net in pair(lambda: Skip(middle() if middle else None)):
        net.train(training)
        x = wrap(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
        x.requires_grad_()
        outputs = net(x)
        sum(o.square().mean() for o in outputs).backward()
        grads = [x.grad, *(p.grad for p in net.parameters())]
        kinds = [type(o) for o in outputs], [getattr(o, "note", None) for o in outputs]
        found.append((kinds, type(x.grad), [t.as_subclass(Tensor) for t in (*outputs, *grads)]))
    (theirs, their_grad, exact), (ours, our_grad, values) = found
    assert ours == theirs and our_grad is their_grad
    for a, b in zip(values, exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_converted_network_asks_the_class_once_for_each_output() -> None:
    """What a class costs is Python: the original asks it for every function of the forward."""
    net, converted = pair(Skip)
    x = noted(torch.randn(1, 1, 8, 8))
    counts = []
    for m in (net.eval(), converted.eval()):
        with torch.no_grad():
            m(x)
            before = Noted.asked
            m(x)
            counts.append(Noted.asked - before)
    assert counts[0] > 10 and counts[1] == 2


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "device"])
def test_modes_do_not_lose_the_class(mode: str) -> None:
    _, converted = pair(Skip)
    context: Any = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "device": lambda: torch.device("cpu"),
    }[mode]()
    with context:
        for o in converted(noted(torch.randn(1, 1, 8, 8))):
            assert type(o) is Noted and o.note == "mine"


def test_a_hook_inside_a_network_sees_the_class() -> None:
    _, converted = pair(Skip)
    seen: list[type] = []
    converted.get_submodule("out").register_forward_hook(lambda m, i, o: seen.append(type(i[0])))
    assert type(converted(noted(torch.randn(1, 1, 8, 8)))[0]) is Noted
    assert seen == [Noted]


@pytest.mark.parametrize("name", ["x", "weight", "bias", "norm_weight", "gamma", "slope"])
def test_any_operand_of_the_op_may_be_of_a_class(name: str) -> None:
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 3, 5, 6), "weight": torch.randn(4, 3, 3, 3)}
    given |= {k: torch.randn(4) for k in ("bias", "norm_weight", "slope")}
    given["gamma"] = torch.randn(2, 4)
    options: dict[str, Any] = {"padding": 1, "norm": "instance", "activation": "prelu"}
    expected = fastfilm.conv_norm_film(**given, **options)
    assert isinstance(expected, Tensor)
    leaf = noted(given[name].clone()).requires_grad_()
    v = fastfilm.conv_norm_film(**given | {name: leaf}, **options)
    assert type(v) is Noted and v.note == "mine" and torch.equal(v.as_subclass(Tensor), expected)
    v.square().sum().backward()
    assert isinstance(leaf.grad, Tensor) and leaf.grad.abs().sum() > 0
    del given["weight"], given["bias"], options["padding"]
    if name not in ("weight", "bias"):
        given["x"] = torch.randn(2, 4, 5, 6)
        operand = noted(given[name])
        v = fastfilm.norm_film(**given | {name: operand}, **options)
        assert type(v) is Noted


def test_running_statistics_of_a_class_are_moved_themselves() -> None:
    mean, var = noted(torch.zeros(4)), noted(torch.ones(4))
    x = torch.randn(2, 4, 5, 5)
    fastfilm.norm_film(x, norm="batch", running_mean=mean, running_var=var, training=True)
    assert torch.allclose(mean.as_subclass(Tensor), 0.1 * x.mean((0, 2, 3)), atol=1e-6)


def test_an_unwritten_map_remembers_what_it_comes_from() -> None:
    torch.manual_seed(0)
    first, second = (fastfilm.ConvNormFiLM2d(c, 4, norm="instance") for c in (3, 4))
    x = torch.randn(1, 3, 8, 8)
    pending = first(noted(x), deferred=True)
    assert isinstance(pending, fastfilm.DeferredMap)
    pooled: Any = nn.functional.max_pool2d(pending, 2)
    made: dict[str, Any] = {
        "joined": torch.cat([pending, pending], 1),  # type: ignore[list-item]
        "written": pending.tensor(),
        "read": second(pending),
        "pooled": second(pooled),
        "beside a tensor": torch.cat([noted(torch.zeros(1, 4, 8, 8)), first(x, deferred=True)], 1),
        "summed": add_act(pending, second(pending, deferred="always"), "relu"),
        "added": pending + pending,
    }
    for name, v in made.items():
        v = v.tensor() if hasattr(v, "tensor") else v
        assert type(v) is Noted and v.note == "mine", name
    assert torch.equal(made["read"].as_subclass(Tensor), second(first(x, deferred=True)))


def test_own_networks_ask_the_class_once() -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=3).eval()
    x = torch.randn(1, 1, 16, 16)
    before = Noted.asked
    v = net(noted(x), [[1.0, 0.0, 0.0]])
    assert type(v) is Noted and v.note == "mine" and Noted.asked - before == 1
    assert torch.equal(v.as_subclass(Tensor), net(x, [[1.0, 0.0, 0.0]]))


def test_the_rule_is_what_a_class_defines() -> None:
    assert subclasses.transparent(Noted) and subclasses.transparent(Plain)
    for kind in (Tensor, nn.Parameter, nn.UninitializedParameter, Dispatching, int):
        assert not subclasses.transparent(kind)


@pytest.mark.parametrize("name", ["x", "weight", "gamma"])
def test_a_class_that_dispatches_sees_operators(name: str) -> None:
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 3, 5, 6), "weight": torch.randn(4, 3, 3, 3)}
    given["gamma"] = torch.randn(2, 4)
    options: dict[str, Any] = {"norm": "batch", "training": True, "activation": "relu"}
    expected = fastfilm.conv_norm_film(**given, **options)
    assert isinstance(expected, Tensor)
    Dispatching.seen.clear()
    with torch.no_grad():
        v = fastfilm.conv_norm_film(**given | {name: Dispatching(given[name])}, **options)
    assert isinstance(v, Tensor) and relative_error(v, expected.double()) < 1e-6
    assert Dispatching.seen


def test_monai_meta_tensors() -> None:
    data = pytest.importorskip("monai.data", reason="the package monai is not installed")
    nets = pytest.importorskip("monai.networks.nets")
    inferers = pytest.importorskip("monai.inferers")
    shape: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    found = []
    for net in pair(
        lambda: nets.UNet(**shape, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch")
    ):
        generator = torch.Generator().manual_seed(1)
        x = data.MetaTensor(
            torch.randn(1, 1, 8, 8, 8, generator=generator),
            affine=2 * torch.eye(4),
            meta={"filename_or_obj": "a"},
        )
        batch = data.MetaTensor.ensure_torch_and_prune_meta(torch.zeros(2, 1, 8, 8, 8), {})
        batch.is_batch = True
        x.requires_grad_()
        y = net(x)
        y.square().mean().backward()
        with torch.no_grad():
            tiled = inferers.sliding_window_inference(x, (8, 8, 8), 1, net.eval())
            of_batch = net(batch)
        assert type(y) is type(tiled) is type(of_batch) is data.MetaTensor
        about = [
            (v.meta["filename_or_obj"], v.affine.tolist(), v.is_batch, v.applied_operations)
            for v in (y, tiled)
        ]
        found.append(
            (about, of_batch.is_batch, type(x.grad), y.as_tensor(), x.grad.as_subclass(Tensor))
        )
    assert found[0][:3] == found[1][:3]
    for ours, theirs in zip(found[1][3:], found[0][3:], strict=True):
        assert relative_error(ours, theirs.double()) < 1e-4
