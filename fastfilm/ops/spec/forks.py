"""Maps with several consumers: the kernel that computes the last gradient adds it to those that came before.

Autograd adds the gradients of a tensor's consumers with a pass of its own (two maps read, one written). A skip
of a U-Net has two consumers, and the one that was called first gets its gradient last: its kernel can read what
is there and write the sum. Each consumer takes a branch of its own,

    map -> mine, rest        rest -> mine, rest        ...

so autograd sees ordinary functions, and every gradient stays right when only some of them run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _task() -> int:
    """The number of the backward pass that runs."""
    return torch._C._current_graph_task_id()


class Ledger:
    """The gradients that come together in one branching, during one backward pass."""

    def __init__(self, above: Ledger | None) -> None:
        self._above = above
        self._rest: tuple[int, Tensor] | None = None
        self._came = self._added = -1  # passes

    def rest(self) -> Tensor | None:
        """The gradient of the other branches, if it is complete and may be added to in place."""
        return self._rest[1] if self._rest is not None and self._rest[0] == _task() else None

    def came(self, added: bool) -> None:
        """The gradient of ``mine`` was made, in memory of its own; with ``added``, the rest is in it."""
        self._came = _task()
        self._added = self._came if added else -1

    def settled(self, mine: Tensor | None, rest: Tensor | None) -> Tensor | None:
        """The gradient at the map; told to the branching above."""
        self._rest, task = None, _task()
        total = mine
        if mine is None:
            total = rest
        elif rest is not None and self._added != task:
            total = mine + rest
        if self._above is not None and self._came == task and mine is not None:
            self._above._rest = (task, mine) if total is mine else None
        return total


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, ledger: Ledger) -> tuple[Tensor, Tensor]:
        ctx.ledger = ledger
        ctx.set_materialize_grads(False)
        return raw.view_as(raw), raw.view_as(raw)

    @staticmethod
    def backward(ctx: Any, mine: Tensor | None, rest: Tensor | None) -> tuple[Tensor | None, None]:
        if torch.is_grad_enabled():
            both = mine is not None and rest is not None
            return (mine + rest if both else rest if mine is None else mine), None  # type: ignore[operator]
        return ctx.ledger.settled(mine, rest), None


class Fork:
    """A raw map and the branches that its consumers have taken."""

    def __init__(self, raw: Tensor) -> None:
        self._rest = raw
        self._last: Ledger | None = None

    def branch(self) -> tuple[Tensor, Ledger | None]:
        """The map for one more consumer, and its ledger; the map itself where no gradient is asked for."""
        if not (torch.is_grad_enabled() and self._rest.requires_grad):
            return self._rest, None
        ledger = Ledger(self._last)
        mine, self._rest = _Branch.apply(self._rest, ledger)
        self._last = ledger
        return mine, ledger
