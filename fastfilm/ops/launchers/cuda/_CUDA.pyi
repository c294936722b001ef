"""Types of the CUDA extension: its kernels take addresses, sizes and a stream, and check them before a launch.

``dtype``: 0 float32, 2 bfloat16, 3 float16. ``act``: as in ``_C``. Maps are dense [n, s, c]; an address of 0
stands for an absent argument. A launch that the runtime refuses raises RuntimeError naming the kernel.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

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

class Facts(TypedDict, total=False):
    """How a kernel is laid out: ``tile`` in voxels, ``channels`` of the result and of the input at a time,
    ``blocks`` that a multiprocessor holds, ``groups`` of blocks that share out the tiles of a sample (of the whole
    batch, for the weight's gradient).

    Not for the weight's gradient (where ``channels`` are the output's and the input's): ``resident``, whether
    all weights stay in shared memory; ``part``, the taps whose weights come at a time; and ``bytes_an_output``,
    between L2 and the multiprocessors.
    """

    tile: tuple[int, int, int]
    channels: tuple[int, int]
    shared_bytes: int
    blocks: int
    tiles_a_block: int
    groups: int
    resident: bool
    part: int
    bytes_an_output: float

class Block:
    """A block behind its convolution; the numbers of ``norm``, ``order`` and ``position`` are those of ``_C``."""

    def __init__(
        self,
        norm: int,
        order: int,
        position: int,
        use_input: bool,
        update: bool,
        eps: float,
        unbiased: float,
        slope: float,
    ) -> None: ...

class Convolution:
    """One shape: [n, ci, *in_size] to [n, co, *out_size], sizes as (d, h, w) with d = 1 in 2D.

    ``device`` is what ``device()`` returns. A source is (address, its coefficients' or 0, channels, act). A
    gradient is (dy, y, stats, dstats, pre, scale, pre_act); an output is (x, coef, channels, act, dx, dcoef,
    add). ``strides`` are the weight's, in elements, over [co, ci, kd, kh, kw]. Workspaces are counted in bytes.
    ``tf32``: products of float32 are rounded, on tensor cores. ``wgmma``: whether a GPU of sm_90 gets the kernels
    of warpgroups, "where faster", "always" or "never". A shape that has no layout on the device raises
    RuntimeError when it is first used.
    """

    def __init__(
        self,
        dtype: int,
        dims: int,
        n: int,
        ci: int,
        co: int,
        in_size: tuple[int, int, int],
        out_size: tuple[int, int, int],
        kernel: tuple[int, int, int],
        padding: tuple[int, int, int],
        stride: int,
        device: tuple[int, int, int],
        tf32: bool = False,
        wgmma: str = "where faster",
    ) -> None: ...
    def check(self) -> None:
        """RuntimeError if one of the three kernels has no layout on the device."""

    def forward_workspace(self) -> int: ...
    def gradients_workspace(self, at_input: bool, at_weight: bool) -> int: ...
    def forward(
        self,
        sources: Sequence[Sequence[int]],
        weight: int,
        strides: Sequence[int],
        bias: int,
        pre: int,
        pre_act: int,
        out_coef: int,
        out_act: int,
        y: int,
        raw: int,
        stats: int,
        block: Block | None,
        tensors: Sequence[Sequence[int]],
        momentum: float,
        coef: int,
        workspace: int,
        stream: int,
    ) -> None:
        """With a block also its coefficients [7, n, co].

        ``tensors``: (address, dtype, step, pitch) of running mean and variance, norm weight and bias, bias, γ, β,
        mask and slope; ``step`` numbers from channel to channel, ``pitch`` from sample to sample.
        """

    def gradients(
        self,
        gradient: Sequence[int],
        weight: int,
        strides: Sequence[int],
        outputs: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]],
        dweight: int,
        dstrides: Sequence[int],
        dpre: int,
        workspace: int,
        stream: int,
    ) -> None:
        """At the sources, if there are outputs, and at the weight, if there are sources; only these are read."""

    def facts(self, kernel: Literal["forward", "backward", "weight"]) -> Facts: ...
