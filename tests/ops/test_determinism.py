"""The same bits twice, PyTorch's deterministic mode, and samples that do not see each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfilm

from ..support import plans
from ..support.case import Case

PLANS = [("reference", None), *plans.plans()]
every = pytest.mark.parametrize(("backend", "route"), PLANS)
CASES = [
    Case(size=(4, 5), norm="batch", order="conv-act-norm-film", activation="prelu"),
    Case(size=(5, 4, 3), norm="group", stride=2, activation="gelu"),
    Case(size=(9, 8), norm="instance", dropout_position="film", kernel=1),
]


def cases(backend: str) -> list[Case]:
    """What a backend is given: one case in the interpreter."""
    return CASES[:1] if backend == "triton" else CASES


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(backend: str, route: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("one type is enough for the interpreter")
    for case in cases(backend):
        same_bits(case.run(backend, route, dtype), case.run(backend, route, dtype))


@every
def test_deterministic_mode_is_accepted_and_changes_nothing(
    backend: str, route: str, deterministic: None
) -> None:
    for case in cases(backend):
        on = case.run(backend, route, torch.float32)
        torch.use_deterministic_algorithms(False)
        off = case.run(backend, route, torch.float32)
        torch.use_deterministic_algorithms(True)
        same_bits(on, off)


def network(dims: int) -> torch.nn.Module:
    torch.manual_seed(2)
    if dims == 3:
        return fastfilm.Modified3DUNet(1, 1, base_filters=2, metadata_size=2)
    return fastfilm.FiLMedUNet(1, 1, base_filters=4, depth=2, metadata_size=2, dropout=0.3)


def trained(dims: int) -> dict[str, Tensor]:
    """A network's parameters, buffers and output after two steps."""
    net = network(dims)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(4)
    size = (32, 16, 16) if dims == 3 else (12, 13)
    image = torch.randn((2, 1, *size), generator=generator)
    torch.manual_seed(5)
    for _ in range(2):
        optimiser.zero_grad()
        out = net(image, torch.eye(2))
        out.square().mean().backward()
        optimiser.step()
    return {**{k: v.clone() for k, v in net.state_dict().items()}, "output": out.detach()}


@pytest.mark.parametrize("dims", [2, 3])
def test_training_a_network_twice_gives_the_same_bits_in_deterministic_mode(
    dims: int, deterministic: None
) -> None:
    same_bits(trained(dims), trained(dims))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def first_sample(backend: str, route: str | None, x: Tensor, options: dict[str, Any]) -> Any:
    """Output and gradient of the first sample of a batch."""
    x = x.clone().requires_grad_()
    batch = x.shape[0]
    film = draw(4, 5)[:batch], draw(4, 5, seed=1)[:batch]
    running = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    running = running if options["norm"] == "batch" else {}
    with fastfilm.backend(backend, route):
        v = fastfilm.conv_norm_film(
            x,
            draw(5, 3, 3, 3, seed=2),
            padding=1,
            gamma=film[0],
            beta=film[1],
            **running,
            **options,
        )
    assert isinstance(v, Tensor)
    (grad,) = torch.autograd.grad(v[0].square().sum(), x)
    return v[0].detach(), grad[0]


OPTIONS: list[dict[str, Any]] = [
    {"norm": "instance", "order": "conv-act-norm-film", "activation": "silu"},
    {"norm": "group", "num_groups": 5, "activation": "relu"},
    {"norm": "layer", "activation": "gelu"},
    {"norm": "batch", "training": False, "order": "conv-norm-act-film", "activation": "relu"},
    {"norm": None, "activation": "elu"},
]
# the interpreter is slow: a norm is no more than other coefficients to its kernels
alone = pytest.mark.parametrize(
    ("options", "backend", "route"),
    [
        pytest.param(
            options,
            *plan,
            id=f"{options['norm']}-{plan[0]}-{plan[1]}",
        )
        for options in OPTIONS
        for plan in PLANS
        if plan[0] != "triton" or options["norm"] == "instance"
    ],
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@alone
def test_a_sample_does_not_see_the_others(
    options: dict[str, Any], backend: str, route: str | None
) -> None:
    """Whatever the others hold, NaN included."""
    x = draw(3, 3, 6, 5)
    others = x.clone()
    others[1], others[2] = float("nan"), 1e30
    plain = first_sample(backend, route, x, options)
    beside = first_sample(backend, route, others, options)
    assert torch.equal(plain[0], beside[0])
    assert torch.equal(plain[1], beside[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@alone
def test_a_sample_is_the_same_in_a_batch_of_another_size_where_pytorch_s_is(
    options: dict[str, Any], backend: str, route: str | None
) -> None:
    x = draw(4, 3, 6, 5)
    eager = [first_sample("reference", None, x[:n], options) for n in (1, 4)]
    ours = [first_sample(backend, route, x[:n], options) for n in (1, 4)]
    for i, name in enumerate(("output", "gradient")):
        if torch.equal(eager[0][i], eager[1][i]):
            assert torch.equal(ours[0][i], ours[1][i]), name
        torch.testing.assert_close(ours[0][i], ours[1][i], rtol=1e-4, atol=1e-5)


def test_the_comparison_of_bits_sees_one_bit() -> None:
    value = draw(3)
    other = value.clone()
    other[1] = torch.nextafter(value[1], torch.tensor(9.0))
    with pytest.raises(AssertionError, match="output"):
        same_bits({"output": value}, {"output": other})
