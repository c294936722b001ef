"""Faults in fastfilm/segmentation/prediction."""

from __future__ import annotations

from tests.planted.fault import Fault

METRICS = (
    "tests/segmentation/evaluation/test_metrics.py tests/segmentation/evaluation/test_folder.py "
    "-k 'test_metrics.py or empty or surface_dice'"
)
SWAP = "tests/segmentation/prediction/test_many_cases.py -k swap"
AVERAGING = "tests/segmentation/prediction/test_averaging.py"
WINDOWS = "tests/segmentation/prediction/test_windows.py"
INFERENCE = (
    "tests/segmentation/prediction/test_one_case.py tests/segmentation/prediction/test_many_cases.py "
    "-k 'test_one_case.py or planes or mirrored or dropout'"
)

FAULTS = (
    Fault(
        "segmentation-averaging-equal-weights",
        "fastfilm/segmentation/prediction/averaging.py",
        "shares.get(value, 0.0) + count / total",
        "shares.get(value, 0.0) + 1 / len(values)",
        AVERAGING,
    ),
    Fault(
        "segmentation-averaging-prior-as-it-is-written",
        "fastfilm/segmentation/prediction/averaging.py",
        "(value, weight / total)",
        "(value, weight)",
        AVERAGING,
    ),
    Fault(
        "segmentation-averaging-known-values-are-averaged",
        "fastfilm/segmentation/prediction/averaging.py",
        "[n for n in names if is_missing(values.get(n), model.encoder[n])]",
        "names",
        AVERAGING,
    ),
    Fault(
        "segmentation-prediction-of-another-image-of-that-name",
        "fastfilm/segmentation/prediction/many_cases.py",
        'and entry.get("stamps") == _stamps(case)',
        "and True",
        "tests/segmentation/prediction/test_many_cases.py -k continue",
    ),
    Fault(
        "segmentation-averaging-stale-map-stays",
        "fastfilm/segmentation/prediction/many_cases.py",
        "replace(case, metadata={}),",
        "case,",
        AVERAGING,
    ),
    Fault(
        "segmentation-averaging-entropy-of-the-mean-alone",
        "fastfilm/segmentation/prediction/one_case.py",
        "(_entropies(mean, exclusive) - within)",
        "_entropies(mean, exclusive)",
        AVERAGING,
    ),
    Fault(
        "segmentation-averaging-summed-over-labels",
        "fastfilm/segmentation/prediction/one_case.py",
        "- within).amax(1",
        "- within).sum(1",
        AVERAGING,
    ),
    Fault(
        "segmentation-inference-tie-not-to-the-background",
        "fastfilm/segmentation/prediction/one_case.py",
        "highest > background if exclusive",
        "highest >= background if exclusive",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-one-half-is-not-on",
        "fastfilm/segmentation/prediction/one_case.py",
        "return p >= 0.5, strongest",
        "return p > 0.5, strongest",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-planes-not-between",
        "fastfilm/segmentation/prediction/one_case.py",
        "t = np.float32(where[wanted] - low)",
        "t = np.float32(round(where[wanted] - low))",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-planes-from-their-edges",
        "fastfilm/segmentation/prediction/one_case.py",
        "(np.arange(depth) + 0.5) * geometry.grid[0] / depth - 0.5",
        "np.arange(depth) * geometry.grid[0] / depth",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-dropout-stays-on",
        "fastfilm/segmentation/prediction/one_case.py",
        "m.dropout_in_evaluation = False",
        "m.dropout_in_evaluation = True",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-training-mode-for-all",
        "fastfilm/segmentation/prediction/one_case.py",
        "            m.train()\n",
        "            network.train()\n",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-one-draw-for-all-samples",
        "fastfilm/segmentation/prediction/one_case.py",
        "self.options.seed + i",
        "self.options.seed",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-mirrored-not-back",
        "fastfilm/segmentation/prediction/one_case.py",
        "p = p.flip(dims) if dims else p",
        "p = p",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-entropy-without-the-background",
        "fastfilm/segmentation/prediction/one_case.py",
        "torch.cat([p, rest], 1)",
        "p",
        INFERENCE,
    ),
    Fault(
        "segmentation-inference-entropy-summed-over-labels",
        "fastfilm/segmentation/prediction/one_case.py",
        "_entropies(p, exclusive).amax(1, keepdim=True)",
        "_entropies(p, exclusive).sum(1, keepdim=True)",
        INFERENCE,
    ),
    Fault(
        "segmentation-postprocessing-largest-is-the-background",
        "fastfilm/segmentation/prediction/postprocessing.py",
        "    sizes[0] = 0\n",
        "",
        METRICS,
    ),
    Fault(
        "segmentation-postprocessing-last-of-equals",
        "fastfilm/segmentation/prediction/postprocessing.py",
        "int(sizes.argmax())",
        "len(sizes) - 1 - int(sizes[::-1].argmax())",
        METRICS,
    ),
    Fault(
        "segmentation-postprocessing-holes-open-at-corners-stay",
        "fastfilm/segmentation/prediction/postprocessing.py",
        "binary_fill_holes(mask)",
        "binary_fill_holes(mask, np.ones((3,) * mask.ndim))",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-lesions-by-faces",
        "fastfilm/segmentation/prediction/postprocessing.py",
        "structure=np.ones((3,) * mask.ndim, int)",
        "structure=None",
        METRICS,
    ),
    Fault(
        "segmentation-swap-unknown-left-out",
        "fastfilm/segmentation/prediction/swap.py",
        "[None] if encoder.unknown else []",
        "[]",
        SWAP,
    ),
    Fault(
        "segmentation-windows-overlap-for-the-rest",
        "fastfilm/segmentation/prediction/windows.py",
        "window * (1 - overlap)",
        "window * overlap",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-one-too-few",
        "fastfilm/segmentation/prediction/windows.py",
        "int(np.ceil((size - window) / step)) + 1",
        "int((size - window) / step) + 1",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-weights-off-centre",
        "fastfilm/segmentation/prediction/windows.py",
        "- (window - 1) / 2",
        "- window / 2",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-weights-too-wide",
        "fastfilm/segmentation/prediction/windows.py",
        "(window / 8)",
        "(window / 4)",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-corners-without-weight",
        "fastfilm/segmentation/prediction/windows.py",
        "clamp_min(1e-3)",
        "clamp_min(1e-7)",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-padded-at-the-end",
        "fastfilm/segmentation/prediction/windows.py",
        "max(0, p - n) // 2",
        "max(0, p - n) // 4",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-padded-along-other-axes",
        "fastfilm/segmentation/prediction/windows.py",
        "zip(reversed(before), reversed(after)",
        "zip(before, after",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-padding-handed-on",
        "fastfilm/segmentation/prediction/windows.py",
        "first - before[0], planes[:, first - low : last - low,",
        "first - before[0], planes[:, : last - first,",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-planes-of-before-stay",
        "fastfilm/segmentation/prediction/windows.py",
        "channel[max(kept, 0) :] = 0",
        "pass",
        WINDOWS,
    ),
    Fault(
        "segmentation-windows-totals-along-the-depth-of-the-first-plane",
        "fastfilm/segmentation/prediction/windows.py",
        "totals[0][low:following]",
        "totals[0][: following - low]",
        WINDOWS,
    ),
)
