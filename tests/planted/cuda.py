"""Faults in the CUDA kernels, csrc/cuda, which run on the host under csrc/emulation."""

from __future__ import annotations

from tests.planted.fault import Fault

POINTWISE = "tests/cuda/test_emulated.py -k 'any_shape and float32'"
PASSES = "tests/cuda/test_emulated.py -k 'any_shape or several_blocks or thousand_sigma'"
CONVOLUTION = "tests/cuda/test_convolution.py -k 'all_three or any_channel or other_paddings'"
SOURCES = "tests/cuda/test_convolution.py -k 'two_sources'"
NETWORKS = "tests/cuda/test_networks.py"
SM90 = "tests/cuda/test_sm90.py -k 'all_three and in_order and (2d or 3d_stride_2)'"

FAULTS = (
    # passes over a map
    Fault(
        "cuda-last-block-of-a-map-dropped",
        "csrc/cuda/pointwise.cu",
        "blocks = (map.s + span - 1) / span;",
        "blocks = std::max<int64_t>(1, map.s / span);",
        PASSES,
    ),
    Fault(
        "cuda-odd-channels-taken-as-aligned",
        "csrc/cuda/pointwise.cu",
        "if (map.c % kLanes<T>) return false;",
        "",
        POINTWISE,
    ),
    Fault(
        "cuda-gradient-of-the-mean-not-shared-out",
        "csrc/cuda/pointwise.cu",
        "p.dstats[nc + i] * scale : 0.0f",
        "p.dstats[nc + i] : 0.0f",
        POINTWISE,
    ),
    Fault(
        "cuda-chans-formula-with-one-count",
        "csrc/cuda/affine.h",
        "delta * delta * (count * share)",
        "delta * delta * (other.count * share)",
        PASSES,
    ),
    Fault(
        "cuda-one-row-of-threads-not-merged",
        "csrc/cuda/affine.h",
        "half >= columns; half /= 2",
        "half > columns; half /= 2",
        POINTWISE,
    ),
    Fault(
        "cuda-slope-of-elu-is-that-of-leaky-relu",
        "csrc/cuda/affine.h",
        "at_slope(i, z[i] > 0 ? 0.0f : m);",
        "at_slope(i, z[i] > 0 ? 0.0f : z[i]);  // ELU",
        "tests/cuda/test_emulated.py -k every_activation",
    ),
    Fault(
        "cuda-variance-between-blocks-left-out",
        "csrc/cuda/merge.h",
        "at[(slot * 2 + 1) * c] + weights[slot] * delta * delta",
        "at[(slot * 2 + 1) * c]",
        PASSES,
    ),
    Fault(
        "cuda-share-of-the-first-row-of-threads-dropped",
        "csrc/cuda/merge.h",
        "for (int r = 0; r < kRows; ++r)",
        "for (int r = 1; r < kRows; ++r)",
        POINTWISE,
    ),
    Fault(
        "cuda-sign-of-the-gradient-at-q",
        "csrc/cuda/merge.h",
        "-to.coef[kG * row + here] * sum",
        "to.coef[kG * row + here] * sum",
        POINTWISE,
    ),
    # the last block of a kernel
    Fault(
        "cuda-last-block-does-not-wait-for-the-others-writes",
        "csrc/cuda/merge.h",
        "  fence();\n  barrier();\n  int* last",
        "  barrier();\n  int* last",
        CONVOLUTION,
    ),
    Fault(
        "cuda-first-block-done-takes-itself-for-the-last",
        "csrc/cuda/merge.h",
        "static_cast<unsigned>(blocks) - 1;",
        "0;",
        CONVOLUTION,
    ),
    Fault(
        "cuda-counters-of-blocks-not-reset",
        "csrc/cuda/pack.cu",
        "if (i < p.count) p.counters[i] = 0;",
        "",
        CONVOLUTION,
    ),
    Fault(
        "cuda-coefficients-behind-the-first-sample-alone",
        "csrc/cuda/forward.h",
        "plan.blocks_n + block.y, plan.n)",
        "plan.blocks_n + block.y, 1)",
        "tests/cuda/test_behind.py",
    ),
    # coefficients behind a convolution
    Fault(
        "cuda-variance-of-batch-norm-without-that-between-samples",
        "csrc/cuda/coefficients.h",
        "total += variance(i) + d * d;",
        "total += variance(i);",
        "tests/cuda/test_behind.py",
    ),
    Fault(
        "cuda-running-variance-is-biased",
        "csrc/cuda/coefficients.h",
        "total * block.unbiased, block.momentum",
        "total, block.momentum",
        "tests/cuda/test_behind.py",
    ),
    Fault(
        "cuda-gamma-of-the-first-sample-for-all",
        "csrc/cuda/coefficients.h",
        "const int64_t i = n * of.pitch + channel * of.step;",
        "const int64_t i = channel * of.step;",
        "tests/cuda/test_behind.py",
    ),
    Fault(
        "cuda-moved-statistics-unknown-to-autograd",
        "fastfilm/ops/launchers/cuda/coefficients.py",
        "torch.autograd.graph.increment_version(theirs)",
        "pass",
        "tests/cuda/test_behind.py -k moved",
    ),
    # the launch between two convolutions
    Fault(
        "cuda-dw-in-another-layout-than-its-strides-say",
        "csrc/cuda/pack.cu",
        "left.kernel.w * s.h + tap % left.kernel.w * s.w]",
        "left.kernel.w * s.w + tap % left.kernel.w * s.h]",
        CONVOLUTION,
    ),
    Fault(
        "cuda-last-sums-of-a-weight-gradient-left-out",
        "csrc/cuda/pack.cu",
        "blocks_of(2 * static_cast<int64_t>(left.co), kMergeColumns)",
        "2 * left.co / kMergeColumns",
        "tests/cuda/test_sources.py",
    ),
    # convolution
    Fault(
        "cuda-moments-without-the-bias",
        "csrc/cuda/fprop.cu",
        "u[i] = v[i] + shift[i % kV];",
        "u[i] = v[i] - bias[i % kV] + shift[i % kV];",
        CONVOLUTION,
    ),
    Fault(
        "cuda-padding-behind-the-affine-is-not-zero",
        "csrc/cuda/slab.h",
        "if (number[i] >= 0) store_few<T, kPiece>",
        "store_few<T, kPiece>",
        CONVOLUTION,
    ),
    Fault(
        "cuda-coefficients-of-the-second-source-shifted",
        "csrc/cuda/operands.h",
        "if (second) channel -= part[0].channels;\n    return",
        "return",
        SOURCES,
    ),
    Fault(
        "cuda-weights-of-the-next-part-not-waited-for",
        "csrc/cuda/convolve.h",
        "wait_copies<0>();\n              barrier();",
        "barrier();",
        CONVOLUTION,
    ),
    Fault(
        "cuda-beside-the-products-a-row-off",
        "csrc/cuda/backward_epilogue.h",
        "load_anew(beside + i * pitch, few.w);",
        "load_anew(beside + (i & ~1) * pitch, few.w);",
        CONVOLUTION,
    ),
    Fault(
        "cuda-last-part-of-the-taps-dropped",
        "csrc/cuda/convolve.h",
        "const int end = tap + plan.part < count ? tap + plan.part : count;",
        "const int end = tap + plan.part < count ? tap + plan.part : tap;",
        CONVOLUTION,
    ),
    Fault(
        "cuda-gradient-of-the-variance-without-its-2",
        "csrc/cuda/operands.h",
        "2 * from.dstats[variance] * in.share",
        "from.dstats[variance] * in.share",
        f"{NETWORKS} -k as_good_as_eager",
    ),
    Fault(
        "cuda-voxels-outside-in-depth-read",
        "csrc/cuda/slab.h",
        "const bool in_map = static_cast<unsigned>(at.d) < static_cast<unsigned>(map.d) &&",
        "const bool in_map = at.d <= map.d &&",
        f"{CONVOLUTION} -k 3d",
    ),
    Fault(
        "cuda-32-bit-offsets",
        "csrc/cuda/slab.h",
        "present ? sample + static_cast<int64_t>(number[0]) * channels : base;",
        "present ? sample + static_cast<int>(static_cast<uint32_t>(number[0]) * channels) : base;",
        "tests/cuda/test_convolution.py -k two_to_the_31",
    ),
    Fault(
        "cuda-last-tile-of-dw-dropped",
        "csrc/cuda/wgrad.cu",
        "first + plan.tiles_a_group < all ? first + plan.tiles_a_group : all;",
        "first + plan.tiles_a_group < all ? first + plan.tiles_a_group : all - 1;",
        CONVOLUTION,
    ),
    Fault(
        "cuda-dw-taps-of-height-and-width-swapped",
        "csrc/cuda/wgrad.cu",
        "depth * taps + tap) * plan.ci + ci",
        "depth * taps + tap % 3 * 3 + tap / 3) * plan.ci + ci",
        CONVOLUTION,
    ),
    Fault(
        "cuda-last-odd-column-of-a-strided-gradient",
        "csrc/cuda/plan.cpp",
        "up(p.out.h, s.stride), up(p.out.w, s.stride)}",
        "up(p.out.h, s.stride), p.out.w / s.stride}",
        CONVOLUTION,
    ),
    Fault(
        "cuda-padding-of-a-strided-gradient-left-out",
        "csrc/cuda/extents.h",
        "(axis(r, i) + axis(s.padding, i) - first) / step",
        "(axis(r, i) + 1 - first) / step",
        CONVOLUTION,
    ),
    Fault(
        "cuda-weights-not-turned-in-depth",
        "csrc/cuda/pack.cu",
        "taps.kernel_first.d + depth * plan.kernel_step",
        "taps.count.d - 1 - taps.kernel_first.d - depth * plan.kernel_step",
        f"{CONVOLUTION} -k 3d",
    ),
    # what becomes of the gradient at the input
    Fault(
        "cuda-gradients-of-a-shared-map-not-added",
        "csrc/cuda/backward_epilogue.h",
        "dv[i * kPair + j] += few[j];",
        "dv[i * kPair + j] += 0 * few[j];",
        NETWORKS,
    ),
    Fault(
        "cuda-second-source-of-the-gradient-by-the-first-s-coefficients",
        "csrc/cuda/backward.h",
        "channel -= second ? part[0].channels : 0;",
        "channel %= part[0].channels;",
        NETWORKS,
    ),
    # warpgroup products
    Fault(
        "cuda-sm90-bias-of-another-row",
        "csrc/cuda/sm90/forward.cu",
        "sums[0][i] += bias[i / 2 % 2];",
        "sums[0][i] += bias[i % 2];",
        SM90,
    ),
    Fault(
        "cuda-sm90-moments-of-voxels-beside-the-map",
        "csrc/cuda/sm90/forward.cu",
        "(line < lines && product_voxel(b) < half.columns())",
        "line < lines",
        SM90,
    ),
    Fault(
        "cuda-sm90-sums-of-the-first-class-of-voxels-alone",
        "csrc/cuda/sm90/backward.cu",
        "which * layout.groups + block_index().x",
        "block_index().x",
        SM90,
    ),
    Fault(
        "cuda-sm90-last-odd-column-of-a-strided-gradient",
        "csrc/cuda/sm90/layout.cpp",
        "up(std::max(0, axis(p.out, i) - axis(box.out_first, i)), axis(step, i))",
        "axis(p.out, i) / axis(step, i)",
        SM90,
    ),
    Fault(
        "cuda-sm90-voxels-outside-in-depth-read",
        "csrc/cuda/sm90/planes.h",
        "static_cast<unsigned>(first.d) < static_cast<unsigned>(map.d)",
        "first.d <= map.d",
        "tests/cuda/test_sm90.py -k 'all_three and in_order and 3d'",
    ),
    Fault(
        "cuda-sm90-classes-of-strided-voxels-exchanged",
        "csrc/cuda/sm90/planes.h",
        "h += of_class / 2;",
        "h += of_class % 2;",
        SM90,
    ),
    Fault(
        "cuda-sm90-32-bit-offsets",
        "csrc/cuda/sm90/planes.h",
        "static_cast<int64_t>(number[i]) * from.channels;",
        "static_cast<int>(static_cast<uint32_t>(number[i]) * from.channels);",
        "tests/cuda/test_sm90.py -k two_to_the_31",
    ),
    Fault(
        "cuda-sm90-last-tile-of-dw-dropped",
        "csrc/cuda/sm90/weight.cu",
        "? layout.tiles_a_group : layout.tiles_of_last);",
        "? layout.tiles_a_group : layout.tiles_of_last - 1);",
        SM90,
    ),
    Fault(
        "cuda-sm90-dw-rows-of-taps-exchanged",
        "csrc/cuda/sm90/weight.cu",
        "row * kRowTaps + t",
        "(2 - row) * kRowTaps + t",
        SM90,
    ),
    Fault(
        "cuda-sm90-rows-that-share-a-product-with-one-row-s-taps",
        "csrc/cuda/pack.cu",
        "tap % plane / reads.count.w - row / plan.bn;",
        "tap % plane / reads.count.w;",
        "tests/cuda/test_sm90.py -k 'all_three and in_order and tall'",
    ),
    Fault(
        "cuda-sm90-chosen-on-later-gpus",
        "csrc/cuda/bindings.cpp",
        "if (device_.capability != 90)",
        "if (device_.capability < 90)",
        "tests/cuda/test_sm90.py -k other_gpus",
    ),
    # checks
    Fault(
        "cuda-sizes-of-the-result-unchecked",
        "csrc/cuda/bindings.cpp",
        "      const int step = flat ? 1 : stride;\n",
        "      const int step = flat ? 1 : stride;\n      continue;\n",
        "tests/cuda/test_convolution.py tests/cuda/test_emulated.py -k 'bad_arguments or sizes'",
    ),
    Fault(
        "cuda-misaligned-maps-unchecked",
        "csrc/cuda/bindings.cpp",
        "if (address % align != 0) {",
        "if (address % 1 != 0) {",
        "tests/cuda/test_emulated.py -k bad_arguments",
    ),
)
