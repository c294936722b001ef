"""Makes the package of the Triton kernels for Hugging Face's kernel hub: python .ci/hub.py FOLDER

The package holds sources alone (noarch), so it is made from kernels/ in a second and nothing of it is committed.
FOLDER/build has the same modules twice, torch-cuda and torch-cpu (Triton's interpreter, TRITON_INTERPRET=1), each
with a metadata.json: backend, a name that no other content has, and the files' hashes. A program loads the package
by ``kernels.get_local_kernel(FOLDER)``, or by ``kernels.get_kernel`` once FOLDER has been uploaded.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "fastfilm-kernels"
BACKENDS: dict[str, dict[str, object]] = {
    "cuda": {"type": "cuda", "archs": ["8.0+PTX"]},  # sm_80 and all later ones
    "cpu": {"type": "cpu"},
}
CARD = f"""---
library_name: kernels
license: mit
tags:
- kernels
---

# {NAME}

Triton kernels for segmentation networks conditioned on metadata (FiLM): a convolution, its normalisation,
activation, channel dropout and FiLM as one pass over the feature map, with gradients. Feature maps are
channels-last, [N, C, *S] with two or three spatial axes, float16, bfloat16 or float32. A GPU from sm_80 on is
needed; on a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), slowly.

```python
from pathlib import Path

import kernels
import torch

film = kernels.get_local_kernel(Path("."))  # the folder that holds build/
device = "cuda" if torch.cuda.is_available() else "cpu"
y = torch.randn(2, 8, 16, 16, device=device).to(memory_format=torch.channels_last)
gamma, beta = torch.randn(2, 2, 8, device=device)  # a scale and a shift per sample and channel
coefficients = torch.zeros(7, 2, 8, device=device)  # rows a, b, g, s, p, q, slope, each [N, C]
coefficients[0], coefficients[1], coefficients[2] = gamma, beta, 1.0
v = film.apply(y, coefficients, "relu")  # g * (act(a * (y - p) + b) - q) + s
```

The docstrings say what each function takes: {{functions}}. The library fastfilm builds blocks, networks and
training on these kernels.
"""


def make(folder: Path) -> list[Path]:
    """Writes the package; returns the folders of its variants.

    Raises:
        FileExistsError: ``folder`` has something in it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    sources = {path.name: path.read_bytes() for path in sorted((ROOT / "kernels").glob("*.py"))}
    digest = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:12]
    variants = []
    for backend, described in BACKENDS.items():
        variant = folder / "build" / f"torch-{backend}"
        variant.mkdir(parents=True)
        hashes = {}
        for name, content in sources.items():
            (variant / name).write_bytes(content)
            hashes[name] = base64.b64encode(hashlib.sha256(content).digest()).decode()
        metadata = {
            "id": f"_{NAME.replace('-', '_')}_{backend}_{digest}",
            "name": NAME,
            "version": int(version().partition(".")[0]),
            "license": "MIT",
            "python-depends": [],
            "backend": described,
            "digest": {"algorithm": "sha256", "files": hashes},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    functions = re.findall(r'^    "(\w+)",$', sources["__init__.py"].decode(), re.MULTILINE)
    names = ", ".join(f"`{name}`" for name in functions)
    (folder / "README.md").write_text(CARD.replace("{functions}", names))
    (folder / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    return variants


def version() -> str:
    """``__version__`` of fastfilm."""
    text = (ROOT / "fastfilm" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    return str(found)


def main() -> int:
    """The command: 0, or 1 with the reason."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the package goes: new, or empty")
    try:
        variants = make(parser.parse_args().folder)
    except FileExistsError as error:
        print(f"hub: {error}", file=sys.stderr)
        return 1
    for variant in variants:
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
