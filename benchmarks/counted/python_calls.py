"""Counts the Python calls of one warm block, and how often they go from one file of fastfilm to another.

    python -m benchmarks.counted.python_calls

Counted are the calls of functions that lie in the package, in the order in which they are entered. The block is
a 3×3 convolution with instance norm, ReLU and FiLM on the CPU's kernels; nothing depends on the machine's speed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import fastfilm

PACKAGE = str(Path(fastfilm.__file__).parent)


class Calls(NamedTuple):
    """Python calls in the package, the files they are in, and the moves from one file to another."""

    calls: int
    files: int
    moves: int


def counted(call: Callable[[], Any], folder: str = PACKAGE) -> tuple[Calls, Any]:
    """What ``call()`` costs in calls of functions that lie in ``folder``, and what it gives."""
    seen: list[str] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            seen.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    moves = sum(a != b for a, b in pairwise(seen))
    return Calls(len(seen), len(set(seen)), moves), result


def of_block() -> dict[str, Calls]:
    """Forward and backward of a block in training, and its forward in inference."""
    block = fastfilm.ConvNormFiLM2d(8, 8, norm="instance", activation="relu")
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    gamma, beta = torch.rand(2, 8, requires_grad=True), torch.rand(2, 8)
    for _ in range(3):
        block(x, gamma, beta).sum().backward()
    forward, y = counted(lambda: block(x, gamma, beta))
    # in this thread: sys.setprofile does not see those that autograd starts, and a CPU's backward runs in none
    backward, _ = counted(lambda: y.sum().backward())
    with torch.no_grad():
        block(x, gamma, beta)
        inference, _ = counted(lambda: block(x, gamma, beta))
    return {"forward": forward, "backward": backward, "inference": inference}


def main() -> None:
    """Prints one line a pass."""
    for name, found in of_block().items():
        print(f"{name:<10} {found.calls:3} calls in {found.files:2} files, {found.moves:2} moves")


if __name__ == "__main__":
    main()
