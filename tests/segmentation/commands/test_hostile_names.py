"""Case ids, labels, metadata keys and values of any characters: all commands work, and nothing leaves OUT."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import yaml

from fastfilm.__main__ import main

from ...support.phantoms import settings, write_bids

NAMES = [
    "x/../../../ESC", "../../ESC", "..", ".", "/tmp/ESC", "a/b", "a\\b", "a b", "~", "$HOME", "`x`", ".hidden",
    "x.", "con:1", "*?", "é" * 130, "-rf", "%2F", "a%b", "a\u202eb", "labels", "entropy", "unknown", "=1+1",
    "'quoted'",    'double "quoted"', "<b>bold</b>", "[red]markup[/red]", "mean", "line;separator",
]  # fmt: skip

VALUES = [
    n
    for n in NAMES
    if n in ("..", "/tmp/ESC", "a/b", "unknown", "=1+1", "<b>bold</b>", "[red]markup[/red]")
]

KEY = "kind/../../../KEY of <it>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of cases with hostile ids, values and two labels with masks of their own; planned and trained."""
    root = tmp_path_factory.mktemp("a") / "b" / "c" / "d"
    bids = write_bids(root / "bids", count=6)
    rows = []
    for i, name in enumerate(NAMES):
        image = bids / f"sub-{i % 6:02d}" / "anat" / f"sub-{i % 6:02d}_FLAIR.nii.gz"
        label = bids / "derivatives/labels" / image.relative_to(bids)
        label = label.with_name(label.name.replace(".nii", "_dseg.nii"))
        # files of their own: identical images would be one subject
        own = root / "files" / f"{i}.nii.gz"
        own.parent.mkdir(exist_ok=True)
        shutil.copy(image, own)
        rows.append(
            {
                "id": name,
                "image": str(own),
                "one": str(label),
                "two": str(label),
                KEY: VALUES[i % len(VALUES)],
            }
        )
    with open(root / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    config = settings(
        bids,
        data={
            "source": "csv", "root": str(root / "table.csv"), "contrasts": ["image"],
            "labels": {NAMES[0]: {"column": "one"}, "entropy": {"column": "two"}},
        },
        training={"epochs": 1, "steps_per_epoch": 1},
    )  # fmt: skip
    config["metadata"] = {KEY: {"unseen": "unknown"}}
    (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["plan", str(root / "config.yaml"), str(root / "OUT" / "plan")]) == 0
    assert main(["train", str(root / "OUT" / "plan"), str(root / "OUT" / "model")]) == 0
    return root


def everything(root: Path) -> set[Path]:
    """All files from three folders further up, but those below OUT."""
    top = root.parents[2]
    return {p for p in top.rglob("*") if root / "OUT" not in p.parents}


def run(*argv: Any) -> None:
    assert main([str(a) for a in argv]) == 0


def test_names_of_any_kind_make_files_in_their_folder_only(hostile: Path) -> None:
    before, out = everything(hostile), hostile / "OUT"
    model, plan = out / "model", out / "plan"
    run("predict", model, plan, out / "real", "--probabilities")
    run("evaluate", out / "real")
    run("predict", model, plan, out / "swapped", "--swap", KEY)
    run("evaluate", out / "swapped")
    run("inspect", model, out / "inspected")
    run("report", out / "report", "--model", model, "--evaluated", out / "real",
        "--compare", out / "real", "--swapped", out / "swapped")  # fmt: skip
    assert everything(hostile) == before
    assert not Path("/tmp/ESC").exists()
    real = json.loads((out / "real" / "predictions.json").read_text())
    summary = json.loads((out / "real" / "summary.json").read_text())
    assert set(real["cases"]) == {c["case"] for c in summary["metric_per_case"]}
    assert {d["name"] for d in summary["labels"].values()} == {NAMES[0], "entropy"}
    fed = json.loads((out / "swapped" / "swap.json").read_text())["fed"]
    assert len({f["folder"] for f in fed}) == len({f["value"] for f in fed}) == len(fed)
    assert all((out / "swapped" / f["folder"]).is_dir() for f in fed)
    page = (out / "report" / "report.html").read_text()
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold&lt;/b&gt;" in page


def test_formulas_in_a_table_are_text(hostile: Path) -> None:
    out = hostile / "OUT"
    run("predict", out / "model", out / "plan", out / "formulas", "--part", "train")
    run("evaluate", out / "formulas")
    with open(out / "formulas" / "cases.csv", newline="", encoding="utf-8") as file:
        cells = [c for row in csv.reader(file) for c in row]
    begins = {c[0] for c in cells if c and not c.lstrip("-").replace(".", "", 1).isdigit()}
    assert not begins & set("=+@\t\r"), sorted(c for c in cells if c[:1] in "=+@\t\r")
    assert any(c == "'=1+1" for c in cells) or "=1+1" not in NAMES
