"""Faults in the Triton kernels, kernels/, which run interpreted."""

from __future__ import annotations

from tests.planted.fault import Fault

KERNELS = "tests/kernels/test_kernels.py"
ORDERS = f"{KERNELS} -k 'order_and_norm and fused and interpreter'"
STAGES = "tests/kernels/test_stages.py"
COMPOSED = f"{KERNELS} -k 'order_and_norm and composed and interpreter'"
SHAPES = f"{KERNELS} -k 'every_kernel_size and 2d and interpreter'"
VIEWS = "tests/ops/test_maps.py -k triton"
MAXIMA = "tests/ops/test_maps.py -k 'maximum'"
NORMS = "tests/ops/test_coefficients.py -k 'test_every_norm and triton'"
PARTS = "tests/ops/test_coefficients.py -k 'test_parts and triton'"
SUMS = "tests/ops/test_residual.py -k 'as_good_as_eagers and dtype1 and triton'"
BLOCKS = f"{KERNELS} -k 'several_blocks'"

FAULTS = (
    Fault(
        "triton-sign-of-the-gradient-at-p",
        "kernels/common.py",
        "(da, db, dg, ds, -a * db, -g * ds, dslope)",
        "(da, db, dg, ds, a * db, -g * ds, dslope)",
        BLOCKS,
    ),
    Fault(
        "triton-gradient-at-the-slope-without-g",
        "kernels/common.py",
        "dslope += dv * g[None, :] * activate_slope_grad(z, ACT)",
        "dslope += dv * activate_slope_grad(z, ACT)",
        f"{KERNELS} -k 'every_activation and prelu and interpreter'",
    ),
    Fault(
        "triton-variance-between-tiles-left-out",
        "kernels/common.py",
        "+ count[:, None] * d * d, axis=0)",
        ", axis=0)",
        f"{KERNELS} -k several_tiles",
    ),
    Fault(
        "triton-last-rows-of-a-sum-dropped",
        "kernels/common.py",
        "for r0 in loop(first, last, BR):",
        "for r0 in loop(first, first + (last - first - 1) // BR * BR, BR):",
        SHAPES,
    ),
    Fault(
        "triton-derivative-of-gelu-without-the-density",
        "kernels/common.py",
        "z * 0.3989422804014327",
        "0.3989422804014327",
        f"{KERNELS} -k 'every_activation and gelu and interpreter'",
    ),
    Fault(
        "triton-last-share-of-the-moments-dropped",
        "kernels/common.py",
        "        shares = cdiv(tiles, share)\n",
        "        shares = tiles // share\n",
        f"{STAGES} -k moments",
    ),
    Fault(
        "triton-first-slot-of-the-next-share-counted-twice",
        "kernels/common.py",
        "    last = tl.minimum(first + share, T)\n",
        "    last = tl.minimum(first + share + 1, T)\n",
        f"{STAGES} -k moments",
    ),
    Fault(
        "triton-shares-of-sums-overlap",
        "kernels/common.py",
        "    last = tl.minimum(first + share, R)\n",
        "    last = tl.minimum(first + share + 1, R)\n",
        f"{STAGES} -k gradient",
    ),
    # convolution
    Fault(
        "triton-tap-of-a-parity-skipped",
        "kernels/conv_dgrad.py",
        "return (K - first + STRIDE - 1) // STRIDE",
        "return (K - first) // STRIDE",
        f"{KERNELS} -k parity",
    ),
    Fault(
        "triton-last-plane-of-a-gradient-skipped",
        "kernels/conv_dgrad.py",
        "low = tl.maximum(last - OD + 1, 0)",
        "low = tl.maximum(last - OD + 2, 0)",
        f"{KERNELS} -k parity",
    ),
    Fault(
        "triton-row-of-taps-begins-at-the-first",
        "kernels/conv_fprop.py",
        "kw = tl.where(kw >= K, first_w, kw)",
        "kw = tl.where(kw >= K, 0, kw)",
        f"{KERNELS} -k parity",
    ),
    Fault(
        "triton-column-behind-the-map-read",
        "kernels/conv_fprop.py",
        "(ih < H) & (iw >= 0) & (iw < W)",
        "(ih < H) & (iw >= 0) & (iw <= W)",
        SHAPES,
    ),
    Fault(
        "triton-first-plane-taken-for-padding",
        "kernels/conv_fprop.py",
        "tl.where((depth >= 0) & (depth < D)",
        "tl.where((depth > 0) & (depth < D)",
        f"{KERNELS} -k padding",
    ),
    Fault(
        "triton-padding-behind-the-affine-is-not-zero",
        "kernels/conv_fprop.py",
        "x = tl.where(mask, v, 0.0).to(x.dtype)",
        "x = v.to(x.dtype)",
        f"{KERNELS} -k padding_is_zero",
    ),
    Fault(
        "triton-bias-behind-the-moments",
        "kernels/conv_fprop.py",
        "        u = acc\n",
        "        u = acc - (tl.load(bias_ptr + co, mask=comask, other=0.0)[None, :] if HAS_BIAS else 0.0)\n",
        ORDERS,
    ),
    Fault(
        "triton-padding-of-height-for-width",
        "kernels/conv_dgrad.py",
        "nh, nw = ih + PH - kh, iw + PW - kw",
        "nh, nw = ih + PH - kh, iw + PH - kw",
        f"{KERNELS} -k padding",
    ),
    Fault(
        "triton-last-tile-of-a-strided-gradient",
        "kernels/conv_dgrad.py",
        "tiles_w = tl.cdiv(tl.cdiv(W, STRIDE), TW)",
        "tiles_w = tl.cdiv(W // STRIDE, TW)",
        f"{KERNELS} -k padding",
    ),
    Fault(
        "triton-dw-of-the-last-sample-dropped",
        "kernels/conv_wgrad.py",
        "for sample in loop(group, N, groups):",
        "for sample in loop(group, N - 1, groups):",
        SHAPES,
    ),
    Fault(
        "triton-dw-of-unactivated-padding",
        "kernels/conv_wgrad.py",
        "x = tl.where(mask, v, 0.0).to(x.dtype)",
        "x = v.to(x.dtype)",
        ORDERS,
    ),
    # passes over a map
    Fault(
        "triton-count-of-one-block-for-all",
        "kernels/spatial_moments.py",
        "tl.minimum(first + iters * BS, S)",
        "tl.minimum(first + BS, S)",
        BLOCKS,
    ),
    Fault(
        "triton-sums-of-the-last-block-alone",
        "kernels/pointwise.py",
        "dy, sums = add_affine_grad(dv, y, coefs, sums, ACT)",
        "dy, sums = add_affine_grad(dv, y, coefs, (none, none, none, none, none), ACT)",
        BLOCKS,
    ),
    Fault(
        "triton-gradient-of-the-variance-without-its-2",
        "kernels/spatial_moments.py",
        "* (2.0 * scale)",
        "* scale",
        COMPOSED,
    ),
    # gathering
    Fault(
        "triton-gradient-to-the-last-maximum",
        "kernels/taps.py",
        "larger = used & ((v > best) | (v != v))",
        "larger = used & ((v >= best) | (v != v))",
        MAXIMA,
    ),
    Fault(
        "triton-maximum-of-unrounded-values",
        "kernels/taps.py",
        "                    v = v.to(y_ptr.dtype.element_ty).to(tl.float32)\n",
        "",
        MAXIMA,
    ),
    Fault(
        "triton-view-read-from-the-first-channel",
        "kernels/taps.py",
        "start = (n * SO + (az * HO + ay).to(tl.int64) * WO) * K + first",
        "start = (n * SO + (az * HO + ay).to(tl.int64) * WO) * K",
        VIEWS,
    ),
    # the [N, C] algebra
    Fault(
        "triton-running-var-biased",
        "kernels/coefficients.py",
        "_move(running_var_ptr, channel, cmask, variance * unbiased, momentum)",
        "_move(running_var_ptr, channel, cmask, variance, momentum)",
        NORMS,
    ),
    Fault(
        "triton-dropout-before-the-norm-misses-its-square",
        "kernels/coefficients.py",
        "variance += row_or(stats_ptr, (N + n) * C + channel, cmask, 0.0) * s * s + d * d",
        "variance += row_or(stats_ptr, (N + n) * C + channel, cmask, 0.0) * s + d * d",
        NORMS,
    ),
    Fault(
        "triton-gradient-of-gamma-of-one-row-not-summed",
        "kernels/coefficients.py",
        "shared_gamma += dfilm",
        "shared_gamma = dfilm",
        PARTS,
    ),
    Fault(
        "triton-gradient-of-the-variance-without-the-weight",
        "kernels/coefficients.py",
        "-0.5 * dfactor * factor * inverse * inverse",
        "-0.5 * dfactor * inverse * inverse * inverse",
        NORMS,
    ),
    # residual sums
    Fault(
        "triton-residual-gradient-at-g-without-q",
        "kernels/residual_sum.py",
        "a * sum_vy + (b - q) * sum_v",
        "a * sum_vy + b * sum_v",
        SUMS,
    ),
    Fault(
        "triton-residual-without-the-others-offset",
        "kernels/residual_sum.py",
        "affine(y, (a, b, g, s + offset2, p, q, slope), ACT)",
        "affine(y, (a, b, g, s, p, q, slope), ACT)",
        SUMS,
    ),
)
