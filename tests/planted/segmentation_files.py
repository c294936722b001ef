"""Faults in fastfilm/segmentation: files, tables, names, locks, and what belongs together."""

from __future__ import annotations

from tests.planted.fault import Fault

VOLUMES = "tests/segmentation/test_volumes.py"
TABLES = "tests/segmentation/test_tables.py"
PLANS = "tests/segmentation/test_data.py"
FOLDERS = "tests/segmentation/test_model_folder.py"
BAD = "tests/segmentation/test_bad_data_sets.py"

FAULTS = (
    # volumes and labels
    Fault(
        "segmentation-volumes-checksum-not-reached",
        "fastfilm/segmentation/volumes.py",
        "while chunk := file.read(1 << 20):",
        "while chunk := b'':",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-unit-ignored",
        "fastfilm/segmentation/volumes.py",
        "affine[:3] *= MILLIMETRES.get(_unit(image), 1.0)",
        "affine[:3] *= 1.0",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-microns-are-millimetres",
        "fastfilm/segmentation/volumes.py",
        "3: 0.001}",
        "3: 1.0}",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-the-unit-scales-the-last-row-too",
        "fastfilm/segmentation/volumes.py",
        "affine[:3] *= M",
        "affine[:] *= M",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-absurd-below-zero",
        "fastfilm/segmentation/volumes.py",
        "max(float(array.max()), -float(array.min()))",
        "float(array.max())",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-memory-not-asked",
        "fastfilm/segmentation/volumes.py",
        "if voxels * each > there:",
        "if voxels > there:",
        VOLUMES,
    ),
    Fault(
        "segmentation-volumes-oblique-is-sheared",
        "fastfilm/segmentation/volumes.py",
        "cosines = axes.T @ axes",
        "cosines = axes @ axes",
        VOLUMES,
    ),
    Fault(
        "segmentation-labels-truncated",
        "fastfilm/segmentation/labels.py",
        "whole = np.rint(array)",
        "whole = np.trunc(array)",
        VOLUMES,
    ),
    Fault(
        "segmentation-labels-soft-above-zero",
        "fastfilm/segmentation/labels.py",
        "(array >= 0.5)",
        "(array > 0)",
        VOLUMES,
    ),
    Fault(
        "segmentation-labels-soft-of-any-range",
        "fastfilm/segmentation/labels.py",
        "and array.max() <= 1 + NEARLY:",
        "and array.max() <= 2 + NEARLY:",
        VOLUMES,
    ),
    # tables, sidecars, names
    Fault(
        "segmentation-tables-short-rows-filled",
        "fastfilm/segmentation/tables.py",
        "if len(cells) != len(columns):",
        "if len(cells) > len(columns):",
        TABLES,
    ),
    Fault(
        "segmentation-tables-a-column-twice",
        "fastfilm/segmentation/tables.py",
        "cells.count(c) > 1})",
        "cells.count(c) > 2})",
        TABLES,
    ),
    Fault(
        "segmentation-sidecars-the-farthest-wins",
        "fastfilm/segmentation/sidecars.py",
        "for folder in reversed(levels):",
        "for folder in levels:",
        TABLES,
    ),
    Fault(
        "segmentation-sidecars-of-other-entities",
        "fastfilm/segmentation/sidecars.py",
        "have.issuperset(theirs.items())",
        "bool(have)",
        TABLES,
    ),
    Fault(
        "segmentation-sidecars-of-other-suffixes",
        "fastfilm/segmentation/sidecars.py",
        "if last == suffix and",
        "if last and",
        TABLES,
    ),
    Fault(
        "segmentation-yaml-the-last-of-two-keys",
        "fastfilm/segmentation/yaml_files.py",
        "if key.value in seen:",
        "if False:",
        TABLES,
    ),
    Fault(
        "segmentation-names-a-slash-stays",
        "fastfilm/segmentation/names.py",
        r"[^\w.=+()-]",
        r"[^\w.=+()/-]",
        TABLES,
    ),
    Fault(
        "segmentation-names-two-become-one",
        "fastfilm/segmentation/names.py",
        '"".join(f"%{b:02X}" for b in match[0].encode("utf-8", "surrogatepass"))',
        '"_"',
        TABLES,
    ),
    Fault(
        "segmentation-metadata-a-value-that-is-a-spelling",
        "fastfilm/segmentation/metadata.py",
        "if text in (key.values or ()):",
        "if False:",
        "tests/segmentation/test_metadata.py",
    ),
    # what belongs together
    Fault(
        "segmentation-plan-digests-not-compared",
        "fastfilm/segmentation/plan.py",
        "if there != digest:",
        "if not there:",
        PLANS,
    ),
    Fault(
        "segmentation-plan-files-one-by-one",
        "fastfilm/segmentation/plan.py",
        "stack.enter_context(atomic(folder / name)).write_text(texts[name], encoding=",
        "(folder / name).write_text(texts[name], encoding=",
        PLANS,
    ),
    Fault(
        "segmentation-plan-exclusions-that-match-nothing",
        "fastfilm/segmentation/datasets.py",
        "if name not in found.excluded:",
        "if False:",
        PLANS,
    ),
    Fault(
        "segmentation-plan-annexed-labels-count-as-missing",
        "fastfilm/segmentation/datasets.py",
        "if os.path.lexists(p)]",
        "if p.exists()]",
        BAD,
    ),
    Fault(
        "segmentation-plan-demands-not-asked",
        "fastfilm/segmentation/decisions.py",
        "if most > there:",
        "if False:",
        BAD,
    ),
    Fault(
        "segmentation-model-weights-of-another-model",
        "fastfilm/segmentation/files.py",
        "checksum != _checksum(tensors, about)",
        "not checksum",
        FOLDERS,
    ),
    Fault(
        "segmentation-prediction-of-another-image-of-that-name",
        "fastfilm/segmentation/prediction.py",
        'and entry.get("stamps") == _stamps(case)',
        "and True",
        "tests/segmentation/test_prediction.py -k continue",
    ),
    Fault(
        "segmentation-pairs-predictions-that-are-not-there",
        "fastfilm/segmentation/pairs.py",
        "if case not in known.cases]",
        "if not case]",
        "tests/segmentation/test_bad_inputs.py -k without_a_prediction",
    ),
)
