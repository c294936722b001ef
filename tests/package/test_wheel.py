"""The wheel, built from the source distribution and run from a folder of its own, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11")
pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output of a Python program that must succeed, without the checkout on its path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTFILM_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    egg = ("egg_info", "--egg-base", str(folder))  # leaves nothing in the checkout
    run("setup.py", "-q", *egg, "sdist", "--dist-dir", str(folder), cwd=ROOT)
    (source,) = folder.glob("fastfilm-*.tar.gz")
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder))
    run(*pip, str(source), cwd=folder, FASTFILM_CPU="1", FASTFILM_CUDA="0")
    (found,) = folder.glob("fastfilm-*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastfilm").rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    sources |= {f"fastfilm/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    sources |= {
        str(path.relative_to(ROOT))
        for room in ("ops/settings/tuned", "tuning")
        for path in (ROOT / "fastfilm" / room).glob("*.json")
    }
    info = {name for name in names if ".dist-info/" in name}
    made = {name for name in names - info - sources if "/launchers/" in name}
    assert names - info - made == sources
    assert sorted(Path(name).name.partition(".")[0] for name in made) == ["_C", "build"]


def test_commands_of_an_installed_wheel_run_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    run(*pip, cwd=tmp_path)
    code = "import fastfilm; print(fastfilm.__file__)"
    at = {"PYTHONPATH": str(site)}
    assert run("-c", code, cwd=tmp_path, **at).startswith(str(site))
    told = run("-m", "fastfilm", "info", cwd=tmp_path, **at)
    rows = dict(line.split(maxsplit=1) for line in told.splitlines() if line.startswith("  cpu"))
    assert rows == {"cpu": "available"}
    assert "not built: FASTFILM_CUDA=0" in told and "11 files compiled" in told
    checked = run("-m", "fastfilm", "check", "--quick", cwd=tmp_path, **at)
    assert "cpu" in checked
