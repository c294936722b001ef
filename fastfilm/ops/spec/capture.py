"""CUDA graphs: whether one is being captured, and the memory that must stay for its replays.

A captured launch holds raw addresses, so the memory behind them must outlive the graph. And nothing runs during a
capture: a tensor that is made there has no values before the first replay, and is not to be kept for later calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

_held: dict[int, Tensor] = {}


def capturing() -> bool:
    """Whether the launches of this thread go into a CUDA graph; False without a CUDA context or in a compiler."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def hold(*tensors: Tensor) -> None:
    """Keeps tensors that a captured launch reads until the process ends; each once, and small ones only."""
    _held.update((id(t), t) for t in tensors)


def number(count: Tensor) -> float:
    """The value of a batch norm's counter, read on the host; RuntimeError where a capture forbids that."""
    if capturing():
        raise refusal("momentum=None reads the number of batches", "give momentum a number")
    return float(count)


def refusal(what: str, instead: str = "call it once before (warm up)") -> RuntimeError:
    """The error for work that a capture does not allow.

    Args:
        what: the work, as the subject of a sentence.
        instead: the way out.
    """
    return RuntimeError(f"{what} inside the capture of a CUDA graph: {instead}")
