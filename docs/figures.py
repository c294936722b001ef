"""Draws the figure of the README from counts taken here: python docs/figures.py

Each block runs under a dispatch mode that sees every operator. An operator reads each operand of
the size of the feature map once and writes each such result once; batch norm in training reads its
input twice, for the statistics and for the normalisation. Numbers of size [N, C] and weights count
nothing. The count is of the operators' operands: caches are not modelled and nothing is timed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # the fused route, on a machine without a GPU

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastfilm

OUT = Path(__file__).parent / "img" / "passes.png"
N, C, SIZE = 2, 16, 16
INK, MUTED, EAGER, FUSED = "#222222", "#777777", "#e8e8e8", "#cfe3f5"
# operators that move no data, or move it only to arrange the inputs of this script
FREE = ("view", "expand", "reshape", "unsqueeze", "empty", "detach", "select", "clone", "alias")


@dataclass
class Step:
    """One operator: its name, and how many feature maps it reads and writes."""

    name: str
    reads: int
    writes: int


class Count(TorchDispatchMode):
    """Collects the operators that touch a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not name.startswith(FREE):
            reads, writes = maps((args, kwargs)), maps(result)
            if "batch_norm" in name:
                reads *= 2
            if reads + writes:
                self.steps.append(Step(name, reads, writes))
        return result


def maps(tree: Any) -> int:
    """Tensors of the size of the feature map among the leaves of ``tree``."""
    return sum(isinstance(t, Tensor) and t.numel() == N * C * SIZE**2 for t in tree_leaves(tree))


def count() -> tuple[list[Step], list[Step]]:
    """Operators of one block, eager and fused: conv, ReLU, batch norm (training), FiLM."""
    torch.manual_seed(0)
    x = torch.randn(N, C, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(C, C, 3, 3) / 12
    gamma, beta = torch.rand(N, C), torch.rand(N, C)
    with torch.no_grad(), Count() as eager:
        y = F.conv2d(x, weight, padding=1)
        y = F.batch_norm(torch.relu(y), None, None, training=True)
        y = gamma[:, :, None, None] * y + beta[:, :, None, None]
    with torch.no_grad(), fastfilm.backend("triton", "fused"), Count() as fused:
        pending = fastfilm.conv_norm_film(
            x,
            weight,
            padding=1,
            norm="batch",
            training=True,
            activation="relu",
            gamma=gamma,
            beta=beta,
            order="conv-act-norm-film",
            deferred=True,
        )
    assert isinstance(pending, fastfilm.DeferredMap)
    torch.testing.assert_close(pending.materialise(), y, rtol=1e-3, atol=1e-3)
    return eager.steps, fused.steps


def draw(eager: list[Step], fused: list[Step]) -> None:
    """Two rows of boxes, one an operator, with what each reads and writes underneath."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "convolution": "convolution",
        "relu": "ReLU",
        "mul": "× γ",
        "add": "+ β",
        "conv": "load and apply the previous block's a, b, g, s\nconvolution · moments · store",
    }
    figure, axes = plt.subplots(figsize=(9, 3.3))
    width, gap, height = 1.5, 0.35, 0.62
    for top, steps, colour, title in (
        (1.65, eager, EAGER, "eager PyTorch"),
        (0.0, fused, FUSED, "fastfilm, fused route"),
    ):
        total = sum(s.reads + s.writes for s in steps)
        axes.text(
            0,
            top + height + 0.12,
            f"{title}: {len(steps)} operator{'s' * (len(steps) > 1)}, "
            f"{total} feature maps through memory",
            color=INK,
            fontsize=11,
            fontweight="bold",
        )
        span = width if len(steps) > 1 else 5 * width + 4 * gap
        for i, step in enumerate(steps):
            x = i * (width + gap)
            axes.add_patch(plt.Rectangle((x, top), span, height, facecolor=colour, edgecolor=INK))
            label = "batch norm" if "batch_norm" in step.name else labels.get(step.name, step.name)
            axes.text(x + span / 2, top + height / 2, label, ha="center", va="center", color=INK)
            text = f"reads {step.reads}, writes {step.writes}"
            axes.text(x + span / 2, top - 0.1, text, ha="center", va="top", color=MUTED, fontsize=9)
            if i:
                axes.annotate(
                    "",
                    (x, top + height / 2),
                    (x - gap, top + height / 2),
                    arrowprops={"arrowstyle": "->", "color": INK},
                )
    axes.text(
        0,
        -0.62,
        "One block, forward, in training. Counted from the operators' operands, not timed. "
        "The [N, C] numbers a, b, g, s are left out.",
        color=MUTED,
        fontsize=8.5,
    )
    axes.set_xlim(-0.1, 5 * width + 4 * gap + 0.1)
    axes.set_ylim(-0.75, 2.65)
    axes.axis("off")
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(*count())
    print(OUT)
