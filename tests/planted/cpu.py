"""Faults in the C++ kernels, csrc/cpu."""

from __future__ import annotations

from tests.planted.fault import Fault

KERNELS, CONV, COEF = (
    "tests/cpu/test_kernels.py",
    "tests/cpu/test_convolution.py",
    "tests/ops/test_coefficients.py",
)
APPLY = f"{KERNELS} -k 'test_apply_is and float32'"
MOMENTS = f"{KERNELS} -k 'test_moments_are and float32'"
NORMS = f"{COEF} -k 'test_every_norm and cpu'"
THREADS = "tests/cpu/test_threads.py"
PARTS = f"{COEF} -k 'test_parts and cpu'"
VALUE = f"{CONV} -k 'test_the_convolution_is'"
GRADIENTS = f"{CONV} -k 'test_the_gradients_are'"
STRIDED = f"{CONV} -k test_strided"
VIEWS = "tests/ops/test_maps.py -k 'views_are_pytorchs or maximum'"
SUMS = "tests/ops/test_residual.py -k 'as_good_as_eagers and dtype0 and cpu'"

FAULTS = (
    # the three that need more than one thread
    Fault(
        "cpu-dw-share-of-the-last-thread",
        "csrc/cpu/convolution.cpp",
        "sums[j] += sums[part * size + j];",
        "if ((part + 1) * size < static_cast<int64_t>(sums.size())) sums[j] += sums[part * size + j];",
        f"{CONV} tests/cpu/test_threads.py -k 'weights_gradients_of_large or bits_do_not_depend'",
    ),
    Fault(
        "cpu-overlapping-windows-taken-as-disjoint",
        "csrc/cpu/gather.cpp",
        "axis.index[last - 1] >= axis.index[last]) return false;",
        "axis.index[last - 1] > axis.index[last] + 999) return false;",
        "tests/cpu/test_threads.py -k bits_do_not_depend",
    ),
    Fault(
        "cpu-chunks-by-the-number-of-threads",
        "csrc/cpu/walk.h",
        "ceil_div(ceil_div(chunk, period), kMaxBlockRows)",
        "ceil_div(ceil_div(chunk / map.threads, period), kMaxBlockRows)",
        "tests/cpu/test_threads.py -k bits_do_not_depend",
    ),
    # walks over a map
    Fault(
        "cpu-last-part-of-a-vector-dropped",
        "csrc/cpu/walk.h",
        "if (j == width) return;",
        "if (j > 0) return;",
        APPLY,
    ),
    Fault(
        "cpu-last-position-of-a-period-not-folded",
        "csrc/cpu/walk.h",
        "j < plan.period; j += c",
        "j + c < plan.period; j += c",
        APPLY,
    ),
    Fault(
        "cpu-sums-of-the-last-chunk-dropped",
        "csrc/cpu/driver.cpp",
        "at < partial.size(); at += total.size()",
        "at + total.size() < partial.size(); at += total.size()",
        MOMENTS,
    ),
    Fault(
        "cpu-chans-formula-with-one-count",
        "csrc/cpu/driver.cpp",
        "both = count * weight",
        "both = other_count * weight",
        f"{KERNELS} -k variance_survives",
    ),
    Fault(
        "cpu-variance-by-count-less-one",
        "csrc/cpu/driver.cpp",
        "m2[j] / count",
        "m2[j] / (count - 1)",
        MOMENTS,
    ),
    Fault(
        "cpu-pivot-not-taken-from-the-data",
        "csrc/cpu/driver.cpp",
        "std::isfinite(value) ? value : R(0)",
        "R(0)",
        f"{KERNELS} -k variance_survives",
    ),
    Fault(
        "cpu-gradient-of-the-variance-without-its-2",
        "csrc/cpu/driver.cpp",
        "R(2) * dstats[rows + i]",
        "dstats[rows + i]",
        MOMENTS,
    ),
    Fault(
        "cpu-sign-of-the-gradient-at-p",
        "csrc/cpu/driver.cpp",
        "static_cast<R>(-a * sums[kSumDz])",
        "static_cast<R>(a * sums[kSumDz])",
        APPLY,
    ),
    # activations and sums of strips
    Fault(
        "cpu-slope-of-elu-is-that-of-leaky-relu",
        "csrc/cpu/activation.inc",
        "dslope = select(z > zero, zero, m);",
        "dslope = select(z > zero, zero, z);",
        APPLY,
    ),
    Fault(
        "cpu-gradient-at-g-without-q",
        "csrc/cpu/kernels.inc",
        "dvh += d * (h - q);",
        "dvh += d * h;",
        APPLY,
    ),
    Fault(
        "cpu-infinite-gradient-of-a-dead-relu",
        "csrc/cpu/kernels.inc",
        "dz = select(act_dz == splat(R(0)), splat(R(0)), dg);",
        "dz = dg * act_dz;",
        f"{KERNELS} -k infin",
    ),
    Fault(
        "cpu-half-of-the-gradient-at-a-shift",
        "csrc/cpu/kernels.inc",
        "sum_shift += e;",
        "sum_shift += dz;",
        f"{KERNELS} -k 'test_moments or dshift'",
    ),
    # the [N, C] algebra
    Fault(
        "cpu-running-var-biased",
        "csrc/cpu/coefficients.cpp",
        "variance * unbiased - running_var[c]",
        "variance - running_var[c]",
        NORMS,
    ),
    Fault(
        "cpu-running-var-of-a-batch-by-one-sample",
        "csrc/cpu/coefficients.cpp",
        "shape.norm == kNormBatch ? shape.n * shape.count : shape.count",
        "shape.count",
        NORMS,
    ),
    Fault(
        "cpu-momentum-of-the-old-value",
        "csrc/cpu/coefficients.cpp",
        "running_mean[c] += shape.momentum * (mean",
        "running_mean[c] += (1 - shape.momentum) * (mean",
        NORMS,
    ),
    Fault(
        "cpu-eps-omitted-for-tiny-variances",
        "csrc/cpu/coefficients.cpp",
        "std::sqrt(variance[at] + shape.eps)",
        "std::sqrt(variance[at] > shape.eps ? variance[at] : shape.eps)",
        NORMS,
    ),
    Fault(
        "cpu-dropout-at-the-end-misses-the-offset",
        "csrc/cpu/coefficients.cpp",
        "(offset * film + beta) * end;",
        "offset * film + beta * end;",
        NORMS,
    ),
    Fault(
        "cpu-dropout-before-film-drops-beta",
        "csrc/cpu/coefficients.cpp",
        "film = block.gamma(i, c) * block.before_film(i, c), beta = block.beta(i, c);",
        "film = block.gamma(i, c) * block.before_film(i, c), beta = block.beta(i, c) * block.before_film(i, c);",
        NORMS,
    ),
    Fault(
        "cpu-group-of-the-neighbour",
        "csrc/cpu/coefficients.cpp",
        "f(i, i + 1, g * width, (g + 1) * width)",
        "f(i, i + 1, g * width, std::min((g + 1) * width + 1, shape.c))",
        NORMS,
    ),
    Fault(
        "cpu-gradient-of-the-variance-without-the-weight",
        "csrc/cpu/coefficients.cpp",
        "-0.5 * dfactor * block.weight(0, c) * inverse",
        "-0.5 * dfactor * inverse",
        NORMS,
    ),
    Fault(
        "cpu-gradient-of-gamma-of-one-row-not-summed",
        "csrc/cpu/coefficients.cpp",
        "dgamma[i * gamma_pitch + c] += dfilm * before;",
        "dgamma[i * gamma_pitch + c] = dfilm * before;",
        PARTS,
    ),
    Fault(
        "cpu-gradient-of-one-slope-not-summed",
        "csrc/cpu/coefficients.cpp",
        "dslope = {std::accumulate(dslope.begin(), dslope.end(), 0.0)};",
        "dslope = {dslope[0]};",
        PARTS,
    ),
    Fault(
        "cpu-gradient-of-the-bias-misses-the-mean",
        "csrc/cpu/coefficients.cpp",
        "if (block.first) dshift[c] += dmean;",
        "",
        NORMS,
    ),
    Fault(
        "cpu-bfloat16-rounds-halves-up",
        "csrc/cpu/coefficients.cpp",
        "bits + 0x7fff + ((bits >> 16) & 1)",
        "bits + 0x8000",
        COEF,
    ),
    Fault(
        "cpu-float16-below-its-smallest-normal",
        "csrc/cpu/coefficients.cpp",
        "std::max(std::ilogb(size), -14)",
        "std::ilogb(size)",
        COEF,
    ),
    # convolution
    Fault(
        "cpu-strides-of-depth-and-height-swapped",
        "csrc/cpu/convolution.cpp",
        "z * conv_.stride[0] - conv_.before[0]",
        "z * conv_.stride[1] - conv_.before[0]",
        STRIDED,
    ),
    Fault(
        "cpu-kernel-rows-of-depth-and-height-swapped",
        "csrc/cpu/convolution.cpp",
        "from + o * s[0] + r / conv.kernel[1] * s[2] + r % conv.kernel[1] * s[3]",
        "from + o * s[0] + r % conv.kernel[0] * s[2] + r / conv.kernel[0] * s[3]",
        VALUE,
    ),
    Fault(
        "cpu-too-few-rows-held-at-a-stride",
        "csrc/cpu/convolution.cpp",
        "conv.kernel[1] + (lines - 1) * conv.stride[1]",
        "conv.kernel[1] + lines - 1",
        f"{CONV} -k 'strided or every_route'",
    ),
    Fault(
        "cpu-bias-of-the-first-block",
        "csrc/cpu/convolution.cpp",
        "length, added.data() + at,",
        "length, added.data(),",
        VALUE,
    ),
    Fault(
        "cpu-flipped-kernel-widened-from-its-middle",
        "csrc/cpu/convolution.cpp",
        "if (extent < 0) ahead -= extent;",
        "",
        GRADIENTS,
    ),
    Fault(
        "cpu-dw-summed-in-float-over-all-lines",
        "csrc/cpu/convolution.cpp",
        "lines = std::max<int64_t>(1, kSumLength / std::max<int64_t>(1, conv.out[2]));",
        "lines = conv.out[1];",
        f"{CONV} -k 'round_as_little'",
    ),
    Fault(
        "cpu-end-of-a-long-sum-dropped",
        "csrc/cpu/convolution.inc",
        "j < k.length; j += kShortSum",
        "j + kShortSum <= k.length; j += kShortSum",
        VALUE,
    ),
    Fault(
        "cpu-what-lies-behind-a-row-multiplied",
        "csrc/cpu/convolution.inc",
        "if (j == whole) tap = select(inside, tap, vf{});",
        "",
        f"{CONV} -k not_finite",
    ),
    Fault(
        "cpu-last-output-channels-of-dw-dropped",
        "csrc/cpu/convolution.inc",
        "for (; o < k.co; ++o) add_kernel_gradient<1, J>",
        "for (; o + 1 < k.co; ++o) add_kernel_gradient<1, J>",
        GRADIENTS,
    ),
    Fault(
        "cpu-winograd-turns-the-kernel-in-depth",
        "csrc/cpu/winograd.cpp",
        "at.z - conv.before[0] + d;",
        "at.z + conv.before[0] - d;",
        "tests/cpu/test_winograd.py",
    ),
    Fault(
        "cpu-winograd-keeps-a-column-of-the-tile-before",
        "csrc/cpu/winograd.inc",
        "b[i] = e[i];",
        "",
        "tests/cpu/test_winograd.py",
    ),
    # gathering
    Fault(
        "cpu-gradient-to-the-last-maximum",
        "csrc/cpu/gather.inc",
        "auto larger = (tap > best) | (tap != tap);",
        "auto larger = (tap >= best) | (tap != tap);",
        VIEWS,
    ),
    Fault(
        "cpu-maximum-loses-nan",
        "csrc/cpu/gather.inc",
        "best = select((tap > best) | (tap != tap), tap, best);",
        "best = select(tap > best, tap, best);",
        VIEWS,
    ),
    Fault(
        "cpu-both-taps-of-the-first-weight",
        "csrc/cpu/gather.inc",
        "scale * k.weight[first + 1]",
        "scale * k.weight[first]",
        VIEWS,
    ),
    Fault(
        "cpu-row-of-the-sample-before",
        "csrc/cpu/gather.cpp",
        "if (holds_[slot] != number) continue;",
        "if (holds_[slot] % per_sample_ != at) continue;",
        VIEWS,
    ),
    # residual sums
    Fault(
        "cpu-residual-gradient-at-g-without-q",
        "csrc/cpu/residual.cpp",
        "a * sum_y + (b - q) * sum",
        "a * sum_y + b * sum",
        SUMS,
    ),
    Fault(
        "cpu-residual-without-the-others-offset",
        "csrc/cpu/residual.cpp",
        "first.s + second.offset()",
        "first.s",
        SUMS,
    ),
    Fault(
        "cpu-residual-gradient-of-the-other-past-the-activation",
        "csrc/cpu/residual.inc",
        "V dr = INSIDE ? dz : d;",
        "V dr = d;",
        SUMS,
    ),
    Fault(
        "cpu-exception-of-a-thread-lost",
        "csrc/cpu/threads.cpp",
        "if (job.failed) std::rethrow_exception(job.failed);",
        "",
        THREADS,
    ),
    Fault(
        "cpu-one-workspace-for-all-threads",
        "csrc/cpu/threads.cpp",
        "job.run(job.context, job.last_first ? job.tasks - 1 - task : task, worker);",
        "job.run(job.context, job.last_first ? job.tasks - 1 - task : task, 0);",
        THREADS,
    ),
    Fault(
        "cpu-caller-does-not-wait-for-its-helpers",
        "csrc/cpu/threads.cpp",
        "job.idle.wait(lock, [&] { return job.busy == 0; });",
        "",
        THREADS,
    ),
)
