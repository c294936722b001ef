"""Faults in fastfilm/segmentation: files, tables, names, locks, and what belongs together."""

from __future__ import annotations

from tests.planted.fault import Fault

VOLUMES = "tests/segmentation/images/test_volumes.py"
TABLES = "tests/segmentation/support/test_tables.py"
PLANS = "tests/segmentation/data/test_data_sets.py"
FOLDERS = "tests/segmentation/models/test_folder.py"
BAD = "tests/segmentation/commands/test_bad_data_sets.py"

FAULTS = (
    # volumes and labels
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
    # tables, sidecars, names
    Fault(
        "segmentation-tables-short-rows-filled",
        "fastfilm/segmentation/support/tables.py",
        "if len(cells) != len(columns):",
        "if len(cells) > len(columns):",
        TABLES,
    ),
    Fault(
        "segmentation-tables-a-column-twice",
        "fastfilm/segmentation/support/tables.py",
        "cells.count(c) > 1})",
        "cells.count(c) > 2})",
        TABLES,
    ),
    Fault(
        "segmentation-sidecars-the-farthest-wins",
        "fastfilm/segmentation/data/sidecars.py",
        "for folder in reversed(levels):",
        "for folder in levels:",
        TABLES,
    ),
    Fault(
        "segmentation-sidecars-of-other-entities",
        "fastfilm/segmentation/data/sidecars.py",
        "have.issuperset(theirs.items())",
        "bool(have)",
        TABLES,
    ),
    Fault(
        "segmentation-sidecars-of-other-suffixes",
        "fastfilm/segmentation/data/sidecars.py",
        "if last == suffix and",
        "if last and",
        TABLES,
    ),
    Fault(
        "segmentation-yaml-the-last-of-two-keys",
        "fastfilm/segmentation/support/yaml_files.py",
        "if key.value in seen:",
        "if False:",
        TABLES,
    ),
    Fault(
        "segmentation-names-a-slash-stays",
        "fastfilm/segmentation/support/names.py",
        r"[^\w.=+()-]",
        r"[^\w.=+()/-]",
        TABLES,
    ),
    Fault(
        "segmentation-names-two-become-one",
        "fastfilm/segmentation/support/names.py",
        '"".join(f"%{b:02X}" for b in match[0].encode("utf-8", "surrogatepass"))',
        '"_"',
        TABLES,
    ),
    Fault(
        "segmentation-metadata-a-value-that-is-a-spelling",
        "fastfilm/segmentation/metadata/encoder.py",
        "if text in (key.values or ()):",
        "if False:",
        "tests/segmentation/metadata/test_metadata.py",
    ),
    # what belongs together
    Fault(
        "segmentation-plan-digests-not-compared",
        "fastfilm/segmentation/data/plan.py",
        "if there != digest:",
        "if not there:",
        PLANS,
    ),
    Fault(
        "segmentation-plan-files-one-by-one",
        "fastfilm/segmentation/data/plan.py",
        "stack.enter_context(atomic(folder / name)).write_text(texts[name], encoding=",
        "(folder / name).write_text(texts[name], encoding=",
        PLANS,
    ),
    Fault(
        "segmentation-plan-exclusions-that-match-nothing",
        "fastfilm/segmentation/data/datasets.py",
        "if name not in found.excluded:",
        "if False:",
        PLANS,
    ),
    Fault(
        "segmentation-plan-annexed-labels-count-as-missing",
        "fastfilm/segmentation/data/datasets.py",
        "if os.path.lexists(p)]",
        "if p.exists()]",
        BAD,
    ),
    Fault(
        "segmentation-plan-demands-not-asked",
        "fastfilm/segmentation/data/decisions.py",
        "if most > there:",
        "if False:",
        BAD,
    ),
    Fault(
        "segmentation-model-weights-of-another-model",
        "fastfilm/segmentation/support/files.py",
        "checksum != _checksum(tensors, about)",
        "not checksum",
        FOLDERS,
    ),
    Fault(
        "segmentation-prediction-of-another-image-of-that-name",
        "fastfilm/segmentation/prediction/many_cases.py",
        'and entry.get("stamps") == _stamps(case)',
        "and True",
        "tests/segmentation/prediction/test_many_cases.py -k continue",
    ),
    Fault(
        "segmentation-pairs-predictions-that-are-not-there",
        "fastfilm/segmentation/evaluation/pairs.py",
        "if case not in known.cases]",
        "if not case]",
        "tests/segmentation/commands/test_bad_inputs.py -k without_a_prediction",
    ),
)
