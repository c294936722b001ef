"""Faults in fastfilm/segmentation/images."""

from __future__ import annotations

from tests.planted.fault import Fault

PREPROCESSING = (
    "tests/segmentation/images/test_preprocessing.py tests/segmentation/data/test_data_sets.py "
    "-k 'test_preprocessing.py or orientation'"
)
VOLUMES = "tests/segmentation/images/test_volumes.py"

FAULTS = (
    Fault(
        "segmentation-labels-truncated",
        "fastfilm/segmentation/images/labels.py",
        "whole = np.rint(array)",
        "whole = np.trunc(array)",
        VOLUMES,
    ),
    Fault(
        "segmentation-labels-soft-above-zero",
        "fastfilm/segmentation/images/labels.py",
        "(array >= 0.5)",
        "(array > 0)",
        VOLUMES,
    ),
    Fault(
        "segmentation-labels-soft-of-any-range",
        "fastfilm/segmentation/images/labels.py",
        "and array.max() <= 1 + NEARLY:",
        "and array.max() <= 2 + NEARLY:",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-checksum-not-reached",
        "fastfilm/segmentation/images/nifti.py",
        "while chunk := file.read(1 << 20):",
        "while chunk := b'':",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-unit-ignored",
        "fastfilm/segmentation/images/nifti.py",
        "affine[:3] *= MILLIMETRES.get(_unit(image), 1.0)",
        "affine[:3] *= 1.0",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-microns-are-millimetres",
        "fastfilm/segmentation/images/nifti.py",
        "3: 0.001}",
        "3: 1.0}",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-the-unit-scales-the-last-row-too",
        "fastfilm/segmentation/images/nifti.py",
        "affine[:3] *= M",
        "affine[:] *= M",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-absurd-below-zero",
        "fastfilm/segmentation/images/nifti.py",
        "max(float(array.max()), -float(array.min()))",
        "float(array.max())",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-memory-not-asked",
        "fastfilm/segmentation/images/nifti.py",
        "if voxels * each > there:",
        "if voxels > there:",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-oblique-is-sheared",
        "fastfilm/segmentation/images/nifti.py",
        "cosines = axes.T @ axes",
        "cosines = axes @ axes",
        VOLUMES,
    ),
    Fault(
        "segmentation-preprocessing-way-back-without-flips",
        "fastfilm/segmentation/images/preprocessing.py",
        "        array = np.flip(array, tuple(1 + np.flatnonzero(self.flips)))\n",
        "",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-way-back-in-the-order-of-the-way-there",
        "fastfilm/segmentation/images/preprocessing.py",
        "np.argsort(self.axes)",
        "self.axes",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-value-outside-of-the-crop",
        "fastfilm/segmentation/images/preprocessing.py",
        "outside, array.dtype",
        "0, array.dtype",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-corners-aligned",
        "fastfilm/segmentation/images/preprocessing.py",
        "align_corners=False",
        "align_corners=True",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-masks-grow",
        "fastfilm/segmentation/images/preprocessing.py",
        "geometry.grid) >= 0.5)",
        "geometry.grid) > 0)",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-box-one-voxel-short",
        "fastfilm/segmentation/images/preprocessing.py",
        "[(s.start, s.stop) for s in found]",
        "[(s.start, max(s.stop - 1, 1)) for s in found]",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-box-of-the-last-channel",
        "fastfilm/segmentation/images/preprocessing.py",
        "occupied |= ",
        "occupied = ",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-spacing-as-wanted",
        "fastfilm/segmentation/images/preprocessing.py",
        "now * n / new, new",
        "wanted, new",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-voxels-cut-off",
        "fastfilm/segmentation/images/preprocessing.py",
        "round(n * now / wanted)",
        "int(n * now / wanted)",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-planes-turned",
        "fastfilm/segmentation/images/preprocessing.py",
        "*(a for a in range(3) if a != self.slice_axis)",
        "*(a for a in (2, 1, 0) if a != self.slice_axis)",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-ct-not-clipped",
        "fastfilm/segmentation/images/preprocessing.py",
        "np.clip(x, self.low, self.high)",
        "x",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-ct-deviation-ignored",
        "fastfilm/segmentation/images/preprocessing.py",
        "/ np.float32(self.std)",
        "/ np.float32(1)",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-statistics-with-the-background",
        "fastfilm/segmentation/images/preprocessing.py",
        "values = x[inside]",
        "values = x.ravel()",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-background-moves",
        "fastfilm/segmentation/images/preprocessing.py",
        "np.where(inside, out, np.float32(0))",
        "out",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-percentiles-not-clipped",
        "fastfilm/segmentation/images/preprocessing.py",
        "x, values = np.clip(x, low, high), np.clip(values, low, high)",
        "values = np.clip(values, low, high)",
        PREPROCESSING,
    ),
    Fault(
        "segmentation-preprocessing-minmax-to-the-mean",
        "fastfilm/segmentation/images/preprocessing.py",
        "float(values.min()), float(values.max() - values.min())",
        "float(values.mean()), float(values.max() - values.min())",
        PREPROCESSING,
    ),
)
