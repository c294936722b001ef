"""Public names come from their rooms on first use: orders of imports, tools that read the package, the help."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import types
from importlib import import_module

import pytest

import fastfilm

HEAVY = ("torch", "numpy", "monai", "typer", "pydantic", "scipy", "nibabel", "fastfilm.ops")


def run(code: str, *arguments: str) -> str:
    """Standard output of a fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["tunee"], ["info", "--help"]], ids=" ".join
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    run(
        "import sys\nfrom fastfilm.__main__ import main\nmain(sys.argv[2:])\n"
        "found = [m for m in sys.argv[1].split(',') if m in sys.modules]\n"
        "assert not found, found",
        ",".join(HEAVY),
        *argv,
    )


def test_importing_the_package_imports_no_torch_and_its_names_do() -> None:
    run(
        "import sys, fastfilm\n"
        "assert 'torch' not in sys.modules and set(fastfilm.__all__) <= set(dir(fastfilm))\n"
        "assert 'torch' not in sys.modules and not hasattr(fastfilm, 'FiLMed')\n"
        "fastfilm.ops.choice, fastfilm.nn.blocks\n"
        "assert 'torch' in sys.modules"
    )


def test_the_table_the_list_and_the_rooms_name_the_same_objects() -> None:
    assert {*fastfilm._ROOMS, "__version__"} == set(fastfilm.__all__) <= set(dir(fastfilm))
    assert {"nn", "ops", "__path__"} <= set(dir(fastfilm))
    for name, room in fastfilm._ROOMS.items():
        there = import_module(f"fastfilm.{room}")
        assert getattr(fastfilm, name) is getattr(there, name)
        assert not isinstance(getattr(fastfilm, name), types.ModuleType)
    star: dict[str, object] = {}
    exec("from fastfilm import *", star)
    assert {k for k in star if k != "__builtins__"} == set(fastfilm.__all__)


ORDERS = [
    "import fastfilm.convert",
    "import fastfilm.convert.condition",
    "from fastfilm.convert.backend import fastfilm as backend",
    "from fastfilm import convert",
    "from fastfilm import *",
    "fastfilm.condition",
]
"""Statements that import ``fastfilm.convert``, which has the name of a public function."""
FORKED = """
import os, sys, types
import fastfilm
import torch  # most of the time; the rooms are imported in the children
assert "fastfilm.ops" not in sys.modules
SHARED = ("convert", "condition", "metadata", "backend", "moments")
for order in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            for statement in order.split(";"):
                exec(statement)
                kept = {name: vars(fastfilm)[name] for name in SHARED if name in vars(fastfilm)}
                assert not any(isinstance(v, types.ModuleType) for v in kept.values()), kept
            assert isinstance(fastfilm.convert, types.FunctionType)
            assert isinstance(sys.modules["fastfilm.convert"], types.ModuleType)
            assert fastfilm.convert is sys.modules["fastfilm.convert"].convert
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_the_function_that_has_the_name_of_its_room_stays_one_in_every_order_of_imports() -> None:
    run(FORKED, *ORDERS, *(";".join(pair) for pair in itertools.permutations(ORDERS, 2)))


def test_a_public_name_can_be_replaced_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fastfilm.convert
    with monkeypatch.context() as patch:
        patch.setattr(fastfilm, "convert", str)
        assert fastfilm.convert is str
    assert fastfilm.convert is kept


def test_functions_and_classes_are_pickled_by_their_names() -> None:
    for name in fastfilm._ROOMS:
        assert pickle.loads(pickle.dumps(getattr(fastfilm, name))) is getattr(fastfilm, name)


def test_the_operators_are_registered_behind_torch_and_with_the_first_name() -> None:
    run("import torch, fastfilm; torch.ops.fastfilm.conv")
    run("import fastfilm, torch; from fastfilm import metadata; torch.ops.fastfilm.conv")


def test_a_compiled_function_may_be_the_first_to_ask_for_a_name() -> None:
    """Its value and its number of graphs are those of a name that was there before."""
    run(
        "import fastfilm, torch\n"
        "def f(x): return fastfilm.conv_norm_film(x, torch.ones(1, 1, 1, 1)) + 1\n"
        "compiled = torch.compile(f, backend='eager', fullgraph=True)\n"
        "assert 'conv_norm_film' not in vars(fastfilm)\n"
        "x = torch.randn(2, 1, 3, 3)\n"
        "for _ in range(2): assert torch.equal(compiled(x), f(x))\n"
        "assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1"
    )
