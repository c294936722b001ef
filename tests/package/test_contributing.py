"""CONTRIBUTING.md names files, functions and tests that are there; what its recipes promise of lists holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^### (.+)\n((?:(?!^##).*\n)+)", TEXT, re.MULTILINE))
EXAMPLES = ("fastfilm/ops/launchers/plain.py", "benchmarks/suites/sizes.py")
"""Files that a reader makes by following a recipe."""


def quoted(text: str) -> list[str]:
    """Words in code style, and those of commands in it."""
    code = re.findall(r"`([^`]+)`", text) + re.findall(r"^    (.+)$", text, re.MULTILINE)
    return [word for c in code for word in c.split()]


def paths(text: str) -> list[str]:
    """Paths of this repository among the words in code style."""
    tops = {p.name for p in ROOT.iterdir()} | {"CODE_OF_CONDUCT.md", "SECURITY.md"}
    words = [w.rstrip(".,;:").removesuffix("/") for w in quoted(text)]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    found = [w for w in words if "/" in w and w.split("/")[0] in tops] + links
    return [p for p in found if p not in EXAMPLES]


def steps(recipe: str) -> list[str]:
    return re.findall(r"^\d\. (?:.+\n?)(?:   .+\n?)*", RECIPES[recipe], re.MULTILINE)


def test_the_recipes_are_found() -> None:
    assert len(RECIPES) >= 5 and all(len(steps(name)) >= 3 for name in RECIPES)


@pytest.mark.parametrize("path", sorted(set(paths(TEXT))))
def test_a_path_that_is_named_exists(path: str) -> None:
    assert any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_what_stands_in_the_files_beside_it(recipe: str) -> None:
    for step in steps(recipe):
        files = [ROOT / p for p in paths(step) if (ROOT / p).is_file()]
        files += [ROOT / "fastfilm/ops/launchers/interface.py"]
        held = "\n".join(p.read_text(encoding="utf-8") for p in files if p.suffix != ".md")
        for code in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", step):
            if code in ("eager", "triton.py", "torch.func", "else", "fastfilm.convert", "plain.py"):
                continue
            assert re.search(rf"\b{code.rpartition('.')[2]}\b", held), f"{code} of: {step}"


def test_every_suite_is_on_the_command_line_and_in_the_docs() -> None:
    named = {*cli.SUITES, *cli.ALONE}
    runnable = set()
    for path in (ROOT / "benchmarks" / "suites").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run"]
        if any([a.arg for a in f.args.args] == ["session"] for f in functions):
            runnable.add(path.stem)
    assert len(runnable) > 5
    assert runnable <= named
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `--suite`"))
    assert named <= set(re.findall(r"`(\w+)`", row))
