"""The Triton kernels' package for the kernel hub, as .ci/hub.py makes it and the hub's own loader reads it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# runs in the package's folder: where this repository's own folder kernels/ is not found in place of the loader
LOADED = r"""
import re
from pathlib import Path

card = Path("README.md").read_text()
exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])  # the card's example, which leaves film, y and v

from kernels._rust import Digest, Metadata

for variant in Path("build").iterdir():
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))

expected = torch.relu(gamma[..., None, None] * y + beta[..., None, None])
torch.testing.assert_close(v, expected)
mean, variance = film.moments(y, None, "none")
torch.testing.assert_close(mean, y.mean((2, 3)))
torch.testing.assert_close(variance, y.var((2, 3), unbiased=False))
folder = Path(film.__file__).parent
assert folder.parent == Path("build").resolve() and "fastfilm" not in __import__("sys").modules
for name in film.__all__:
    assert name in card and Path(getattr(film, name).__code__.co_filename).parent == folder, name
print(film.__name__)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    done = make(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "build" / f"torch-{b}") for b in ("cuda", "cpu")]
    return folder


def make(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "hub.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_package_holds_every_kernel_file_and_says_what_it_is(package: Path) -> None:
    sources = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
    for backend in ("cuda", "cpu"):
        variant = package / "build" / f"torch-{backend}"
        assert sorted(p.name for p in variant.iterdir()) == sorted([*sources, "metadata.json"])
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["id"].isidentifier() and backend in metadata["id"]
        assert sorted(metadata["digest"]["files"]) == sources
        assert metadata["backend"]["type"] == backend


def test_a_folder_with_something_in_it_is_left_as_it_is(package: Path) -> None:
    before = sorted(package.rglob("*"))
    done = make(package)
    assert done.returncode == 1 and done.stderr == f"hub: {package} is not empty\n"
    assert sorted(package.rglob("*")) == before


def test_the_hubs_loader_loads_it_from_a_folder_and_its_kernels_compute(package: Path) -> None:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the loader (kernels, of the extra test) is not installed")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LOCAL_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=package,
        env=kept | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_fastfilm_kernels_")
