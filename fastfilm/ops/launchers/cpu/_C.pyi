"""Types of the C++ extension: its kernels take addresses and sizes, and check them for null, alignment and range.

``dtype``: 0 float32, 1 float64, 2 bfloat16, 3 float16. ``act``: 0 none, 1 relu, 2 leaky_relu and
prelu, 3 elu, 4 silu, 5 gelu, 6 gelu_tanh. Maps are dense [n, s, c]; an address of 0 stands for an
absent argument.
"""

from collections.abc import Sequence

def apply(
    y: int, coef: int, v: int, dtype: int, act: int, n: int, s: int, c: int, threads: int
) -> None: ...
def apply_backward(
    dv: int,
    y: int,
    coef: int,
    dy: int,
    dcoef: int,
    dtype: int,
    act: int,
    n: int,
    s: int,
    c: int,
    threads: int,
) -> None: ...
def moments(
    y: int, pre: int, stats: int, dtype: int, act: int, n: int, s: int, c: int, threads: int
) -> None: ...
def moments_backward(
    dy: int,
    dstats: int,
    y: int,
    stats: int,
    pre: int,
    e: int,
    dpre: int,
    dtype: int,
    act: int,
    n: int,
    s: int,
    c: int,
    threads: int,
) -> None: ...
def residual(
    y: int,
    coef: int,
    y2: int,
    coef2: int,
    slope: int,
    inside: bool,
    v: int,
    dtype: int,
    act: int,
    n: int,
    s: int,
    c: int,
    threads: int,
) -> None: ...
def residual_backward(
    dv: int,
    y: int,
    coef: int,
    y2: int,
    coef2: int,
    slope: int,
    inside: bool,
    dy: int,
    dcoef: int,
    dy2: int,
    dcoef2: int,
    dslope: int,
    dtype: int,
    act: int,
    n: int,
    s: int,
    c: int,
    threads: int,
) -> None: ...
def gather(
    y: int,
    in_stride: int,
    coef: int,
    out: int,
    out_stride: int,
    dtype: int,
    act: int,
    n: int,
    c: int,
    threads: int,
    maximum: bool,
    axes: Sequence[int],
) -> None: ...
def maximum_backward(
    y: int,
    coef: int,
    dout: int,
    dout_stride: int,
    dv: int,
    dtype: int,
    act: int,
    n: int,
    c: int,
    threads: int,
    axes: Sequence[int],
) -> None: ...
def same_bytes(a: int, b: int, count: int) -> bool:
    """Whether ``count`` bytes are equal."""

class Convolution:
    """A convolution of one form at stride 1, not float64; ``coef`` finishes its map.

    ``sizes``: [N, Ci, Co], then three of each: map, kernel, zeros in front, result. ``strides``: of the kernel
    [Co, Ci, KD, KH, KW]; negative where the kernel is mirrored, ``weight`` is then its last element.
    """

    def __init__(self, dtype: int, sizes: Sequence[int], strides: Sequence[int]) -> None: ...
    def run(
        self, x: int, weight: int, bias: int, coef: int, y: int, act: int, threads: int
    ) -> None: ...
    def run_winograd(
        self,
        x: int,
        weight: int,
        bias: int,
        coef: int,
        y: int,
        act: int,
        threads: int,
        transformed: int = 0,
    ) -> None:
        """``run`` by Winograd's F(2x2, 3x3): float32, 3 x 3 positions along the last two axes.

        ``transformed``: what ``transform`` wrote; ``weight`` is not read then.
        """

    @property
    def transformed(self) -> int:
        """Floats that ``transform`` writes."""

    def transform(self, weight: int, to: int, threads: int) -> None: ...
    def kernel_gradient(self, x: int, e: int, dkernel: int, threads: int) -> None: ...

class Coefficients:
    """The algebra of one kind of block. Coefficients are float, or double if ``wide``.

    Ten tensors: running mean and variance, moments, norm weight and bias, conv bias, γ, β, dropout mask,
    slope; ``types`` has a dtype code for each in four bits, the first lowest; ``rows`` those of γ, β and
    mask, and the number of slopes.

    ``norm``: 0 none, 1 batch, 2 instance, 3 group. ``order``: 0 norm-film-act, 1 norm-act-film, 2
    act-norm-film. ``position``: of the dropout; 0 end, 1 in front of FiLM, 2 in front of the norm.
    """

    def __init__(
        self,
        wide: bool,
        norm: int,
        order: int,
        position: int,
        use_input: bool,
        update: bool,
        n: int,
        c: int,
        groups: int,
        count: float,
        eps: float,
        slope: float,
    ) -> None: ...
    def forward(
        self, momentum: float, addresses: Sequence[int], types: int, rows: Sequence[int], coef: int
    ) -> None: ...
    def backward(
        self,
        addresses: Sequence[int],
        types: int,
        rows: Sequence[int],
        dcoef: int,
        gradients: Sequence[int],
    ) -> None: ...

def instruction_sets() -> tuple[str, ...]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def openmp(on: bool) -> bool:
    """Whether kernels may run on OpenMP's threads; returns what held before. For tests of their own threads."""

def split_finely(on: bool) -> int:
    """For tests: small maps are split as large ones are, and tasks handed out last first.

    Returns the most threads that a call was given to since the last switch.
    """
