"""Faults in fastfilm/segmentation/support."""

from __future__ import annotations

from tests.planted.fault import Fault

TABLES = "tests/segmentation/support/test_tables.py"
FOLDERS = "tests/segmentation/models/test_folder.py"

FAULTS = (
    Fault(
        "segmentation-model-weights-of-another-model",
        "fastfilm/segmentation/support/files.py",
        "checksum != _checksum(tensors, about)",
        "not checksum",
        FOLDERS,
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
        "segmentation-yaml-the-last-of-two-keys",
        "fastfilm/segmentation/support/yaml_files.py",
        "if key.value in seen:",
        "if False:",
        TABLES,
    ),
)
