"""Faults in fastfilm/segmentation/metadata."""

from __future__ import annotations

from tests.planted.fault import Fault

ENCODER = "tests/segmentation/metadata/test_encoder.py tests/segmentation/metadata/test_metadata.py"
VECTORS = "tests/segmentation/metadata/test_vectors.py"
DICOM = "tests/segmentation/metadata/test_dicom.py"
AVERAGING = "tests/segmentation/prediction/test_averaging.py"

FAULTS = (
    Fault(
        "segmentation-density-edges-in-deviations",
        "fastfilm/segmentation/metadata/density.py",
        "edges * std + mean",
        "edges * std",
        ENCODER,
    ),
    Fault(
        "segmentation-density-single-values-are-bins",
        "fastfilm/segmentation/metadata/density.py",
        "counts[small] >= SMALLEST * len(z)",
        "counts[small] >= 0",
        ENCODER,
    ),
    Fault(
        "segmentation-density-bandwidth-of-the-fitted-values",
        "fastfilm/segmentation/metadata/density.py",
        "z[fold != k], w)",
        "z, w)",
        ENCODER,
    ),
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
    Fault(
        "segmentation-encoder-unknown-in-the-first-column",
        "fastfilm/segmentation/metadata/encoder.py",
        "row[-1] = 1",
        "row[0] = 1",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-ordered-as-categories",
        "fastfilm/segmentation/metadata/encoder.py",
        "row[:i] = 1",
        "row[max(i - 1, 0) : i] = 1",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-first-of-several-labels",
        "fastfilm/segmentation/metadata/encoder.py",
        "for name in names:\n            if name not in",
        "for name in names[:1]:\n            if name not in",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-separator-ignored",
        "fastfilm/segmentation/metadata/encoder.py",
        "split(self.separator)",
        'split(";")',
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-logarithm-left-out",
        "fastfilm/segmentation/metadata/encoder.py",
        "math.log(x) if self.log else x",
        "x",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-one-number-divides-by-0",
        "fastfilm/segmentation/metadata/encoder.py",
        "std if std > 1e-9 * abs(mean) else 1.0",
        "std or 1.0",
        "tests/segmentation/commands/test_slips.py -k rounding",
    ),
    Fault(
        "segmentation-encoder-edge-in-the-bin-below",
        "fastfilm/segmentation/metadata/encoder.py",
        'side="right"',
        'side="left"',
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-hidden-values-are-seen",
        "fastfilm/segmentation/metadata/encoder.py",
        "None if k.name in hide else values.get(k.name)",
        "values.get(k.name)",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-keys-hidden-together",
        "fastfilm/segmentation/metadata/encoder.py",
        "if x < k.dropout",
        "if draws[0] < k.dropout",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-unseen-is-unknown",
        "fastfilm/segmentation/metadata/encoder.py",
        'self.unseen == "unknown" and self.unknown',
        "self.unknown",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-number-not-centred",
        "fastfilm/segmentation/metadata/encoder.py",
        "(x - self.mean) / self.std",
        "x / self.std",
        ENCODER,
    ),
    Fault(
        "segmentation-encoder-grows-at-another-column",
        "fastfilm/segmentation/metadata/encoder.py",
        "offset + key.known_width",
        "offset + key.width",
        ENCODER,
    ),
    Fault(
        "segmentation-metadata-a-value-that-is-a-spelling",
        "fastfilm/segmentation/metadata/encoder.py",
        "if text in (key.values or ()):",
        "if False:",
        "tests/segmentation/metadata/test_metadata.py",
    ),
    Fault(
        "segmentation-averaging-quantiles-between-values",
        "fastfilm/segmentation/metadata/encoder.py",
        ', method="inverted_cdf"',
        "",
        AVERAGING,
    ),
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
)
