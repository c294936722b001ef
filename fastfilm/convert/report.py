"""What became of each convolution of a converted model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Convolution:
    """One convolution of a model.

    Attributes:
        name: its path in the model.
        kernel: its size.
        group: the layers that it runs with, such as ("conv", "norm", "act"); empty if it is left alone.
        reason: why it is left alone.
    """

    name: str
    kernel: tuple[int, ...]
    group: tuple[str, ...]
    reason: str = ""

    @property
    def fused(self) -> bool:
        """Whether it runs with other layers as one."""
        return bool(self.group)


@dataclass
class Report:
    """What ``fastfilm.convert`` did with a model.

    Attributes:
        convolutions: all of the model, in its order.
        norms: (path, what became of it) of norms that no convolution stands before.
        untouched: (path, reason) of modules whose forward stays the original's though they hold layers.
    """

    convolutions: list[Convolution] = field(default_factory=list)
    norms: list[tuple[str, str]] = field(default_factory=list)
    untouched: list[tuple[str, str]] = field(default_factory=list)

    @property
    def fused(self) -> list[Convolution]:
        """Convolutions that run with other layers as one."""
        return [c for c in self.convolutions if c.fused]

    @property
    def left(self) -> list[Convolution]:
        """Convolutions that run as before."""
        return [c for c in self.convolutions if not c.fused]

    def share(self, size: int | None = None) -> float:
        """Fused part of the convolutions, 0 to 1; of those with ``size`` in their kernel if given (1 if none)."""
        chosen = [c for c in self.convolutions if size is None or size in c.kernel]
        return sum(c.fused for c in chosen) / len(chosen) if chosen else 1.0

    def summary(self) -> str:
        """Two lines or so for people."""
        large = [c for c in self.convolutions if 3 in c.kernel]
        lines = [
            f"fastfilm: {len(self.fused)} of {len(self.convolutions)} convolutions fused"
            f" ({sum(c.fused for c in large)} of {len(large)} with kernel 3)"
        ]
        for reason, count in Counter(c.reason for c in self.left).most_common():
            names = [c.name for c in self.left if c.reason == reason]
            shown = ", ".join(names[:3]) + (", …" if count > 3 else "")
            lines.append(f"  left {count}: {reason} ({shown})")
        return "\n".join(lines)

    def table(self) -> str:
        """One line a convolution, and what else was left."""
        width = max([len(c.name) for c in self.convolutions], default=4)
        lines = [
            f"{c.name:<{width}}  {'×'.join(map(str, c.kernel)):<7}  "
            + (" + ".join(c.group) if c.fused else f"left: {c.reason}")
            for c in self.convolutions
        ]
        lines += [f"{name}: {what}" for name, what in self.norms]
        lines += [f"{name or 'model'}: its forward stays: {why}" for name, why in self.untouched]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()
