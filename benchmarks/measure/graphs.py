"""A call captured in a CUDA graph, so that its time is the device's and not the host's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

WARM_UP = 3
"""Calls in front of the capture: kernels are compiled, and tables and workspaces made, outside of it."""


class CaptureFailed(Exception):
    """A call cannot be captured; its text says why."""


class Captured(NamedTuple):
    """``replay`` runs the captured call; each replay overwrites the tensors of ``result``."""

    replay: Callable[[], None]
    result: Any


def capture(call: Callable[..., object], before: Callable[[], object] | None = None) -> Captured:
    """Warms ``call`` up and captures it once.

    Args:
        before: runs once, on the capture's stream; ``call`` takes its result. Autograd runs a backward pass on the
            stream of its forward pass, so a forward pass that is not captured belongs here.

    Raises:
        CaptureFailed: there is no CUDA device, or the call does what a capture does not allow. Later work on the
            device is not affected.
    """
    if not torch.cuda.is_available():
        raise CaptureFailed("CUDA graphs need a CUDA device")
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.clone_state()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            made = call if before is None else partial(call, before())
            for _ in range(WARM_UP):
                made()
        current.wait_stream(side)
        with torch.cuda.graph(graph, pool=pool, stream=side):
            result = made()
    except Exception as error:
        _clean_up(current, pool, generator, state)
        # the end of a capture that has failed raises an error of its own
        first = error.__context__ or error
        lines = str(first).strip().splitlines()
        raise CaptureFailed(lines[0] if lines else type(first).__name__) from error
    return Captured(partial(_replay, graph, made), result)


def _replay(graph: torch.cuda.CUDAGraph, captured: Callable[[], object]) -> None:
    """Replays ``graph``; ``captured`` holds the tensors whose addresses the graph has."""
    graph.replay()


def _clean_up(stream: Any, pool: Any, generator: Any, state: Any) -> None:
    """Ends what a failed capture leaves behind: PyTorch's context manager stops at the first error of its exit."""
    torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
    # the allocator would go on as during a capture, and random numbers would be refused
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with contextlib.suppress(RuntimeError, AttributeError):
        generator.graphsafe_set_state(state)
