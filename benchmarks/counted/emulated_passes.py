"""Maps that a FiLMed U-Net moves on the CUDA kernels, counted without a GPU.

    TRITON_INTERPRET=1 python -m benchmarks.counted.emulated_passes FOLDER

prints JSON: for forward, backward and inference the passes a convolution and the launches, of FiLMedUNet 2D of
depth 4 with 64 filters, bfloat16, batch 1; FOLDER keeps the build. Which kernels are launched with which maps is
decided as on a GPU (an H100's layouts). Of each kernel one block runs, so the numbers in the maps mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

import fastfilm

from . import emulation, traffic

H100 = (90, 132, 227 * 1024)
DEPTH, FILTERS, SIZE = 4, 64, 64
MODES = ("forward", "backward", "inference")


@contextmanager
def launching(folder: Path) -> Iterator[None]:
    """The backend ``cuda``, its fused route, with kernels that run one block each."""
    library = folder / "_CUDA.so"
    extension = emulation.load(library if library.exists() else emulation.build(folder))
    extension.set_block_limit(1)
    with emulation.serving(extension), fastfilm.backend("cuda", "fused"):
        from fastfilm.ops.launchers.cuda import plans  # the one that has this extension

        try:
            with (
                patch.object(plans, "_device", lambda index: H100),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", RuntimeWarning)  # of numbers that mean nothing
                yield
        finally:
            extension.set_block_limit(0)


def step() -> dict[str, list[traffic.Launch]]:
    """The launches of one training step and one inference call, with the backend in force."""
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(1, 1, depth=DEPTH, base_filters=FILTERS, metadata_size=3)
    image, rows = torch.randn(1, 1, SIZE, SIZE), torch.eye(3)[:1]
    return traffic.of_step(*(t.to(torch.bfloat16) for t in (net, image, rows)))


def convolutions() -> int:
    """How many the network has."""
    return 4 * DEPTH + 3


def counted(folder: Path) -> dict[str, dict[str, float]]:
    """What this module prints, by a process of its own: Triton's kernels have to be interpreted."""
    command = [sys.executable, "-m", "benchmarks.counted.emulated_passes", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=emulation.ROOT
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-1000:])
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(folder: str) -> None:
    """Prints the counts."""
    with launching(Path(folder)):
        launches = step()
    print(
        json.dumps(
            {
                mode: {
                    "passes": sum(k.passes for k in found) / convolutions(),
                    "launches": sum(1 for k in found if k.owner != "aten"),
                }
                for mode, found in launches.items()
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
