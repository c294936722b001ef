"""``torch.func``: what docs/interop.md says of it, for blocks, converted networks and each norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import fastfilm

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "none": nn.Identity,
}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def eager(norm: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), NORMS[norm](), nn.SiLU()).double()


def own(norm: str) -> nn.Module:
    torch.manual_seed(0)
    groups = 2 if norm == "group" else None
    return fastfilm.ConvNormFiLM2d(2, 4, norm=norm, num_groups=groups, activation="silu").double()


def converted(norm: str) -> nn.Module:
    return fastfilm.convert(eager(norm), verbose=False)


def moved(net: nn.Module, steps: int = 3) -> list[nn.Module]:
    """Copies with other parameters and statistics each."""
    nets = [copy.deepcopy(net) for _ in range(steps)]
    for i, other in enumerate(nets):
        for t in (*other.parameters(), *other.buffers()):
            if t.is_floating_point():
                t.data += 0.1 * i
    return nets


def refused(make: Any, norm: str, layout: torch.memory_format) -> bool:
    """PyTorch's group norm takes no channels-last maps in its transforms, which see the model's own layers."""
    return make is converted and norm == "group" and layout == torch.channels_last


def image(layout: torch.memory_format) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [own, converted])
def test_vmap_of_stacked_models_gives_what_each_gives(
    make: Callable[[str], nn.Module], norm: str, training: bool, layout: torch.memory_format
) -> None:
    """One input for all, and one for each; running statistics of each are moved in the stack."""
    if refused(make, norm, layout):
        pytest.skip("PyTorch itself refuses")
    nets = [m.train(training) for m in moved(make(norm))]
    x = image(layout)
    expected = torch.stack([copy.deepcopy(m)(x) for m in nets])
    for each in (False, True):
        parameters, buffers = stack_module_state(nets)

        def call(parameters: Any, buffers: Any, x: Tensor) -> Any:
            return functional_call(nets[0], (parameters, buffers), (x,))

        given = torch.stack([x] * len(nets)) if each else x
        found = vmap(call, in_dims=(0, 0, 0 if each else None))(parameters, buffers, given)
        assert torch.allclose(found, expected, atol=1e-12)
        for i, net in enumerate(nets):
            after = copy.deepcopy(net)
            after(x)
            for name, buffer in after.named_buffers():
                assert torch.allclose(buffers[name][i], buffer, atol=1e-12), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [own, converted])
def test_transforms_give_the_derivatives_of_autograd(
    make: Callable[[str], nn.Module], norm: str, layout: torch.memory_format
) -> None:
    if refused(make, norm, layout):
        pytest.skip("PyTorch itself refuses")
    net, x = make(norm).eval(), image(layout)
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        found: Tensor = functional_call(net, (parameters, buffers), (x,)).square().sum()
        return found

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    for i in range(len(x)):
        net.zero_grad()
        net(x[i : i + 1]).square().sum().backward()
        for name, p in net.named_parameters():
            assert torch.allclose(each[name][i], p.grad, atol=1e-10), name  # type: ignore[arg-type]

    def of_image(x: Tensor) -> Tensor:
        return loss(parameters, x)

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(of_image(leaf), leaf)
    assert torch.allclose(jacrev(of_image)(x), slope, atol=1e-10)
    assert torch.allclose(jacfwd(of_image)(x), slope, atol=1e-10)
    assert torch.allclose(jvp(of_image, (x,), (x,))[1], (slope * x).sum(), atol=1e-9)
    small = x[:1, :, :3, :3].contiguous(memory_format=layout)
    second = torch.autograd.functional.hessian(of_image, small)
    assert torch.allclose(hessian(of_image)(small), second, atol=1e-8)


@pytest.mark.parametrize("make", [eager, own, converted])
def test_statistics_that_a_gradient_would_move_are_refused_as_in_eager(
    make: Callable[[str], nn.Module],
) -> None:
    """They are not among the function's arguments: PyTorch says so."""
    net, x = make("batch").train(), image(torch.contiguous_format)
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(parameters: Any) -> Any:
        return functional_call(net, (parameters, buffers), (x,)).square().sum()

    with pytest.raises(RuntimeError, match="mutate"):
        grad(loss)(parameters)
