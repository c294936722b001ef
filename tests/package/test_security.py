"""The promises of SECURITY.md: no content of a file is executed, nothing is fetched, OUT alone is written into."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "fastfilm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
NETWORK = {"ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "urllib", "urllib3"}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# the name of this machine in a lock file; the guard that holds the network shut
SOCKETS = {"fastfilm/segmentation/support/lock.py", "fastfilm/segmentation/support/offline.py"}
# default values of PyTorch's functions, from a constant of the file
EVALUATES = {"fastfilm/convert/functions.py"}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in FILES:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """File, function and keyword arguments of each call in the package, as they are written."""
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
                yield name, ast.unparse(node.func), given


def test_the_package_is_read() -> None:
    assert len(FILES) > 200 and sum(f == "torch.load" for _, f, _ in calls()) >= 1


def test_no_module_imports_a_client_of_the_network_or_a_pickle() -> None:
    wrong = []
    for name, tree in trees():
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
        wrong += [f"{name} imports {m}" for m in sorted(found & (NETWORK | PICKLES))]
        if "socket" in found and name not in SOCKETS:
            wrong.append(f"{name} imports socket")
    assert not wrong


def test_nothing_that_is_loaded_is_executed() -> None:
    wrong = []
    for name, function, given in calls():
        last = function.rpartition(".")[2]
        refused = (
            (function == "torch.load" and given.get("weights_only") != "True")
            or given.get("allow_pickle", "False") != "False"
            or (function == "yaml.load" and name != "fastfilm/segmentation/support/yaml_files.py")
            or last in ("unsafe_load", "full_load", "load_state_dict_from_url", "urlopen")
            or function.startswith("torch.hub")
            or (function in ("eval", "exec") and name not in EVALUATES)
            or given.get("shell", "False") != "False"
            or function in ("os.system", "os.popen")
        )
        if refused:
            wrong.append(f"{name}: {function}({given})")
    assert not wrong


_written: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which stays: what Python opens for writing, makes, moves or removes."""
    if _written is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        writes = writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
        paths = [path] if writes else []
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink"):
        paths = [arguments[1] if event == "os.symlink" else arguments[0]]
    elif event in ("os.rename", "os.link"):
        paths = list(arguments[:2])
    else:
        return
    _written.extend(os.path.abspath(os.fsdecode(p)) for p in paths if isinstance(p, str | bytes))


def test_a_command_writes_in_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("monai", reason="needs the extra [segmentation]")
    pytest.importorskip("typer", reason="needs the extra [segmentation]")
    import yaml

    from fastfilm.__main__ import main

    from ..support.phantoms import settings, write_bids

    bids = write_bids(tmp_path / "bids", count=4)
    config = tmp_path / "config.yaml"
    once = {"epochs": 1, "steps_per_epoch": 1}
    config.write_text(yaml.safe_dump(settings(bids, training=once)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "_written", [])
    sys.addaudithook(_note)
    out = tmp_path / "OUT"
    assert main(["plan", str(config), str(out / "plan")]) == 0
    assert main(["train", str(out / "plan"), str(out / "model")]) == 0
    assert main(["predict", str(out / "model"), str(out / "plan"), str(out / "found")]) == 0
    found = list(_written or ())
    monkeypatch.setattr(sys.modules[__name__], "_written", None)
    # compiled modules and kernels lie in the caches of the interpreter and of PyTorch
    caches = ("__pycache__", "torchinductor")
    outside = {p for p in found if not p.startswith(f"{out}{os.sep}")}
    outside = {p for p in outside if not any(cache in p for cache in caches)}
    assert len(found) > 10
    assert outside <= {str(out), os.devnull}
