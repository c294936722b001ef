"""The report of a conversion: for each convolution of a model, its block or the reason why it has none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .rewrite import Found

NOT_SEEN = "no graph of a call so far holds it"


@dataclass(frozen=True)
class Convolution:
    """One convolution of a model.

    Attributes:
        name: path of its module in the model, or of its weight where no convolution module has it.
        kernel: its size.
        group: the steps that it runs with, such as ("conv", "norm", "act"); empty if it is left alone.
        reason: why it is left alone; with a group, what runs that instead of a block.
        flops: multiplications and additions of its calls in one call of the model; 0: not known.
    """

    name: str
    kernel: tuple[int, ...]
    group: tuple[str, ...] = ()
    reason: str = ""
    flops: int = 0

    @property
    def fused(self) -> bool:
        """Whether it and its neighbours are one group."""
        return bool(self.group)


@dataclass
class Report:
    """The result of ``fastfilm.convert`` for a model, as far as the calls so far have shown it.

    Attributes:
        convolutions: all of the model, in its order.
        graphs: number of graphs that TorchDynamo has made of the model's forward (of all kinds of calls together).
    """

    convolutions: list[Convolution] = field(default_factory=list)
    graphs: int = 0

    @property
    def fused(self) -> list[Convolution]:
        """Convolutions that run with other layers as one."""
        return [c for c in self.convolutions if c.fused]

    @property
    def left(self) -> list[Convolution]:
        """Convolutions that run as before."""
        return [c for c in self.convolutions if not c.fused]

    def share(self, size: int | None = None) -> float:
        """Fused part of the convolutions that were called, 0 to 1 (1 if none).

        Args:
            size: only those with this number in their kernel.
        """
        called = [c for c in self.convolutions if c.reason != NOT_SEEN]
        chosen = [c for c in called if size is None or size in c.kernel]
        return sum(c.fused for c in chosen) / len(chosen) if chosen else 1.0

    def flops_share(self) -> float:
        """Fused part of the convolutions' multiplications and additions, 0 to 1 (1 if there are none)."""
        total = sum(c.flops for c in self.convolutions)
        return sum(c.flops for c in self.fused) / total if total else 1.0

    def summary(self) -> str:
        """One line for people."""
        if not self.graphs:
            return "fastfilm: the model has not been called yet"
        large = [c for c in self.convolutions if 3 in c.kernel]
        line = (
            f"fastfilm: {len(self.fused)} of {len(self.convolutions)} convolutions fused"
            f" ({sum(c.fused for c in large)} of {len(large)} with kernel 3)"
        )
        reasons = Counter(c.reason for c in self.left).most_common()
        return line + "".join(f"; {count} left: {reason}" for reason, count in reasons[:2])

    def table(self) -> str:
        """One line a convolution."""
        width = max([len(c.name) for c in self.convolutions], default=4)
        return "\n".join(
            f"{c.name:<{width}}  {'×'.join(map(str, c.kernel)):<7}  "
            + (" + ".join(c.group) if c.fused else "left")
            + (f": {c.reason}" if c.reason else "")
            for c in self.convolutions
        )

    def __str__(self) -> str:
        return self.summary()


@dataclass
class Calls:
    """Convolutions that the graphs of a model hold, by the names that the model has for them."""

    graphs: int = 0
    seen: dict[str, Convolution] = field(default_factory=dict)

    def add(self, model: nn.Module, inputs: dict[Any, Any], found: Sequence[Found]) -> None:
        """Takes in one graph.

        Args:
            inputs: tensors by the graph's placeholders.
            found: its convolutions.
        """
        self.graphs += 1
        names = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters()}
        flops: Counter[str] = Counter()
        for f in found:
            name = names.get(id(inputs.get(f.weight))) or _path_in(model, f.module)
            flops[name] += f.operations
            before = self.seen.get(name)
            if before is None or len(f.roles) >= len(before.group):
                self.seen[name] = Convolution(name, f.kernel, f.roles, f.reason)
        for name, count in flops.items():
            kept = self.seen[name]
            self.seen[name] = Convolution(name, kept.kernel, kept.group, kept.reason, count)

    def report(self, model: nn.Module) -> Report:
        """The report on ``model``."""
        made, rest = Report(graphs=self.graphs), dict(self.seen)
        for name, module in model.named_modules():
            if isinstance(module, _ConvNd):
                unseen = Convolution(name, tuple(module.kernel_size), (), NOT_SEEN)
                made.convolutions.append(rest.pop(name, unseen))
        made.convolutions += rest.values()
        return made


def _path_in(model: nn.Module, source: str) -> str:
    """The module that TorchDynamo writes as ``source``, such as L['self'].blocks[0].conv."""
    parts = re.findall(r"\.(\w+)|\[['\"]?(\w+)['\"]?\]", source)
    path = ".".join([a or b for a, b in parts if (a or b) != "_modules"][1:])
    if not path:
        return source
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    if path in names:
        return path
    ends = [n for n in names if n.endswith(f".{path}")]
    return ends[0] if len(ends) == 1 else path
