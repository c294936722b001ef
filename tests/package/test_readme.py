"""What the README shows and claims, run and checked against the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfilm
from fastfilm.ops import spec
from fastfilm.ops.choice import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(example: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_network_example_trains() -> None:
    example = next(e for e in EXAMPLES if "FiLMedUNet" in e)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names = run(example)
    assert names["logits"].shape == (2, 1, 64, 64)
    gradients = [p.grad for p in names["net"].parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_phantom_example_gives_a_target() -> None:
    names = run(next(e for e in EXAMPLES if "make_phantom" in e))
    assert names["image"].shape == names["mask"].shape == (64, 64, 32)
    assert names["mask"].get_fdata().any()


def test_deferred_example_stays_unwritten_and_is_a_tensor_to_others() -> None:
    names = run(next(e for e in EXAMPLES if "deferred=True" in e))
    assert isinstance(names["pooled"], fastfilm.DeferredMap | torch.Tensor)
    assert names["pooled"].shape == (2, 8, 16, 16)
    assert names["brightness"].shape == () and torch.isfinite(names["brightness"])


def test_existing_model_example_is_conditioned_and_fused() -> None:
    pytest.importorskip("monai")
    names = run(next(e for e in EXAMPLES if "DynUNet" in e))
    assert names["logits"].shape == (2, 2, 16, 16, 16)
    assert fastfilm.conversion_report(names["net"]).share(3) == 1.0


def test_every_example_is_run() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_option_is_listed() -> None:
    for name in (*spec.NORMS, *spec.ACTIVATIONS, *spec.ORDERS, *(f"`{b}`" for b in BACKENDS)):
        assert name in README, name


def test_backend_tables_agree_with_the_registry() -> None:
    for page in (README, (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")):
        for b in BACKENDS.values():
            row = next(line for line in page.splitlines() if line.startswith(f"| `{b.name}` |"))
            types = {str(t).removeprefix("torch.") for t in b.dtypes}
            assert set(re.findall(r"b?float\d\d", row)) == types
            assert ("`fused`" in row or " fused" in row) == (b.fused is not None)


def test_the_two_commands_are_those_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = 'pip install -e ".[test]" && pytest'
    assert f"\n    {command}\n" in README and f"bash -c '{command}'\n" in ci
    assert "python benchmarks/run.py --quick" in README and "benchmarks/run.py --quick" in ci
