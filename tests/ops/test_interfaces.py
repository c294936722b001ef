"""How wide the interfaces of the operators are, and how far a call travels through them."""

from __future__ import annotations

import ast

import pytest

from benchmarks.counted import python_calls
from tests.support.imports import ROOT, modules


def test_few_functions_have_many_parameters() -> None:
    many = []
    for path in modules(ROOT / "fastfilm" / "ops", ROOT / "kernels"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name == "__init__":
                continue
            if any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len([a for a in args if a.arg not in ("self", "cls", "ctx")]) >= 8:
                many.append(f"{path.name}: {node.name}")
    assert len(many) <= 25, many


def test_one_block_takes_few_python_calls() -> None:
    pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")
    found = python_calls.of_block()
    assert found["forward"].calls <= 50 and found["forward"].moves <= 20, found
    assert found["inference"].calls <= 50 and found["inference"].moves <= 20, found
