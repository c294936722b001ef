"""Faults in fastfilm/segmentation: metrics, statistics, prediction, counterfactuals."""

from __future__ import annotations

from tests.planted.fault import Fault

METRICS = (
    "tests/segmentation/evaluation/test_metrics.py tests/segmentation/evaluation/test_folder.py "
    "-k 'test_metrics.py or empty or surface_dice'"
)
STATISTICS = "tests/segmentation/evaluation/test_statistics.py"
WINDOWS = "tests/segmentation/prediction/test_windows.py"
INFERENCE = (
    "tests/segmentation/prediction/test_one_case.py tests/segmentation/prediction/test_many_cases.py "
    "-k 'test_inference.py or planes or mirrored or dropout'"
)

FAULTS = (
    # metrics and statistics
    Fault(
        "segmentation-metrics-hd95-is-the-maximum",
        "fastfilm/segmentation/evaluation/metrics.py",
        "percentile=95,",
        "percentile=100,",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-hd95-in-voxels",
        "fastfilm/segmentation/evaluation/metrics.py",
        "percentile=95, spacing=scale",
        "percentile=95",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-hd95-of-an-empty-mask-between-centres",
        "fastfilm/segmentation/evaluation/metrics.py",
        "* truth.shape\n",
        "* (np.array(truth.shape) - 1)\n",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-dice-of-two-empty-masks-is-1",
        "fastfilm/segmentation/evaluation/metrics.py",
        "2 * tp / (n_pred + n_ref) if some else None",
        "2 * tp / (n_pred + n_ref) if some else 1.0",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-tolerance-of-the-surface-ignored",
        "fastfilm/segmentation/evaluation/metrics.py",
        "[tolerance]",
        "[1.0]",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-surface-counted-in-voxels",
        "fastfilm/segmentation/evaluation/metrics.py",
        "use_subvoxels=True",
        "use_subvoxels=False",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-sign-of-the-volume-error",
        "fastfilm/segmentation/evaluation/metrics.py",
        "(n_pred - n_ref) * ml",
        "(n_ref - n_pred) * ml",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-volume-error-relative-to-the-prediction",
        "fastfilm/segmentation/evaluation/metrics.py",
        "(n_pred - n_ref) / n_ref if n_ref else None",
        "(n_pred - n_ref) / n_pred if n_pred else None",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-false-lesions-counted-by-the-truth",
        "fastfilm/segmentation/evaluation/metrics.py",
        "real = len(np.unique(pred[",
        "real = len(np.unique(true[",
        METRICS,
    ),
    Fault(
        "segmentation-metrics-lesion-f1-is-the-mean",
        "fastfilm/segmentation/evaluation/metrics.py",
        "2 * s * p / (s + p)",
        "(s + p) / 2",
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
        "segmentation-statistics-bootstrap-of-cases",
        "fastfilm/segmentation/evaluation/statistics.py",
        "    names = {s: i",
        "    subjects = [str(i) for i in range(len(values))]\n    names = {s: i",
        STATISTICS,
    ),
    Fault(
        "segmentation-statistics-bootstrap-forgets-how-many-cases",
        "fastfilm/segmentation/evaluation/statistics.py",
        "/ counts[drawn].sum(1)",
        "/ counts.sum()",
        STATISTICS,
    ),
    Fault(
        "segmentation-statistics-interval-of-90-percent",
        "fastfilm/segmentation/evaluation/statistics.py",
        "(2.5, 97.5)",
        "(5, 95)",
        STATISTICS,
    ),
    Fault(
        "segmentation-statistics-sides-swapped",
        "fastfilm/segmentation/evaluation/statistics.py",
        'p_greater=p["greater"]',
        'p_greater=p["less"]',
        STATISTICS,
    ),
    Fault(
        "segmentation-statistics-effect-by-signed-ranks",
        "fastfilm/segmentation/evaluation/statistics.py",
        "rankdata(np.abs(moved))",
        "rankdata(moved)",
        STATISTICS,
    ),
    Fault(
        "segmentation-statistics-ties-of-the-effect-counted",
        "fastfilm/segmentation/evaluation/statistics.py",
        "moved = d[d != 0]",
        "moved = d",
        STATISTICS,
    ),
    Fault(
        "segmentation-statistics-interval-of-one-subject",
        "fastfilm/segmentation/evaluation/statistics.py",
        "len(set(subjects)) < 2",
        "len(subjects) < 2",
        STATISTICS,
    ),
    Fault(
        "segmentation-statistics-pairs-not-parted-by-subject",
        "fastfilm/segmentation/evaluation/statistics.py",
        "_interval(d, whose, seed)",
        "_interval(d, [str(i) for i in range(len(d))], seed)",
        STATISTICS,
    ),
    # prediction
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
)
