"""Every code block of the documentation: Python is run, and commands are those that exist."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.tools import cli_page
from tests.support.phantoms import settings, write_bids

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOT_RUN = "<!-- not run:"
"""In front of a block that a test cannot run, with the reason."""

_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^    [^\n]*\n)+", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str, bool]]:
    """Language, text, and whether it is to be run, of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        yield match[2], match[3], not before.startswith(NOT_RUN)


def python_of(page: Path) -> str:
    return "\n".join(t for language, t, run in blocks(page) if language == "python" and run)


def commands_of(page: Path) -> Iterator[str]:
    """Lines of shell blocks, with what is continued on the next line in one piece."""
    text = page.read_text(encoding="utf-8")
    shell = [t for language, t, _ in blocks(page) if language in ("bash", "sh")]
    shell += [m[0] for m in _INDENTED.finditer(_FENCE.sub("", text))]
    for line in "".join(shell).replace("\\\n", " ").splitlines():
        yield line.strip()


PYTHON = [p for p in PAGES[1:] if python_of(p)]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder has a plan in PLAN, as the guides call it."""
    yaml = pytest.importorskip("yaml")
    from fastfilm.__main__ import main

    monkeypatch.chdir(tmp_path)
    config = settings(write_bids(tmp_path / "data"), data={"empty_cases": "allow"})
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["plan", "config.yaml", "PLAN"]) == 0


@pytest.mark.parametrize("page", PYTHON, ids=lambda p: p.stem)
def test_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    code = python_of(page)
    if "monai" in code:
        pytest.importorskip("monai")
    monkeypatch.chdir(tmp_path)
    if "PLAN" in code:
        request.getfixturevalue("plan")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code, page.name, "exec"), names)
    CHECKS.get(page.name, lambda names: None)(names)


def _conditioned(names: dict[str, Any]) -> None:
    assert names["logits"].shape == (2, 2, 32, 32)
    trained = [n for n, p in names["model"].named_parameters() if p.requires_grad]
    assert trained and all(n.startswith("film_generator.") for n in trained)


def _segmented(names: dict[str, Any]) -> None:
    assert names["segmented"].shape == (2, 2, 96, 80)


def _audited(names: dict[str, Any]) -> None:
    assert names["result"]["findings"] and isinstance(names["warnings"], list)


CHECKS = {"condition.md": _conditioned, "recipes.md": _segmented, "audit.md": _audited}


def test_the_pages_with_python_are_found() -> None:
    assert {p.stem for p in PYTHON} >= {"index", "condition", "convert", "recipes", "audit"}


def test_a_block_that_is_not_run_says_why() -> None:
    left_out = [b for p in PAGES for b in blocks(p) if b[0] == "python" and not b[2]]
    assert len(left_out) <= 1
    for page in PAGES:
        for reason in re.findall(rf"{NOT_RUN}(.*)-->", page.read_text(encoding="utf-8")):
            assert len(reason.split()) >= 3


def parts(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, which ``&&``, ``|`` and ``;`` part, without its comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for operator, words in itertools.groupby(lexer, lambda word: set(word) <= set("&|;<>")):
        if not operator:
            yield list(words)


def wrong(line: str) -> str | None:
    """The reason why a ``fastfilm …`` in a line is no command line, by the commands' own arguments."""
    reasons = (_wrong(*words[1:]) for words in parts(line) if words[0] == "fastfilm")
    return next((r for r in reasons if r), None)


def _wrong(name: str = "--help", *rest: str) -> str | None:
    if name.startswith("-"):
        return None
    if name not in cli_page.commands():
        return f"no command {name}"
    options = {n: a for a in cli_page.arguments(name) for n in a.names}
    positional, waiting = 0, False
    for word in rest:
        option = word.split("=")[0]
        if waiting:
            waiting = False
        elif option in options:
            waiting = bool(options[option].value) and "=" not in word
        elif word.startswith("--"):
            if word != "--help":
                return f"fastfilm {name} has no {option}"
        else:
            positional += 1
    known = [a for a in cli_page.arguments(name) if a.positional]
    needed = sum(a.needed for a in known)
    if rest != ("--help",) and not needed <= positional <= len(known):
        return f"fastfilm {name} takes {needed} to {len(known)} arguments, got {positional}"
    return "a value is missing" if waiting else None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_of_a_page_exist(page: Path) -> None:
    pytest.importorskip("typer")
    for line in commands_of(page):
        if "fastfilm " in line:
            reason = wrong(line)
            assert reason is None, f"{line}: {reason}"
        for script in re.findall(r"python ([\w/.-]+\.py)", line):
            if "/" in script:
                assert (ROOT / script).is_file(), line
        for module in re.findall(r"python -m ((?:benchmarks|fastfilm|tests)[\w.]*)", line):
            assert importlib.util.find_spec(module) is not None, line


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("fastfilm plna CONFIG.yaml PLAN", "no command"),
        ("fastfilm train PLAN MODEL --flod 0", "has no --flod"),
        ("fastfilm train PLAN MODEL --fold", "a value is missing"),
        ("fastfilm predict MODEL IN", "takes 3 to 3"),
        ("fastfilm plan A B C", "takes 2 to 2"),
        ("pip install x && fastfilm info && fastfilm chek  # both", "no command chek"),
    ],
)
def test_a_wrong_command_is_found(line: str, reason: str) -> None:
    pytest.importorskip("typer")
    assert reason in str(wrong(line))


def test_commands_are_found_in_both_forms_of_blocks() -> None:
    found = [line for page in PAGES for line in commands_of(page)]
    assert any(line.startswith("fastfilm trial") for line in found)
    assert sum(line.startswith("fastfilm ") for line in found) > 30
