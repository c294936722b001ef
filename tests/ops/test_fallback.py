"""A Triton kernel that fails at run time: who takes over, who is told, and what is never swallowed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfilm
from fastfilm.ops import choice
from fastfilm.ops.block import recipe
from fastfilm.ops.choice import choosing
from fastfilm.ops.launchers import triton as fallback
from fastfilm.ops.settings import environment

pytest.importorskip("triton", reason="the package triton is not installed")
kernels = pytest.importorskip("fastfilm.kernels")

LAUNCHERS = (
    "apply",
    "apply_backward",
    "moments",
    "moments_backward",
    "block_coefficients",
    "block_coefficients_backward",
)
CONVOLUTIONS = ("fprop", "dgrad", "wgrad")


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton is the automatic choice; nothing has failed before or stays remembered."""
    if torch.cuda.is_available():
        pytest.skip("these calls run in Triton's interpreter")

    def clear() -> None:
        choice.forget()
        recipe.forget()
        fallback.failures.clear()

    clear()
    monkeypatch.setattr(choosing, "automatic", lambda device: "triton")
    yield
    clear()


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300000, 232448, "shared memory")


def compilation_error() -> Exception:
    from triton.compiler.errors import CompilationError

    return CompilationError("x = 1", None, "no such instruction on this architecture")


FAILURES: dict[str, Callable[[], Exception]] = {
    "driver": lambda: RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    "resources": out_of_resources,
    "compiler": compilation_error,
    "no compiler": lambda: FileNotFoundError("ptxas"),
}


def fail(monkeypatch: pytest.MonkeyPatch, names: Any, error: Callable[[], Exception]) -> list[str]:
    """Makes launchers fail; the list of their calls."""
    calls: list[str] = []

    def broken(name: str) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            calls.append(name)
            raise error()

        return launch

    for name in names:
        monkeypatch.setattr(kernels, name, broken(name))
    return calls


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def run(order: str = "conv-act-norm-film") -> list[Tensor]:
    """Output, gradients and running statistics of two blocks in a row."""
    x, first, second = draw(2, 3, 6, 5), draw(4, 3, 3, 3), draw(5, 4, 3, 3)
    gamma, bias = draw(2, 4), draw(4)
    leaves = [t.requires_grad_() for t in (x, first, second, gamma, bias)]
    options: dict[str, Any] = {"padding": 1, "norm": "batch", "training": True}
    options |= {"activation": "silu", "order": order}
    running = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    hidden = fastfilm.conv_norm_film(
        x, first, bias, gamma=gamma, deferred=True, **running, **options
    )
    v = fastfilm.conv_norm_film(hidden, second, **options)
    assert isinstance(v, Tensor)
    return [v, *torch.autograd.grad(v.square().sum(), leaves), *running.values()]


def expected(order: str = "conv-act-norm-film") -> list[Tensor]:
    with fastfilm.backend("reference"):
        return run(order)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def routed(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    """The automatic route is ``route``."""
    monkeypatch.setattr(choosing, "UNMEASURED", route)
    choice.forget()


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_kernel_falls_back_once_and_is_remembered(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed(monkeypatch, "composed")
    calls = fail(monkeypatch, ["apply"], FAILURES[kind])
    x, coef = draw(2, 3, 4, 4), draw(7, 2, 3)
    with pytest.warns(RuntimeWarning, match="PyTorch does its work from now on") as told:
        first = fastfilm.materialise(x, coef, "silu")
    assert len(told) == 1 and len(calls) == 1
    text = str(told[0].message)
    assert type(FAILURES[kind]()).__name__ in text and "apply" in text and "silu" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = fastfilm.materialise(draw(5, 3, 9, 9), draw(7, 5, 3), "silu")
    assert len(calls) == 1 and len(fallback.failures) == 1
    with fastfilm.backend("reference"):
        torch.testing.assert_close(first, fastfilm.materialise(x, coef, "silu"))
        again = fastfilm.materialise(draw(5, 3, 9, 9), draw(7, 5, 3), "silu")
    torch.testing.assert_close(second, again)


def test_another_form_of_call_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail(monkeypatch, ["moments"], FAILURES["driver"])
    for channels in (3, 4, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fastfilm.moments(draw(2, channels, 4, 4))
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:fastfilm")
@pytest.mark.parametrize("route", ["fused", "composed"])
@pytest.mark.parametrize("order", ["conv-act-norm-film", "conv-norm-film-act"])
def test_every_launcher_has_a_way_out_with_the_right_numbers(
    order: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed(monkeypatch, route)
    calls = fail(monkeypatch, LAUNCHERS + CONVOLUTIONS, FAILURES["resources"])
    assert_same(run(order), expected(order))
    used = set(LAUNCHERS) if route == "composed" else {"fprop", "dgrad", "wgrad", *LAUNCHERS}
    assert used <= set(calls)


@pytest.mark.filterwarnings("ignore:fastfilm")
@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
def test_one_failing_convolution_leaves_the_others_to_the_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed(monkeypatch, "fused")
    calls = fail(monkeypatch, [name], FAILURES["compiler"])
    assert_same(run(), expected())
    assert calls and all(key[0] == name for key in fallback.failures)


@pytest.mark.filterwarnings("ignore:fastfilm")
def test_a_finished_block_and_an_overwritten_map_have_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routed(monkeypatch, "fused")
    calls = fail(monkeypatch, ("fprop", "apply"), FAILURES["resources"])
    block = fastfilm.ConvNormFiLM2d(3, 4).eval()
    x, gamma = draw(2, 3, 6, 5), draw(2, 4)
    with torch.no_grad():
        ours = block(x, gamma)
        with fastfilm.backend("reference"):
            theirs = block(x, gamma)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert set(calls) == {"fprop", "apply"}


@pytest.mark.filterwarnings("ignore:fastfilm")
def test_a_residual_addition_has_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("residual", "residual_backward")
    calls = fail(monkeypatch, names, FAILURES["resources"])

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        block = fastfilm.ConvNormFiLM2d(3, 3, norm="instance", activation=None)
        x = draw(2, 3, 6, 5).requires_grad_()
        v = torch.nn.functional.leaky_relu(block(x, deferred=True) + x, 0.2)
        v.square().sum().backward()
        assert x.grad is not None
        return [v, x.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]

    ours = run()
    assert set(calls) == set(names)
    with fastfilm.backend("reference"):
        assert_same(ours, run())


NEVER: dict[str, Callable[[], BaseException]] = {
    "device memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "host memory": lambda: MemoryError(),
    "type": lambda: TypeError("coef"),
    "value": lambda: ValueError("coef"),
    "unsupported": lambda: NotImplementedError("coef"),
    "bug": lambda: AttributeError("coef"),
    "interrupt": lambda: KeyboardInterrupt(),
}


@pytest.mark.parametrize("kind", NEVER)
def test_memory_arguments_and_bugs_are_never_swallowed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: Any = NEVER[kind]
    fail(monkeypatch, ["apply"], error)
    with pytest.raises(type(error())):
        fastfilm.materialise(draw(2, 3, 4, 4), draw(7, 2, 3), "silu")
    assert not fallback.failures


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "STRICT", True)
    fail(monkeypatch, ["apply"], FAILURES["driver"])
    with pytest.raises(RuntimeError, match="kernel image is invalid"):
        fastfilm.materialise(draw(2, 3, 4, 4), draw(7, 2, 3), "silu")
    assert not fallback.failures


@pytest.mark.parametrize("force", [("triton", None), (None, "fused")])
def test_a_forced_backend_or_route_raises(force: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, ["fprop", "apply"], FAILURES["resources"])
    routed(monkeypatch, "fused")
    from triton.runtime.errors import OutOfResources

    with fastfilm.backend(*force), pytest.raises(OutOfResources):
        run()
    assert not fallback.failures


def test_a_bad_argument_never_reaches_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail(monkeypatch, LAUNCHERS + CONVOLUTIONS, FAILURES["driver"])
    with pytest.raises(ValueError, match="x must have 3 channels"):
        fastfilm.conv_norm_film(draw(2, 4, 6, 5), draw(4, 3, 3, 3))
    assert not calls and not fallback.failures


def test_launchers_without_a_guard_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fallback.apply is not kernels.apply
    assert not hasattr(fallback, "no_such_launcher")
    monkeypatch.setattr(kernels, "covers_block", lambda kind: kind)
    assert fallback.covers_block("a kind") == "a kind"  # type: ignore[arg-type,comparison-overlap]


@pytest.mark.parametrize("name", [v.name for v in environment.VARIABLES if v.values is not None])
def test_a_bad_value_of_a_variable_is_an_error_that_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "nonsense")
    with pytest.raises(ValueError, match=f"{name} must be .*, got 'nonsense'"):
        environment.check()
    monkeypatch.setenv(name, "")
    environment.check()


@pytest.mark.parametrize("code", ["import torch, fastfilm", "from fastfilm import FiLM"])
def test_variables_are_checked_when_the_operators_are_imported(code: str) -> None:
    bad = subprocess.run(
        [sys.executable, "-c", code],
        env={"FASTFILM_STRICT": "yes", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert bad.returncode != 0
    assert "ValueError: FASTFILM_STRICT must be one of 0, 1, got 'yes'" in bad.stderr


def test_the_page_on_variables_describes_each_of_them() -> None:
    page = Path(__file__).parents[2] / "docs/environment.md"
    rows = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [r.strip(" `") for r in rows] == [v.name for v in environment.VARIABLES]


def test_variables_name_what_the_registry_has() -> None:
    values = {v.name: v.values for v in environment.VARIABLES}
    assert values["FASTFILM_BACKEND"] == tuple(choice.BACKENDS)
    assert values["FASTFILM_ROUTE"] == choice.ROUTES


def test_views_of_maps_fall_back_to_pytorchs_indexing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose pooling, upsampling and concatenation kernels fail is the reference's network."""
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=3, metadata_size=2, norm="instance")
    x, rows = torch.randn(1, 1, 6, 5), torch.eye(2)[:1]
    failed: list[str] = []

    def broken(name: str) -> Callable[..., Any]:
        def launcher(*args: Any) -> Any:
            failed.append(name)
            raise out_of_resources()

        return launcher

    results = []
    for how in ("broken", "reference"):
        net.zero_grad()
        with monkeypatch.context() as patch:
            if how == "broken":
                for name in ("gather_taps", "gather_taps_backward"):
                    patch.setattr(kernels, name, broken(name))
                context: Any = pytest.warns(RuntimeWarning, match="PyTorch does its work")
            else:
                context = fastfilm.backend("reference")
            with context:
                out = net(x, rows)
                out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    assert {"gather_taps", "gather_taps_backward"} == set(failed)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
