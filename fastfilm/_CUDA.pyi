"""CUDA kernels: addresses, sizes and a stream in; null, alignment and range are checked.

``dtype``: 0 float32, 2 bfloat16, 3 float16. ``act``: as in ``_C``. Maps are dense [n, s, c]; an address of 0
stands for an absent argument. A launch that the runtime refuses raises RuntimeError naming the kernel.
"""

architectures: str
"""Targets that were compiled, as ``FASTFILM_CUDA_ARCHS`` lists them."""

def device() -> tuple[int, int, int]:
    """Compute capability (10 · major + minor), multiprocessors, bytes of shared memory of a block; 0: no GPU."""

def reduction_workspace(dtype: int, n: int, s: int, c: int) -> int:
    """float32 numbers that the three passes with a ``workspace`` need there."""

def apply(
    y: int, coef: int, v: int, dtype: int, act: int, n: int, s: int, c: int, stream: int
) -> None: ...
def apply_backward(
    dv: int,
    y: int,
    coef: int,
    dy: int,
    dcoef: int,
    workspace: int,
    dtype: int,
    act: int,
    n: int,
    s: int,
    c: int,
    stream: int,
) -> None: ...
def moments(
    y: int,
    pre: int,
    stats: int,
    workspace: int,
    dtype: int,
    act: int,
    n: int,
    s: int,
    c: int,
    stream: int,
) -> None: ...
def moments_backward(
    dy: int,
    dstats: int,
    y: int,
    stats: int,
    pre: int,
    e: int,
    dpre: int,
    workspace: int,
    dtype: int,
    act: int,
    n: int,
    s: int,
    c: int,
    stream: int,
) -> None: ...
