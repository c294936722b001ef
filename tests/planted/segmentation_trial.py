"""Faults in fastfilm/segmentation/trial: statistics, results, verdict, page."""

from __future__ import annotations

from tests.planted.fault import Fault

STATISTICS = "tests/segmentation/trial/test_statistics.py"
RESULTS = "tests/segmentation/trial/test_results.py"
VERDICT = "tests/segmentation/trial/test_verdict.py"
PAGE = "tests/segmentation/trial/test_page.py -k 'not drawn'"

FAULTS = (
    Fault(
        "segmentation-trial-training-noise-forgotten",
        "fastfilm/segmentation/trial/statistics.py",
        "max(v_units + v_runs - v_both, v_units, v_runs)",
        "v_units",
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-shared-noise-counted-twice",
        "fastfilm/segmentation/trial/statistics.py",
        "max(v_units + v_runs - v_both, v_units, v_runs)",
        "v_units + v_runs",
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-normal-quantile",
        "fastfilm/segmentation/trial/statistics.py",
        "reach = float(stats.t.ppf(0.975, df)) * error",
        "reach = float(stats.norm.ppf(0.975)) * error",
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-bootstrap-draws-all-seeds",
        "fastfilm/segmentation/trial/statistics.py",
        "drawn = rng.multinomial(n - 1, np.full(n, 1 / n), size)\n    return drawn * np.float64(n / (n - 1))",
        "return rng.multinomial(n, np.full(n, 1 / n), size) * np.float64(1)",
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-bootstrap-forgets-how-many-cases",
        "fastfilm/segmentation/trial/statistics.py",
        " / (drawn_units @ share)",
        "",
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-p-is-the-smallest",
        "fastfilm/segmentation/trial/statistics.py",
        "max(p_t, p_runs, p_units)",
        "min(p_t, p_runs, p_units)",
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-clusters-share-subjects",
        "fastfilm/segmentation/trial/statistics.py",
        "return _index(found[subject])",
        'return _index(["" if c is None else c for c in clusters])',
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-drawn-flips-without-the-found-one",
        "fastfilm/segmentation/trial/statistics.py",
        ".sum()) + 1) / (FLIPS + 1)",
        ".sum())) / FLIPS",
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
        "segmentation-trial-seeds-needed-shrink-all",
        "fastfilm/segmentation/trial/statistics.py",
        "_decides(distance, v_units, v_runs / k, v_both / k,",
        "_decides(distance, v_units / k, v_runs / k, v_both / k,",
        STATISTICS,
    ),
    Fault(
        "segmentation-trial-undefined-dice-by-run",
        "fastfilm/segmentation/trial/results.py",
        "defined = np.all([np.isfinite(v).all(1)",
        "defined = np.any([np.isfinite(v).any(1)",
        RESULTS,
    ),
    Fault(
        "segmentation-trial-true-value-among-the-wrong",
        "fastfilm/segmentation/trial/results.py",
        "t is not None and t != value for t in true",
        "t is not None for t in true",
        RESULTS,
    ),
    Fault(
        "segmentation-trial-calibration-of-bins-not-weighted",
        "fastfilm/segmentation/trial/results.py",
        "np.abs(bins[:, 1] - bins[:, 2]).sum() / count",
        "np.abs((bins[:, 1] - bins[:, 2]) / bins[:, 0]).sum()",
        RESULTS,
    ),
    Fault(
        "segmentation-trial-run-of-another-design",
        "fastfilm/segmentation/trial/scores.py",
        "if run.design != design.sha256:",
        "if False:",
        RESULTS,
    ),
    Fault(
        "segmentation-trial-verdict-without-the-margin",
        "fastfilm/segmentation/trial/verdict.py",
        " and p.mean >= self.margin",
        "",
        VERDICT,
    ),
    Fault(
        "segmentation-trial-verdict-without-shuffled",
        "fastfilm/segmentation/trial/verdict.py",
        '        if s.superior:\n            return "use it"',
        '        if True:\n            return "use it"',
        VERDICT,
    ),
    Fault(
        "segmentation-trial-verdict-of-one-seed",
        "fastfilm/segmentation/trial/verdict.py",
        "    if little:\n        return",
        "    if False:\n        return",
        VERDICT,
    ),
    Fault(
        "segmentation-trial-page-names-not-escaped",
        "fastfilm/segmentation/trial/page.py",
        "<li>{html.escape(x)}</li>",
        "<li>{x}</li>",
        PAGE,
    ),
    Fault(
        "segmentation-trial-page-cost-of-a-wrong-value-turned",
        "fastfilm/segmentation/trial/page.py",
        "{signed(-row['mean'])}",
        "{signed(row['mean'])}",
        PAGE,
    ),
)
