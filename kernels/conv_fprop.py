"""The forward convolution, with the norm, FiLM and activation in front of it and behind it in the same pass.

Those before it are applied while the input is loaded. Of the output the mean and variance are taken while it is
written, or, where its own coefficients are known already, it is written with them applied.

2D and 3D are one kernel: a 2D map has depth 1 and a kernel of depth 1. A program computes a tile of TH x TW output
voxels of one sample and one depth, for BN output channels; one sample per program makes the input's coefficients
vectors over channels instead of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    ACT_CODES,
    INTERPRETED,
    activate,
    add_product,
    affine,
    architecture,
    cdiv,
    channels_last,
    dense,
    finish_moments,
    guard,
    layout,
    load_coef,
    load_pre,
    loop,
    power_of_two,
    precision,
    scratch,
    store_moments,
    tile_moments,
)


@dataclass(frozen=True)
class Config:
    """Tile of a convolution kernel: TH x TW voxels by BN channels out, BK channels in at a time.

    ``archs`` are the targets where it compiles without spills.
    """

    th: int
    tw: int
    bn: int
    bk: int
    warps: int
    stages: int
    archs: tuple[int, ...] = (80, 90, 100)

    def constants(self, channels: int, *planes: int) -> dict[str, Any]:
        """Constants of a launch that sums over ``channels`` and has ``planes`` of so many numbers."""
        tile = {"TH": self.th, "TW": self.tw, "BN": self.bn, "BK": self.bk}
        return tile | {
            "ONE_BLOCK": channels <= self.bk,
            # an offset inside a plane (with room for the halo) needs 64 bits
            "WIDE": max(planes) >= 2**30,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


CONFIGS = (
    Config(8, 8, 128, 64, 8, 2),
    Config(8, 16, 64, 64, 8, 2),
    Config(8, 16, 64, 32, 8, 2),
    Config(8, 16, 32, 64, 8, 2, archs=(80, 90)),
    Config(8, 16, 16, 16, 8, 2),
    Config(8, 8, 64, 64, 4, 2),
)
"""Shipped tiles for 16-bit types; each is compiled and checked for spills by the static suite."""

CONFIGS_FLOAT32 = (Config(8, 8, 32, 32, 4, 2), Config(4, 4, 32, 32, 4, 2))


def interpreter_tile(height: int, width: int) -> Config:
    """Larger tiles where kernels are interpreted: the time there goes by programs, not by elements."""
    return Config(power_of_two(height, 4, 16), power_of_two(width, 4, 32), 64, 64, 4, 2)


def pick(
    dtype: torch.dtype, channels_in: int, channels_out: int, height: int, width: int, target: int
) -> Config:
    """The shipped tile for ``target`` that wastes least: channels first, then the size of the map."""
    if INTERPRETED:
        return interpreter_tile(height, width)
    if dtype == torch.float32:
        return CONFIGS_FLOAT32[0] if height * width > 64 else CONFIGS_FLOAT32[1]
    if height * width <= 64:
        order = [5]
    elif channels_out <= 16:
        order = [4]
    elif channels_out <= 32:
        order = [3, 2]
    elif channels_in <= 32:
        order = [2]
    else:
        order = [0] if channels_out >= 128 else [1]
    return next(CONFIGS[i] for i in order if target in CONFIGS[i].archs)


def as_3d(shape: Sequence[int], flat: int = 1) -> tuple[int, int, int]:
    """(D, H, W) of (H, W) or (D, H, W); a 2D convolution has ``flat`` as its depth."""
    return (flat, shape[0], shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def sizes(x: torch.Tensor, weight: torch.Tensor, output: Sequence[int]) -> tuple[int, ...]:
    """N, CI, CO, D, H, W, OD, OH, OW of a convolution, as its kernels take them."""
    return (*x.shape[:2], weight.shape[0], *as_3d(x.shape[2:]), *as_3d(output))


def constants(
    x: torch.Tensor,
    weight: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    stride: Sequence[int],
    padding: Sequence[int],
) -> dict[str, Any]:
    """The constants that the three kernels of a convolution are specialised on, tile aside, and the padding."""
    kd, _, k = as_3d(weight.shape[2:])
    stride_d, _, stride_hw = as_3d(stride)
    pd, ph, pw = as_3d(padding, flat=0)
    geometry = {"KD": kd, "K": k, "STRIDE": stride_hw, "STRIDE_D": stride_d}
    geometry |= {"PD": pd, "PH": ph, "PW": pw}
    pending = {"HAS_COEF": coef is not None, "ACT": ACT_CODES[act]}
    upcast = INTERPRETED and x.dtype == torch.bfloat16
    return geometry | pending | {"UPCAST": upcast, "PRECISION": precision(x.dtype)}


def weight_rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight with its input channels side by side."""
    return weight.contiguous(memory_format=layout(weight.dim()))


@triton.jit
def following(
    kd,
    kh,
    kw,
    k0,
    first_h,
    first_w,
    C,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE_D: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """Tap and first channel of the next product: blocks of channels first, then width, height and depth."""
    if ONE_BLOCK:
        kw += STRIDE
    else:
        k0 += BK
        kw += tl.where(k0 >= C, STRIDE, 0)
        k0 = tl.where(k0 >= C, 0, k0)
    kh += tl.where(kw >= K, STRIDE, 0)
    kw = tl.where(kw >= K, first_w, kw)
    kd += tl.where(kh >= K, STRIDE_D, 0)
    kh = tl.where(kh >= K, first_h, kh)
    return kd, kh, kw, k0


@triton.jit
def fprop_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    coef_ptr,
    pre_ptr,
    out_coef_ptr,
    y_ptr,
    part_ptr,
    count_ptr,
    N,
    CI,
    CO,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    KD: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE_D: tl.constexpr,
    PD,
    PH,
    PW,
    HAS_BIAS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    MOMENTS: tl.constexpr,
    HAS_PRE: tl.constexpr,
    PRE_ACT: tl.constexpr,
    FINISH: tl.constexpr,
    OUT_ACT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BM: tl.constexpr = TH * TW
    tiles_w = tl.cdiv(OW, TW)
    tiles_h = tl.cdiv(OH, TH)
    tiles = OD * tiles_h * tiles_w
    n = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    od = t // (tiles_h * tiles_w)
    th = (t // tiles_w) % tiles_h
    tw = t % tiles_w
    row = tl.arange(0, BM)
    oh = th * TH + row // TW
    ow = tw * TW + row % TW
    valid = (oh < OH) & (ow < OW)
    if WIDE:
        # offsets inside one plane are 32-bit unless the plane itself is larger
        oh = oh.to(tl.int64)
        ow = ow.to(tl.int64)
    co = tl.program_id(1) * BN + tl.arange(0, BN)
    comask = co < CO
    acc = tl.zeros((BM, BN), tl.float32)
    kd, kh, kw, k0 = 0, 0, 0, 0
    for _ in loop(KD * K * K * (1 if ONE_BLOCK else tl.cdiv(CI, BK))):
        depth = od * STRIDE_D - PD + kd
        # beside the first and the last plane all rows lie above the map
        ih = oh * STRIDE + tl.where((depth >= 0) & (depth < D), kh - PH, -H - 2 * PH)
        iw = ow * STRIDE - PW + kw
        inside = valid & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        plane = x_ptr + (n * D + depth) * H * W * CI
        x_row = plane + (ih * W + iw) * CI
        w_col = w_ptr + ((co * KD + kd) * K + kh) * K * CI + kw * CI
        ci = k0 + tl.arange(0, BK)
        mask = inside[:, None] & (ci < CI)[None, :]
        x = tl.load(x_row[:, None] + ci[None, :], mask=mask, other=0.0)
        w = tl.load(
            w_col[None, :] + ci[:, None], mask=(ci < CI)[:, None] & comask[None, :], other=0.0
        )
        if HAS_COEF:
            coefs = load_coef(coef_ptr, n, ci, ci < CI, N, CI)
            v = affine(x.to(tl.float32), coefs, ACT)
            # padding is zero after the affine, not act(b)
            x = tl.where(mask, v, 0.0).to(x.dtype)
        acc = add_product(x, w, acc, UPCAST, PRECISION)
        kd, kh, kw, k0 = following(kd, kh, kw, k0, 0, 0, CI, K, 1, 1, ONE_BLOCK, BK)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + co, mask=comask, other=0.0).to(tl.float32)[None, :]
    if MOMENTS:
        u = acc
        if HAS_PRE:
            shift, slope = load_pre(pre_ptr, co, comask, CO, HAS_PRE)
            u = activate(u + shift[None, :], slope[None, :], PRE_ACT)
        count = tl.sum(valid.to(tl.float32), axis=0)
        mean, m2 = tile_moments(u, valid, count)
        slot = n * tiles + t
        store_moments(part_ptr, count_ptr, slot, co, comask, CO, mean, m2, count)
    if FINISH:
        acc = affine(acc, load_coef(out_coef_ptr, n, co, comask, N, CO), OUT_ACT)
    at = (oh * OW + ow)[:, None] * CO + co[None, :]
    tl.store(
        y_ptr + (n * OD + od) * OH * OW * CO + at,
        acc.to(y_ptr.dtype.element_ty),
        mask=valid[:, None] & comask[None, :],
    )


def fprop(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor | None,
    act: str,
    pre: torch.Tensor | None,
    pre_act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    moments: bool,
    config: Config | None = None,
    out_coef: torch.Tensor | None = None,
    out_act: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw output [N, Co, *T] channels-last, and its moments [2, N, Co] (empty without ``moments``).

    Args:
        x: raw input [N, Ci, *S] channels-last; ``coef`` [7, N, Ci] and ``act`` are pending on it.
        weight: [Co, Ci, *K], K 1 or 3 in every dimension.
        bias: [Co], added before the output is rounded and its moments are taken.
        pre: [2, Co], shift and slope of ``pre_act`` in front of the norm.
        out_coef: [7, N, Co], known beforehand: the output is the finished block, behind it and ``out_act``.
    """
    size = tuple(
        (i + 2 * p - k) // s + 1
        for i, k, s, p in zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    )
    n, ci, co, _, h, w, od, oh, ow = numbers = sizes(x, weight, size)
    c = config or pick(x.dtype, ci, co, oh, ow, architecture(x))
    y = channels_last((n, co, *size), x)
    tiles = od * cdiv(oh, c.th) * cdiv(ow, c.tw)
    slots = tiles if moments else 1
    partials, counts = scratch(x, n, slots, 2, co), scratch(x, n, slots)
    with guard(x):
        fprop_kernel[(n * tiles, cdiv(co, c.bn))](
            *(x, weight_rows(weight), dense(bias, x), dense(coef, x), dense(pre, x)),
            *(dense(out_coef, x), y, partials, counts, *numbers),
            HAS_BIAS=bias is not None,
            MOMENTS=moments,
            HAS_PRE=pre is not None,
            PRE_ACT=ACT_CODES[pre_act],
            FINISH=out_coef is not None,
            OUT_ACT=ACT_CODES[out_act],
            **constants(x, weight, coef, act, stride, padding),
            **c.constants(ci, h * w * ci, oh * ow * co),
        )
        if not moments:
            return y, scratch(x, 0)
        return y, finish_moments(partials, counts)
