"""Faults in fastfilm/segmentation/evaluation."""

from __future__ import annotations

from tests.planted.fault import Fault

COUNTERFACTUAL = "tests/segmentation/evaluation/test_true_by_fed.py"
METRICS = (
    "tests/segmentation/evaluation/test_metrics.py tests/segmentation/evaluation/test_folder.py "
    "-k 'test_metrics.py or empty or surface_dice'"
)
STATISTICS = "tests/segmentation/evaluation/test_statistics.py"

FAULTS = (
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
        "segmentation-pairs-predictions-that-are-not-there",
        "fastfilm/segmentation/evaluation/pairs.py",
        "if case not in known.cases]",
        "if not case]",
        "tests/segmentation/commands/test_bad_inputs.py -k without_a_prediction",
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
    Fault(
        "segmentation-holm-falls",
        "fastfilm/segmentation/evaluation/statistics.py",
        "largest = max(largest, min(1.0, (len(given) - rank) * value))",
        "largest = min(1.0, (len(given) - rank) * value)",
        "tests/segmentation/evaluation/test_statistics.py",
    ),
    Fault(
        "segmentation-counterfactual-sign-of-the-difference",
        "fastfilm/segmentation/evaluation/true_by_fed.py",
        "[dice[group][k][0] for k in both], [d[k][0] for k in both]",
        "[d[k][0] for k in both], [dice[group][k][0] for k in both]",
        COUNTERFACTUAL,
    ),
    Fault(
        "segmentation-counterfactual-empty-masks-differ",
        "fastfilm/segmentation/evaluation/true_by_fed.py",
        "if total else 1.0",
        "if total else 0.0",
        COUNTERFACTUAL,
    ),
    Fault(
        "segmentation-counterfactual-rows-of-all-cases",
        "fastfilm/segmentation/evaluation/true_by_fed.py",
        "if e.pair.case in names",
        "if names",
        COUNTERFACTUAL,
    ),
    Fault(
        "segmentation-counterfactual-first-two-values-only",
        "fastfilm/segmentation/evaluation/true_by_fed.py",
        "itertools.combinations(masks, 2)",
        "itertools.combinations(masks[:2], 2)",
        COUNTERFACTUAL,
    ),
)
