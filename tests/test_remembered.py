"""What a block keeps between calls without gradients, and when it must not use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.ops import conv, recipe

X = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
GAMMA, BETA = torch.rand(2, 2, 4).unbind()


def block(**options: Any) -> nn.Module:
    made = fastfilm.ConvNormFiLM2d(3, 4, norm="batch", **options).eval()
    with torch.no_grad():
        for t in (made.running_mean, made.running_var, made.norm_weight):
            t.uniform_(0.5, 1.5)
    return made


def truth(made: nn.Module, x: Tensor = X, gamma: Tensor = GAMMA, beta: Tensor = BETA) -> Tensor:
    with fastfilm.backend("reference", "eager"), torch.no_grad():
        found: Tensor = made(x.clone(), gamma.clone(), beta.clone())
    return found


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A note for each call that came the long way."""
    notes: list[str] = []
    whole = conv.finished

    def noted(*args: Any, **options: Any) -> Tensor:
        notes.append("long")
        return whole(*args, **options)

    monkeypatch.setattr(conv, "finished", noted)
    return notes


def test_a_repeated_call_takes_the_short_way_and_gives_the_same(finished: list[str]) -> None:
    made = block()
    with torch.no_grad():
        first = made(X, GAMMA, BETA)
        again = made(X, GAMMA, BETA)
        other = made(2 * X, GAMMA, BETA)
    assert finished == ["long"]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, truth(made), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other, truth(made, 2 * X), rtol=1e-4, atol=1e-5)


def _replaced(made: Any) -> None:
    made.bias = nn.Parameter(torch.rand(4))


def _in_place(name: str) -> Callable[[Any], None]:
    def change(made: Any) -> None:
        with torch.no_grad():
            getattr(made, name).mul_(1.5)

    return change


def _behind_the_back(made: Any) -> None:
    made.norm_weight.data.mul_(1.5)
    made.eval()


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda made: setattr(made, name, value)


def _loaded(made: Any) -> None:
    made.load_state_dict({k: v * 1.5 for k, v in made.state_dict().items()})


CHANGES: dict[str, Callable[[Any], None]] = {
    "a parameter is another": _replaced,
    "the weight in place": _in_place("weight"),
    "the norm's weight in place": _in_place("norm_weight"),
    "statistics in place": _in_place("running_mean"),
    "through data, then eval": _behind_the_back,
    "eps": _set("eps", 0.5),
    "the activation": _set("activation", "silu"),
    "the order": _set("order", "conv-act-norm-film"),
    "the padding": _set("padding", (0, 0)),
    "a state dict": _loaded,
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_used_again_after_a_change(change: str) -> None:
    made = block()
    with torch.no_grad():
        before = made(X, GAMMA, BETA)
        made(X, GAMMA, BETA)
        CHANGES[change](made)
        after = made(X, GAMMA, BETA)
    torch.testing.assert_close(after, truth(made), rtol=1e-4, atol=1e-5)
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3)


def test_other_inputs_are_decided_anew(finished: list[str]) -> None:
    made = block()
    with torch.no_grad():
        made(X, GAMMA, BETA)
        for x, gamma in ((X[:, :, :5], GAMMA), (X, GAMMA + 1), (X[:1], GAMMA[:1])):
            beta = BETA[: len(x)]
            found = made(x, gamma, beta)
            torch.testing.assert_close(found, truth(made, x, gamma, beta), rtol=1e-4, atol=1e-5)
    assert len(finished) == 4


def test_training_gradients_autocast_and_forced_backends_go_the_long_way() -> None:
    made = block()
    with torch.no_grad():
        expected = made(X, GAMMA, BETA)
        with torch.autocast("cpu", torch.bfloat16):
            assert made(X, GAMMA, BETA).dtype == torch.bfloat16
        made(X, GAMMA, BETA)
        with fastfilm.backend("reference", "eager"):
            torch.testing.assert_close(made(X, GAMMA, BETA), expected, rtol=1e-4, atol=1e-5)
        made(X, GAMMA, BETA)
        with pytest.raises(TypeError, match="dtype"):
            made(X.double(), GAMMA, BETA)
    x = X.clone().requires_grad_()
    made(x, GAMMA, BETA).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        torch.testing.assert_close(made(X, GAMMA, BETA), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_used_again_once_recipes_are_forgotten(finished: list[str]) -> None:
    made = block()
    with torch.no_grad():
        made(X, GAMMA, BETA)
        with recipe.unremembered():
            made(X, GAMMA, BETA)
        made(X, GAMMA, BETA)
        recipe.forget()
        made(X, GAMMA, BETA)
    assert len(finished) == 4


def test_a_converted_model_forgets_in_eval_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    made = fastfilm.convert(model, copy=True, verbose=False)
    with torch.no_grad():
        made(X)
        made(X)
        for m in (model, made):
            m[1].weight.data.mul_(1.5)
            m.eval()
        torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-5)
