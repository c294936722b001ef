"""Faults in fastfilm/segmentation/audit."""

from __future__ import annotations

from tests.planted.fault import Fault

AUDIT = "tests/segmentation/audit/test_audit.py -k 'not command'"

FAULTS = (
    Fault(
        "segmentation-audit-bias-of-v-left-in",
        "fastfilm/segmentation/audit/association.py",
        "chi_square(x, y) - (r - 1) * (c - 1) / (n - 1)",
        "chi_square(x, y)",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-spearman-of-one-side",
        "fastfilm/segmentation/audit/association.py",
        "return np.abs(tested(",
        "return 1 * (tested(",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-leaks-not-told",
        "fastfilm/segmentation/audit/findings.py",
        "finding.value >= LEAK[finding.measure]",
        "finding.value >= 1.1",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-trained-on-the-held-out",
        "fastfilm/segmentation/audit/prediction.py",
        "np.setdiff1d(np.arange(self.n), held)",
        "np.arange(self.n)",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-with-the-training-mean",
        "fastfilm/segmentation/audit/prediction.py",
        "return slope @ target\n",
        "return slope @ target + mean @ target\n",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-common-classes-preferred",
        "fastfilm/segmentation/audit/prediction.py",
        "slope @ one / prior",
        "slope @ one",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-permutations-without-the-truth",
        "fastfilm/segmentation/audit/prediction.py",
        "(as_high + 1) / (done + 1)",
        "as_high / done",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-missing-is-the-first-value",
        "fastfilm/segmentation/audit/questions.py",
        "~column.there(), [",
        "column.there() & ~column.there(), [",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-all-cases-of-one-visit",
        "fastfilm/segmentation/audit/rows.py",
        "drawn.append(mine[int(rng.integers(len(mine)))])",
        "drawn.append(mine[0])",
        AUDIT,
    ),
    Fault(
        "segmentation-audit-volumes-in-voxels",
        "fastfilm/segmentation/audit/rows.py",
        " * np.prod(f.spacing) / 1000",
        "",
        AUDIT,
    ),
)
