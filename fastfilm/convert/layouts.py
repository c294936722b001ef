"""Layouts in a rewritten graph: blocks return channels-last maps; calls that need the old layout get it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from fastfilm.ops import maps

from . import calls, functions
from .effects import Effects, is_context, is_written_by_a_reader, storages, value

_OURS = (calls.draw_channel_mask, maps.unwritten)
_ASKING = frozenset(("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad"))


def restore(
    graph: fx.Graph,
    made: Collection[fx.Node],
    contiguous: Collection[fx.Node],
    effects: Effects,
) -> None:
    """Puts the original layout in front of calls that depend on it, and of what the graph gives.

    Args:
        made: nodes whose tensors are channels-last whatever they were.
        contiguous: calls that want contiguous maps for their speed.
        effects: of the graph before it was rewritten.
    """
    other: set[fx.Node] = set()
    kept: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            continue
        if node in made:
            other.add(node)
            if _is_seen_through(node, effects):
                _put_back(graph, node, node, kept, node.next)
            continue
        touched = [n for n in node.all_input_nodes if n in other]
        if not touched or is_context(node):
            continue
        if node.op == "output" or node in contiguous or not _is_free(node):
            for n in touched:
                _put_back(graph, n, node, kept, node)
            continue
        if isinstance(value(node), (Tensor, list, tuple)):
            other.add(node)


def _is_free(node: fx.Node) -> bool:
    """Whether a call gives the same values for every layout of its maps."""
    target = node.target
    if isinstance(target, (calls.Block, calls.Sum)) or target in _OURS:
        return True
    if target is getattr:
        return node.args[1] in _ASKING
    if functions.idle_dropout(node) is not None:
        return True
    return target in functions.ANY_LAYOUT


def _is_seen_through(node: fx.Node, effects: Effects) -> bool:
    """Whether the original's map is written to while another tensor, in another shape, shows its memory."""
    found = value(node)
    names = set(storages(found))
    if not any(effects.written.get(name) for name in names):
        return False
    for name in names:
        for shown in effects.sharing[name]:
            other = value(shown)
            if isinstance(other, Tensor) and other.shape != found.shape:
                return True
    return False


def _put_back(
    graph: fx.Graph, source: fx.Node, reader: fx.Node, kept: dict[fx.Node, fx.Node], at: fx.Node
) -> None:
    """Lets ``reader`` (all readers, where it is the source itself) see ``source`` in its original layout."""
    found = value(source)
    if not isinstance(found, Tensor) or found.dim() < 3:
        return
    order = _order(found)
    if order is None:
        return
    new = kept.get(source)
    if new is None:
        with graph.inserting_before(at):
            if order == tuple(range(found.dim())):
                new = graph.call_method("contiguous", (source,))
            else:
                new = graph.call_function(calls.in_layout, (source, order))
        new.meta["example_value"] = found
        # after a write, a copy for a later reader may differ from one made now
        if not is_written_by_a_reader(source):
            kept[source] = new
    if reader is source:
        source.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    else:
        reader.replace_input_with(source, new)


def _order(found: Tensor) -> tuple[int, ...] | None:
    """Dimensions from the slowest to the fastest of a dense tensor; None where its memory has gaps or overlaps."""
    if found.is_contiguous():
        return tuple(range(found.dim()))
    for layout in (torch.channels_last, torch.channels_last_3d):
        dims = 4 if layout is torch.channels_last else 5
        if found.dim() == dims and found.is_contiguous(memory_format=layout):
            return (0, *range(2, dims), 1)
    strides: Any = found.stride()
    if not all(isinstance(s, int) for s in strides):
        return None
    order = tuple(sorted(range(found.dim()), key=lambda i: -strides[i]))
    return order if found.permute(order).is_contiguous() else None
