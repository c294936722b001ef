"""Faults in fastfilm/segmentation: vectors, DICOM headers, the mean over missing metadata."""

from __future__ import annotations

from tests.planted.fault import Fault

VECTORS = "tests/segmentation/metadata/test_vectors.py"
DICOM = "tests/segmentation/metadata/test_dicom.py"
AVERAGING = "tests/segmentation/prediction/test_averaging.py"

FAULTS = (
    # vectors
    Fault(
        "segmentation-vectors-constant-components-vary",
        "fastfilm/segmentation/metadata/vectors.py",
        "        std[std <= CONSTANT * np.abs(mean)] = 0\n",
        "        std[std == 0] = 1\n",
        VECTORS,
    ),
    Fault(
        "segmentation-vectors-projection-of-any-variance",
        "fastfilm/segmentation/metadata/vectors.py",
        "(np.sqrt(len(rows)) / s[:projection])[:, None]",
        "1",
        VECTORS,
    ),
    Fault(
        "segmentation-vectors-sign-as-it-comes",
        "fastfilm/segmentation/metadata/vectors.py",
        "np.sign(axes[np.arange(projection), largest])[:, None]",
        "1",
        VECTORS,
    ),
    Fault(
        "segmentation-vectors-columns-sorted-by-name",
        "fastfilm/segmentation/metadata/vectors.py",
        "fits = [c for c in columns if",
        "fits = [c for c in sorted(columns) if",
        VECTORS,
    ),
    Fault(
        "segmentation-vectors-pickles-are-read",
        "fastfilm/segmentation/metadata/vectors.py",
        'mmap_mode="r", allow_pickle=False',
        "allow_pickle=True",
        VECTORS,
    ),
    Fault(
        "segmentation-vectors-changed-file-not-noticed",
        "fastfilm/segmentation/training/fold.py",
        "        wrong += case.changed_vectors()\n",
        "",
        VECTORS,
    ),
    Fault(
        "segmentation-vectors-some-columns-missing-is-all-missing",
        "fastfilm/segmentation/data/sources.py",
        "    if gone:\n",
        "    if False:\n",
        VECTORS,
    ),
    Fault(
        "segmentation-vectors-fine-tuned-with-other-columns",
        "fastfilm/segmentation/training/finetuning.py",
        "if fitted.table_columns != theirs:",
        "if len(fitted.table_columns) != len(theirs):",
        VECTORS,
    ),
    # DICOM headers
    Fault(
        "segmentation-dicom-times-in-milliseconds",
        "fastfilm/segmentation/metadata/dicom.py",
        "x / 1000 if keyword in IN_SECONDS else x",
        "x",
        DICOM,
    ),
    Fault(
        "segmentation-dicom-all-numbers-by-1000",
        "fastfilm/segmentation/metadata/dicom.py",
        "x / 1000 if keyword in IN_SECONDS else x",
        "x / 1000",
        DICOM,
    ),
    Fault(
        "segmentation-dicom-last-file-not-compared",
        "fastfilm/segmentation/metadata/dicom.py",
        "        if a != b:\n",
        "        if False:\n",
        DICOM,
    ),
    Fault(
        "segmentation-dicom-folder-of-the-subject",
        "fastfilm/segmentation/metadata/dicom.py",
        "(folder / stem, folder",
        "(folder / stem, folder.parent, folder",
        DICOM,
    ),
    # the mean over missing metadata
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
        "segmentation-averaging-quantiles-between-values",
        "fastfilm/segmentation/metadata/encoder.py",
        ', method="inverted_cdf"',
        "",
        AVERAGING,
    ),
    Fault(
        "segmentation-averaging-stale-map-stays",
        "fastfilm/segmentation/prediction/many_cases.py",
        "replace(case, metadata={}),",
        "case,",
        AVERAGING,
    ),
)
