"""Tools that look for norm layers find a block's own, and the block does what they ask for, as eager does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

import fastfilm

ORDERS = ("conv-norm-film-act", "conv-act-norm-film")
Tool = Callable[[nn.Module], None]


def eager(
    dims: int = 2, norm: str = "batch", order: str = ORDERS[0], momentum: Any = 0.1
) -> nn.Module:
    """Two convolutions with norm and activation, in PyTorch."""
    torch.manual_seed(0)
    convolution = nn.Conv2d if dims == 2 else nn.Conv3d
    layers: list[nn.Module] = []
    for a, b in ((3, 4), (4, 5)):
        kinds: dict[str, Callable[[], nn.Module]] = {
            "batch": lambda b=b: (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(
                b, 1e-3, momentum
            ),
            "instance": lambda b=b: (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(
                b, 1e-3, momentum, True, True
            ),
        }
        rest = [kinds[norm](), nn.SiLU()]
        layers += [convolution(a, b, 3, padding=1), *(rest if order == ORDERS[0] else rest[::-1])]
    return nn.Sequential(*layers)


def blocks(
    dims: int = 2, norm: str = "batch", order: str = ORDERS[0], momentum: Any = 0.1
) -> nn.Module:
    """``eager`` of blocks."""
    model = eager(dims, norm, order, momentum)
    kind = fastfilm.ConvNormFiLM2d if dims == 2 else fastfilm.ConvNormFiLM3d
    options: dict[str, Any] = {"norm": norm, "order": order, "momentum": momentum}
    options |= {"activation": "silu", "eps": 1e-3, "track_running_stats": True}
    made = nn.Sequential(*[kind(a, b, **options) for a, b in ((3, 4), (4, 5))])
    for block, conv in zip(made, (model[0], model[3]), strict=True):
        block.load_state_dict(conv.state_dict(), strict=False)
    return made


def converted(*form: Any) -> nn.Module:
    """``eager``, converted."""
    return fastfilm.convert(eager(*form), verbose=False)


OURS = pytest.mark.parametrize("ours", [blocks, converted])


def image(dims: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, *(7, 6, 5)[:dims], generator=generator) * 2 + 1


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (_BatchNorm, _InstanceNorm, nn.GroupNorm))]


def numbers(model: nn.Module, dims: int = 2) -> dict[str, Tensor]:
    """What two training steps' forward and backward passes and an evaluation leave behind."""
    found = {}
    for step in range(2):
        x = image(dims, step).requires_grad_()
        model.zero_grad()
        out = model(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(step)))
        found |= {f"out {step}": out.detach(), f"dx {step}": x.grad}
    for i, m in enumerate(norms(model)):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if getattr(m, name, None) is not None:
                found[f"{name} {i}"] = getattr(m, name).clone()
        for name, p in m.named_parameters():
            if p.grad is not None:
                found[f"d{name} {i}"] = p.grad
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        found["evaluation"] = model.eval()(image(dims))
    for m, training in modes:
        m.training = training
    return found


def assert_as_eager(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3).item() if value.is_floating_point() else 0.0
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=3e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


class Frozen(nn.Module):
    """A batch norm of constants, as torchvision's and timm's freezing put in."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone() + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(shape) + (self.bias - self.running_mean * scale).view(shape)


class AnyBatchNorm(_BatchNorm):
    """As tools that undo SyncBatchNorm put in."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


def replace(model: nn.Module, make: Callable[[Any], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (_BatchNorm, _InstanceNorm)):
                setattr(module, name, make(child))


def each(act: Callable[[Any], object]) -> Tool:
    def tool(model: nn.Module) -> None:
        assert len(norms(model)) == 2
        for m in norms(model):
            act(m)

    return tool


def _set(**values: Any) -> Tool:
    return each(lambda m: [setattr(m, k, v) for k, v in values.items()])


def _init(m: nn.Module) -> None:
    if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
        nn.init.constant_(m.weight, 0.7)
        nn.init.constant_(m.bias, 0.2)


def _anew(m: Any) -> None:
    m.weight = nn.Parameter(torch.linspace(0.5, 1.5, m.num_features))


def _like(kind: Any) -> Tool:
    return lambda model: replace(
        model, lambda m: kind(m.num_features, eps=m.eps, momentum=m.momentum)
    )


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


TOOLS: dict[str, Tool] = {
    "nothing": lambda model: None,
    "eval()": each(lambda m: m.eval()),
    "frozen whole": each(lambda m: (m.eval(), [p.requires_grad_(False) for p in m.parameters()])),
    "one eval()": lambda model: norms(model)[0].eval() and None,
    "weight frozen": each(lambda m: m.weight.requires_grad_(False)),
    "momentum": _set(momentum=0.37),
    "cumulative": _set(momentum=None),
    "statistics not tracked": _set(track_running_stats=False),
    "not tracked, evaluated": each(lambda m: (m.eval(), setattr(m, "track_running_stats", False))),
    "eps": _set(eps=0.5),
    "statistics reset": each(lambda m: (m.running_mean.add_(3), m.reset_running_stats())),
    "parameters reset": each(lambda m: (m.weight.data.add_(3), m.reset_parameters())),
    "initialised by class": lambda model: model.apply(_init) and None,
    "another weight": each(_anew),
    "no statistics (torch.func)": lambda model: replace_all_batch_norm_modules_(model) and None,
    "statistics written": each(lambda m: m.running_var.fill_(4.0)),
    "SyncBatchNorm": lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model) and None,
    "constants": lambda model: replace(model, Frozen),
    "group norm": lambda model: replace(model, lambda m: nn.GroupNorm(1, m.num_features)),
    "instance norm": _like(nn.InstanceNorm2d),
    "batch norm of any dimensions": _like(AnyBatchNorm),
    "identity": lambda model: replace(model, lambda m: nn.Identity()),
    "hook": each(lambda m: m.register_forward_hook(lambda m, args, out: out * 1.5)),
    "forward replaced": each(lambda m: setattr(m, "forward", lambda x: x.sin())),
    "pruned": each(lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    "parametrised": each(lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
}


@OURS
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_asks_for_is_done_as_in_eager(ours: Any, tool: str, order: str) -> None:
    results = []
    for make in (ours, eager):
        model = make(2, "batch", order)
        numbers(model)  # statistics that are not those of a fresh network
        TOOLS[tool](model)
        results.append(numbers(model))
    assert_as_eager(*results)


@OURS
@pytest.mark.parametrize(
    "tool", ["eval()", "momentum", "cumulative", "statistics not tracked", "eps"]
)
def test_instance_norm_with_running_statistics_obeys_too(ours: Any, tool: str) -> None:
    results = []
    for make in (ours, eager):
        model = make(3, "instance")
        TOOLS[tool](model)
        results.append(numbers(model, 3))
    assert_as_eager(*results)


@OURS
@pytest.mark.parametrize("dims", [2, 3])
def test_update_bn_leaves_the_statistics_of_the_data(ours: Any, dims: int) -> None:
    batches = [image(dims, seed) for seed in range(4)]
    found = []
    for make in (ours, eager):
        model = make(dims)
        model(image(dims, 9))
        averaged = AveragedModel(model)
        update_bn(batches, averaged)
        found.append(norms(averaged))
    for a, b in zip(*found, strict=True):
        assert a.num_batches_tracked == b.num_batches_tracked == 4
        assert a.momentum == b.momentum == 0.1
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer"])
def test_weight_decay_by_class_counts_every_parameter_once(norm: str) -> None:
    """As torchvision splits parameters: by the class of the module that holds them."""
    net = fastfilm.FiLMedUNet(
        1, 1, depth=1, base_filters=4, norm=norm, num_groups=2, norm_affine=True
    )
    kinds = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
    decayed, others = [], []
    for module in net.modules():
        held = list(module.parameters(recurse=False))
        (others if isinstance(module, kinds) else decayed).extend(held)
    assert len({id(p) for p in [*decayed, *others]}) == len(decayed) + len(others)
    assert len(decayed) + len(others) == len(list(net.parameters()))
    in_norms = [
        p
        for m in net.modules()
        if isinstance(m, fastfilm.ConvNormFiLM2d)
        for p in (m.norm_weight, m.norm_bias)
    ]
    assert {id(p) for p in others} == {id(p) for p in in_norms if p is not None}


def test_a_block_and_its_norm_layer_share_their_attributes() -> None:
    block = fastfilm.ConvNormFiLM3d(2, 4, momentum=0.03, eps=1e-4)
    layer: Any = block.norm_layer
    assert type(layer) is nn.BatchNorm3d and block.running_mean is layer.running_mean
    block.momentum, block.norm_weight = 0.2, nn.Parameter(torch.zeros(4))
    block.running_mean = torch.ones(4)
    assert layer.momentum == 0.2 and layer.weight is block.norm_weight
    assert layer.running_mean is block.running_mean and block.eps == layer.eps == 1e-4
    assert fastfilm.ConvNormFiLM2d(2, 4, norm=None).norm_layer is None


def test_a_block_without_a_norm_takes_momentum_and_no_norms_tensors() -> None:
    block = fastfilm.ConvNormFiLM2d(1, 2, norm=None)
    block.momentum = 0.3
    assert block.norm_weight is None and block.momentum is None
    with pytest.raises(AttributeError, match="running_mean"):
        block.running_mean = torch.zeros(2)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_a_state_dict_with_the_norms_former_names_loads(norm: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm": norm, "num_groups": 2, "track_running_stats": True}
    model, twin = (nn.ModuleDict({"a": fastfilm.ConvNormFiLM2d(2, 4, **options)}) for _ in range(2))
    for tensor in model.state_dict().values():
        tensor.add_(torch.ones_like(tensor))
    former = {}
    for name, value in model.state_dict().items():
        name = name.replace("norm_layer.weight", "norm_weight").replace(
            "norm_layer.bias", "norm_bias"
        )
        former[name.replace("norm_layer.", "")] = value
    assert not any("norm_layer" in name for name in former)
    twin.load_state_dict(former)
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


def test_training_resumes_from_a_state_with_the_norms_former_names(tmp_path: Path) -> None:
    pytest.importorskip("pydantic", reason="the extra [segmentation] is not installed")
    from fastfilm.segmentation.support.files import read_tensors, write_tensors
    from fastfilm.segmentation.training.checkpoint import NAME, Saved, State
    from fastfilm.segmentation.training.optimisation import Average, Progress

    def state(seed: int) -> State:
        torch.manual_seed(seed)
        net = nn.Sequential(fastfilm.ConvNormFiLM2d(3, 4))
        optimizer = torch.optim.AdamW(net.parameters())
        net(image()).square().sum().backward()
        optimizer.step()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return State(net, optimizer, Progress(), Average(net, 0.9), scaler)

    old, new = state(0), state(1)
    old.save(tmp_path, "same")
    tensors, header = read_tensors(tmp_path / NAME)
    former = {}
    for name, value in tensors.items():
        for part in ("weight", "bias"):
            name = name.replace(f"norm_layer.{part}", f"norm_{part}")
        former[name.replace("norm_layer.", "")] = value
    assert len(former) == len(tensors) and not any("norm_layer" in name for name in former)
    write_tensors(tmp_path / NAME, former, header)
    new.restore(Saved.read(tmp_path))
    new.save(tmp_path, "same")
    for name, value in read_tensors(tmp_path / NAME)[0].items():
        assert torch.equal(value, tensors[name])


def test_dropout_and_film_stand_where_they_do_around_another_norm_layer() -> None:
    """A norm layer that is called as a module leaves the rest of the block alone."""
    for order in ("conv-norm-film-act", "conv-norm-act-film", "conv-act-norm-film"):
        for position in ("end", "film", "norm"):
            results = []
            for hooked in (False, True):
                torch.manual_seed(0)
                block = fastfilm.ConvNormFiLM2d(
                    3, 4, order=order, activation="prelu", dropout=0.5, dropout_position=position
                )
                if hooked:
                    block.norm_layer.register_forward_hook(lambda *_: None)
                gamma, beta = torch.randn(2, 4, 4)
                results.append(block(image(), gamma, beta))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_network_of_blocks_converts_and_conditions_beside_layers_of_pytorch() -> None:
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4)
    model = nn.Sequential(block, nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    expected = copy.deepcopy(model)(image())
    made = fastfilm.convert(model, verbose=False)
    torch.testing.assert_close(made(image()), expected, rtol=1e-4, atol=1e-5)
