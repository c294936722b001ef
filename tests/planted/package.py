"""Faults in the package: fastfilm/ops, fastfilm/nn and fastfilm/convert."""

from __future__ import annotations

from tests.planted.fault import Fault

MAPS = "tests/test_maps.py -k 'not triton and not network'"
SECOND = "tests/test_double_backward.py"
CONVERT = "tests/test_convert.py -k 'originals'"
CONDITION = "tests/test_condition.py"
UNET = "tests/test_unet.py tests/test_golden.py"
REFERENCE = "tests/test_reference.py"

FAULTS = (
    # ops
    Fault(
        "ops-dropout-before-the-norm-misses-its-square",
        "fastfilm/ops/coefficients.py",
        "var = var * (scale * scale)",
        "var = var * scale",
        REFERENCE,
    ),
    Fault(
        "ops-running-var-of-an-instance-norm-biased",
        "fastfilm/ops/coefficients.py",
        "unbiased = count / max(count - 1, 1)",
        "unbiased = 1.0",
        REFERENCE,
    ),
    Fault(
        "ops-dropout-at-the-end-misses-the-offset",
        "fastfilm/ops/coefficients.py",
        "s = None if s is None else s * mask",
        "s = None if s is None else s",
        REFERENCE,
    ),
    Fault(
        "ops-variance-between-the-channels-of-a-group-left-out",
        "fastfilm/ops/coefficients.py",
        " + (grouped_mean - centre).square())",
        ")",
        REFERENCE,
    ),
    Fault(
        "ops-second-derivative-misses-the-moments",
        "fastfilm/ops/higher.py",
        "e = dy + added.to(dy.dtype)",
        "e = dy + added.to(dy.dtype).detach()",
        f"{SECOND} -k 'of_a_block and batch'",
    ),
    Fault(
        "ops-second-derivative-misses-the-coefficients",
        "fastfilm/ops/higher.py",
        "return (ddy, ddstats, dx, dweight, dcoef, None,",
        "return (ddy, ddstats, dx, dweight, None, None,",
        f"{SECOND} -k 'pending or penalty'",
    ),
    Fault(
        "ops-second-derivative-of-a-sum-misses-the-slope",
        "fastfilm/ops/higher.py",
        "return ddv, dy, dcoef, None, dother, dother_coef, dslope, None, None, None",
        "return ddv, dy, dcoef, None, dother, dother_coef, None, None, None, None",
        "tests/test_residual.py -k second_derivative",
    ),
    Fault(
        "ops-gradient-of-the-weight-in-another-layout",
        "fastfilm/ops/conv.py",
        "return grad if grad.stride() == like.stride() else like.copy_(grad)",
        "return grad",
        "tests/test_operators.py",
    ),
    Fault(
        "ops-dilation-of-the-gradient-ignored",
        "fastfilm/ops/conv.py",
        "(e, v, weight, *geometry, rest)",
        "(e, v, weight, *geometry[:2], (1, 1, 1)[: e.dim() - 2], *geometry[3:], rest)",
        "tests/test_ops.py -k composed_covers",
    ),
    Fault(
        "ops-autocast-casts-float64",
        "fastfilm/ops/library.py",
        "isinstance(t, Tensor) and t.dtype != torch.float64",
        "isinstance(t, Tensor)",
        "tests/test_operators.py -k autocast",
    ),
    Fault(
        "ops-output-padding-ignored",
        "fastfilm/ops/spec.py",
        "(i - 1) * s - 2 * p + d * (k - 1) + o + 1",
        "(i - 1) * s - 2 * p + d * (k - 1) + 1",
        "tests/test_operators.py tests/test_ops.py",
    ),
    Fault(
        "ops-film-of-another-batch-accepted",
        "fastfilm/ops/spec.py",
        "t.shape[0] in (batch, 1)",
        "t.shape[0] >= 1",
        "tests/test_ops.py -k bad_input",
    ),
    Fault(
        "ops-paddings-of-the-mirrored-convolution-reversed",
        "fastfilm/ops/cpu_convolution.py",
        "zip(kernel, padding, strict=True))\n    turned = (strides[1]",
        "zip(kernel, padding[::-1], strict=True))\n    turned = (strides[1]",
        "tests/test_cpu_convolution.py -k test_the_gradients_are",
    ),
    Fault(
        "ops-eps-of-the-norm-ignored",
        "fastfilm/ops/cpu.py",
        "eps=kind.eps,",
        "eps=1e-5,",
        "tests/test_coefficients.py -k 'test_parts and cpu'",
    ),
    Fault(
        "ops-groups-of-the-norm-ignored",
        "fastfilm/ops/cpu.py",
        "groups=kind.groups,",
        "groups=1,",
        CONVERT,
    ),
    Fault(
        "ops-slope-of-a-sum-of-the-first-sample",
        "fastfilm/ops/cpu.py",
        "dslope.sum(0)",
        "dslope[0]",
        "tests/test_residual.py -k 'as_good_as_eagers and dtype0 and cpu'",
    ),
    Fault(
        "ops-gradient-of-a-map-from-the-first-channel",
        "fastfilm/ops/cpu.py",
        "        _element(dv, at),\n        dv.shape[1],\n        0,",
        "        _element(dv, 0),\n        dv.shape[1],\n        0,",
        MAPS,
    ),
    Fault(
        "ops-average-always-over-the-padding",
        "fastfilm/ops/views.py",
        "count = kernel if view.count_include_pad else len(inside)",
        "count = kernel",
        MAPS,
    ),
    Fault(
        "ops-nearest-position-in-float64",
        "fastfilm/ops/views.py",
        "(np.float32(x) + shift) * np.float32(step)",
        "(x + float(shift)) * step",
        MAPS,
    ),
    Fault(
        "ops-scale-factor-replaced-by-the-ratio-of-sizes",
        "fastfilm/ops/views.py",
        "length / out if view.scales is None else 1.0 / view.scales[d]",
        "length / out",
        MAPS,
    ),
    Fault(
        "ops-ceil-mode-of-an-average-ignored",
        "fastfilm/ops/maps.py",
        "if ceil_mode or divisor_override is not None:",
        "if divisor_override is not None:",
        MAPS,
    ),
    Fault(
        "ops-dilation-of-a-maximum-ignored",
        "fastfilm/ops/maps.py",
        "if ceil_mode or return_indices or _tuple(dilation, dims) != (1,) * dims:",
        "if ceil_mode or return_indices:",
        MAPS,
    ),
    Fault(
        "ops-antialias-ignored",
        "fastfilm/ops/maps.py",
        "or recompute_scale_factor or antialias:",
        "or recompute_scale_factor:",
        MAPS,
    ),
    Fault(
        "ops-maps-joined-in-another-order",
        "fastfilm/ops/maps.py",
        "for part in self.parts:\n            found +=",
        "for part in self.parts[::-1]:\n            found +=",
        MAPS,
    ),
    Fault(
        "ops-variance-between-processes-left-out",
        "fastfilm/ops/distributed.py",
        "(m2s + counts * (means - centre).square())",
        "m2s",
        "tests/test_distributed.py -k 'sync or batch'",
    ),
    # nn
    Fault(
        "nn-kept-channels-not-scaled",
        "fastfilm/nn/blocks.py",
        "mask = torch.bernoulli(mask).div_(keep)",
        "mask = torch.bernoulli(mask)",
        UNET,
    ),
    Fault(
        "nn-dropout-of-the-second-block-behind-film",
        "fastfilm/nn/blocks.py",
        'self.second = make(out_channels, "end" if order == "conv-norm-film-act" else "film")',
        'self.second = make(out_channels, "end")',
        UNET,
    ),
    Fault(
        "nn-identity-without-its-one",
        "fastfilm/nn/generator.py",
        "else (1 + gamma, beta)",
        "else (gamma, beta)",
        UNET,
    ),
    Fault(
        "nn-beta-for-gamma",
        "fastfilm/nn/generator.py",
        "gamma, beta = out.to(dtype)",
        "beta, gamma = out.to(dtype)",
        UNET,
    ),
    Fault(
        "nn-gate-resized-without-its-corners",
        "fastfilm/nn/attention_gate.py",
        "align_corners=True",
        "align_corners=False",
        UNET,
    ),
    Fault(
        "nn-decoder-resizes-without-its-corners",
        "fastfilm/nn/unet.py",
        "mode=self.upsampling, align_corners=True",
        "mode=self.upsampling, align_corners=False",
        UNET,
    ),
    Fault(
        "nn-film-of-the-neighbouring-level",
        "fastfilm/nn/unet.py",
        "*film[self.depth + 1 + i], deferred=lazy",
        "*film[self.depth + i], deferred=lazy",
        UNET,
    ),
    Fault(
        "nn-heads-of-deep-supervision-swapped",
        "fastfilm/nn/unet.py",
        "self.heads[len(self.heads) - 1 - i](x)",
        "self.heads[i](x)",
        UNET,
    ),
    # convert
    Fault(
        "convert-dropout-keeps-what-it-should-drop",
        "fastfilm/convert/group.py",
        "keep, position = 1 - drop[0], drop[1]",
        "keep, position = drop[0], drop[1]",
        CONVERT,
    ),
    Fault(
        "convert-film-in-front-of-the-activation",
        "fastfilm/convert/group.py",
        'if order == NORM_ACT_FILM and "act" in roles:',
        'if order == NORM_ACT_FILM and "act" not in roles:',
        CONDITION,
    ),
    Fault(
        "convert-slope-of-a-function-ignored",
        "fastfilm/convert/layers.py",
        'return Activation("leaky_relu", negative_slope)',
        'return Activation("leaky_relu", 0.01)',
        "tests/test_convert.py",
    ),
    Fault(
        "convert-alpha-of-elu-ignored",
        "fastfilm/convert/layers.py",
        'nn.ELU: lambda m: Activation("elu", m.alpha)',
        'nn.ELU: lambda m: Activation("elu")',
        "tests/test_convert.py",
    ),
    Fault(
        "convert-rows-of-replicas-cut-short",
        "fastfilm/convert/film.py",
        "size = -(-len(rows) // self.replicas)",
        "size = len(rows) // self.replicas",
        f"{CONDITION} -k replicas",
    ),
)
