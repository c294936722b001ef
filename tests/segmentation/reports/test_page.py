"""What is for the eyes: groups, tables of the console, comparisons, the report, the inspection."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

from rich.cells import cell_len

from fastfilm.segmentation.commands import cli
from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.evaluation.metrics import METRICS
from fastfilm.segmentation.metadata.encoder import MetadataEncoder
from fastfilm.segmentation.metadata.groups import grouping
from fastfilm.segmentation.reports import figures, layout
from fastfilm.segmentation.reports.figures import png
from fastfilm.segmentation.reports.inspection import Inspection, Layer

from ...support.models import TYPES, make_model
from ..evaluation.test_pairs import (
    entry,
    manifest,
    some,
    summary,
    write,
)


def run(*argv: Any) -> int:
    return cli.run(str(argv[0]), [str(a) for a in argv[1:]])


def evaluated(
    folder: Path, metadata: list[dict[str, Any]], labels: Any = (("lesion", 1),), **more: Any
) -> Path:
    """Predictions and truth of one case for each entry of ``metadata``, two cases a subject."""
    cases = {}
    rng = np.random.default_rng(0)
    for i, values in enumerate(metadata):
        truth = rng.integers(0, len(labels) + 1, (4, 5, 6)).astype(np.uint8)
        wrong = np.where(rng.random(truth.shape) < 0.1, 0, truth).astype(np.uint8)
        file = write(folder / "truth" / f"c{i}.nii.gz", truth)
        image = write(folder / "images" / f"c{i}.nii.gz", truth.astype(np.float32))
        write(folder / "pred" / f"c{i}.nii.gz", wrong)
        known = {name: str(file) for name, _ in labels}
        cases[f"c{i}"] = entry(
            {"labels": f"c{i}.nii.gz"}, f"s{i // 2}", truth=known, metadata=values,
            images=[str(image)],
        )  # fmt: skip
    manifest(folder / "pred", cases, labels, **more)
    return folder / "pred"


def table_lines(text: str) -> list[str]:
    """The lines that are no sentences with paths of files."""
    return [t for t in text.splitlines() if not t.startswith(("note:", "written", "this run"))]


# groups


def test_continuous_keys_are_grouped_by_tertiles() -> None:
    ages = {f"c{i}": str(20 + 3 * i) for i in range(15)}
    found = grouping(ages)
    assert found is not None and found.binned
    assert list(found.members) == ["20–32", "35–47", "50–62"]
    assert [len(m) for m in found.members.values()] == [5, 5, 5]
    # few different values: one is a group, unless the key is known to be continuous
    few = {f"c{i}": 10.0 + i % 4 for i in range(8)}
    assert list(grouping(few).members) == ["10", "11", "12", "13"]
    assert list(grouping(few, "continuous").members) == ["10–11", "12", "13"]
    assert grouping({f"c{i}": i for i in range(5)}, "continuous") is None
    found = grouping({**ages, "x": None, "y": "", "z": float("nan")}, "continuous")
    assert list(found.members)[-1] == "unknown" and found.members["unknown"] == ["x", "y", "z"]


def test_ranges_have_the_digits_that_tell_them_apart() -> None:
    close = {f"c{i}": 1000 + i / 1000 for i in range(9)}
    ends = [name.split("–") for name in grouping(close, "continuous").members]
    assert all(float(a[1]) < float(b[0]) for a, b in itertools.pairwise(ends))
    below = {f"c{i}": i - 4.5 for i in range(9)}
    assert next(iter(grouping(below, "continuous").members)) == "-4.5 to -2.5"


def test_categories_keep_their_names_and_several_values_count_each() -> None:
    assert list(grouping({"a": "10", "b": "9", "c": "none"}).members) == ["9", "10", "none"]
    both = grouping({"a": "x;y", "b": "y", "c": ["x"]}, "multilabel")
    assert both.members == {"x": ["a", "c"], "y": ["a", "b"]}
    assert list(grouping({"a": "unknown", "b": None}).members) == ["unknown", "(missing)"]
    assert grouping({str(i): f"name {i}" for i in range(13)}) is None


def test_evaluate_bins_continuous_metadata(tmp_path: Path, capsys: Any) -> None:
    pred = evaluated(tmp_path, [{"age": 20 + i, "field": i % 2 + 1} for i in range(14)])
    assert run("evaluate", pred) == 0
    groups = summary(pred)["labels"]["1"]["groups"]
    assert list(groups["age"]) == ["20–24", "25–28", "29–33"] and list(groups["field"]) == [
        "1",
        "2",
    ]
    assert summary(pred)["binned"] == ["age"]
    said = capsys.readouterr().out
    assert "age 20–24" in said and "field = 1" in said and "20.0" not in said
    pred = evaluated(tmp_path / "few", [{"age": 20 + i} for i in range(5)],
                     kinds={"age": "continuous"})  # fmt: skip
    assert run("evaluate", pred) == 0
    assert summary(pred)["labels"]["1"]["groups"] == {}


# the console


def test_tables_fit_eighty_columns_and_cut_no_number(tmp_path: Path, capsys: Any) -> None:
    names = [
        "a label of a name that is much longer than any column could be",
        "labels",
        "[red]日本語/x\n",
    ]
    labels = [(n, i) for i, n in enumerate(names, 1)]
    metadata = [{"a key/with = signs": ("x" * 70, "y")[i % 2], "mean": "[b]"} for i in range(6)]
    pred = evaluated(tmp_path, metadata, labels)
    other = evaluated(tmp_path / "other", metadata, labels)
    assert run("evaluate", other, "--tolerance", "2") == 0
    assert run("evaluate", pred, "--metrics", "all", "--compare", other) == 0
    said = capsys.readouterr().out
    assert max(cell_len(line) for line in table_lines(said)) <= 80
    means = summary(pred)["labels"]["2"]["metrics"]
    for metric, mean in means.items():
        digits = layout.DIGITS[metric]
        assert f"{mean['mean']:.{digits}f}" in said and f", {mean['high']:.{digits}f}" in said
    assert "[red]日本語/x\\n" in said and "rank-biserial" in said


def test_points_stand_under_each_other() -> None:
    means = [{"mean": m, "low": m - 1, "high": m + 1} for m in (3.5, 120.25, 11.0)]
    lines = [c.split("\n") for c in layout.means("HD95", means, 2).cells]
    right = [text.rjust(30) for text, _ in lines]
    assert len({line.index(".") for line in right}) == 1
    ends = [text for _, text in lines]
    assert len({(t.index("."), t.rindex(".")) for t in ends}) == 1


def test_further_columns_follow_in_blocks() -> None:
    columns = [layout.Column(f"column {i}", ["1.000"] * 2) for i in range(20)]
    lines = list(layout.table("title", "name", ["first", "second"], columns))
    assert max(map(len, lines)) <= 80 and "".join(lines).count("1.000") == 40
    assert sum(line.startswith("first") for line in lines) == 3


def test_a_group_of_one_subject_has_no_interval(tmp_path: Path, capsys: Any) -> None:
    pred = evaluated(tmp_path, [{"site": "abc"[i // 2]} for i in range(6)])
    assert run("evaluate", pred) == 0
    group = summary(pred)["labels"]["1"]["groups"]["site"]["a"]["Dice"]
    assert (group["low"], group["high"], group["n"], group["subjects"]) == (None, None, 2, 1)
    whole = summary(pred)["labels"]["1"]["metrics"]["Dice"]
    assert whole["low"] is not None and (whole["n"], whole["subjects"]) == (6, 3)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "site = a" in line)
    assert "2 (1)" in lines[at] and lines[at + 1].split() == ["–", "–", "–"]
    assert any("(subjects)" in line for line in lines)
    assert run("report", tmp_path / "report", "--evaluated", pred) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"{group['mean']:.3f}\n–</td>" in page
    assert ">cases</th>" in page and ">subjects</th>" in page


def test_metrics_are_chosen_by_name(tmp_path: Path, capsys: Any) -> None:
    pred = evaluated(tmp_path, [{}] * 2)
    assert run("evaluate", pred, "--metrics", "iou, lesion_F1") == 0
    said = capsys.readouterr().out
    assert "IoU" in said and "lesion\n" in said and "HD95" not in said
    assert set(summary(pred)["mean"]["1"]) == set(METRICS)


# comparisons


def test_what_is_in_one_run_only_is_said(tmp_path: Path, capsys: Any) -> None:
    labels = [("core", 1), ("edema", 2)]
    pred = evaluated(tmp_path, [{}] * 6, labels)
    other = evaluated(tmp_path / "other", [{}] * 6, [("core", 1), ("cyst", 2)])
    value = json.loads((other / "predictions.json").read_text())
    value["cases"]["extra"] = value["cases"].pop("c0")
    del value["cases"]["c1"]
    (other / "predictions.json").write_text(json.dumps(value))
    assert run("evaluate", other, "--tolerance", "3") == 0
    capsys.readouterr()
    assert run("evaluate", pred, "--compare", other) == 0
    said = capsys.readouterr().out
    for line in (
        f"NSD is not compared: its tolerance is 1 mm here, 3 mm in {other}",
        "labels in this run only: edema",
        f"labels in {other} only: cyst",
        "2 cases in this run only: c0, c1",
        f"1 cases in {other} only: extra",
    ):
        assert line in said
    compared = json.loads((pred / "comparison.json").read_text())
    assert list(compared["labels"]) == ["core"] and "NSD" not in compared["labels"]["core"]
    assert compared["labels"]["core"]["Dice"]["n"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"metric_per_case"', "not JSON"),
        ("[]", "not a summary"),
        (
            '{"foreground_mean": {"Dice": 1}, "mean": {}, "metric_per_case": []}',
            "labels: Field required",
        ),
        (None, "no such file"),
    ],
)
def test_a_summary_that_is_none_is_one_message(
    tmp_path: Path, text: str | None, message: str, capsys: Any
) -> None:
    pred = evaluated(tmp_path, [{}] * 2)
    (tmp_path / "other").mkdir()
    if text is not None:
        (tmp_path / "other" / "summary.json").write_text(text)
    assert run("evaluate", pred, "--compare", tmp_path / "other") == 1
    assert run("report", tmp_path / "report", "--evaluated", tmp_path / "other") == 1
    for line in capsys.readouterr().err.splitlines():
        assert "summary.json" in line and message in line
    assert not (pred / "summary.json").exists() and not (tmp_path / "report").exists()


def test_metrics_missing_from_a_summary_are_found(tmp_path: Path, capsys: Any) -> None:
    pred = evaluated(tmp_path, [{}] * 2)
    assert run("evaluate", pred) == 0
    value = summary(pred)
    del value["metric_per_case"][0]["metrics"]["1"]["Dice"]
    (pred / "summary.json").write_text(json.dumps(value))
    assert run("report", tmp_path / "report", "--evaluated", pred) == 1
    assert "metric_per_case: c0: a metric is missing" in capsys.readouterr().err


# report and inspection


def test_names_of_any_kind_are_shown_and_stay_in_their_folder(tmp_path: Path, capsys: Any) -> None:
    key = "../a/b\nc $x$"
    rows = {str(i): {key: t} for i, t in enumerate(("labels", "$\\frac$", "<script>", "_x"))}
    labels = [("a/b", 1), ("labels", 2), ("$\\alpha_{$", 3), ("_entropy", 4), ("<b>", 5)]
    info = [{"name": n, "values": [v], "value": v} for n, v in labels]
    model = tmp_path / "model"
    make_model(model, metadata=MetadataEncoder.fit(rows, {key: MetadataKey()}), labels=info)
    pred = evaluated(tmp_path, [rows[str(i % 4)] for i in range(6)], labels)
    assert run("evaluate", pred) == 0
    out = tmp_path / "deep" / "report"
    assert run("report", out, "--evaluated", pred, "--model", model) == 0
    assert run("inspect", model, tmp_path / "deep" / "inspect") == 0
    written = {p.relative_to(tmp_path / "deep").parent.as_posix() for p in
               (tmp_path / "deep").rglob("*") if p.is_file()}  # fmt: skip
    assert written == {"report", "inspect"}
    page = (out / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b></td>" not in page
    assert "overlays" in {p.stem for p in out.iterdir()}


def test_a_report_is_there_whole_or_not_at_all(tmp_path: Path, capsys: Any) -> None:
    pred = evaluated(tmp_path, [{}] * 2)
    assert run("evaluate", pred) == 0
    out = tmp_path / "report"
    assert run("report", out, "--evaluated", pred, "--swapped", pred) == 1
    assert "swap_table.json: no such file" in capsys.readouterr().err
    assert run("report", out, "--compare", pred) == 1
    assert "--compare needs --evaluated" in capsys.readouterr().err
    assert run("report", out) == 1 and not out.exists()
    assert run("report", pred / "summary.json", "--evaluated", pred) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_cases_without_their_images_are_said_in_the_report(tmp_path: Path) -> None:
    pred = evaluated(tmp_path, [{}] * 3)
    assert run("evaluate", pred) == 0
    (tmp_path / "images" / "c1.nii.gz").unlink()
    assert run("report", tmp_path / "report", "--evaluated", pred) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "1 cases cannot be shown" in page and page.count("data:image/png") == 1
    shutil.rmtree(tmp_path / "images")
    assert run("report", tmp_path / "report", "--evaluated", pred) == 0
    assert "3 cases cannot be shown" in (tmp_path / "report" / "report.html").read_text()


def test_inspect_names_the_layers_that_change_most(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fastfilm.segmentation.commands.inspect.png", lambda figure: b"")
    make_model(tmp_path / "model", network={"depth": 2}, patch_size=[8, 8, 8])
    assert run("inspect", tmp_path / "model", tmp_path / "out") == 0
    brief = capsys.readouterr().out.splitlines()
    assert run("inspect", tmp_path / "model", tmp_path / "out", "--layers") == 0
    whole = capsys.readouterr().out.splitlines()
    first = next(line for line in brief if line.startswith("tumor_type"))
    assert "most in" in first and "3 further layers differ less; --layers" in "\n".join(brief)
    values = [float(line.split()[0]) for line in whole if line.startswith("    ")]
    shown = [float(line.split()[0]) for line in brief if line.startswith("    ")]
    assert len(values) == 6 and shown == sorted(values, reverse=True)[:3]


def test_pictures_of_many_values_and_layers_stay_drawable(monkeypatch: Any) -> None:
    monkeypatch.setattr(figures, "LAYERS", 2)
    monkeypatch.setattr(figures, "TALLEST", 4.0)
    rng = np.random.default_rng(0)

    def layers(n: int, values: int) -> list[Layer]:
        return [
            Layer(f"l{i}", *rng.standard_normal((2, values, 3)).astype(np.float32))
            for i in range(n)
        ]

    many = Inspection("key", [f"value {i}" for i in range(90)], layers(1, 90))
    deep = Inspection("key", ["a"], layers(4, 1))
    for found in (many, deep):
        for draw in (figures.film_heat_maps, figures.film_components):
            figure = draw(found)
            assert figure.get_figheight() < 10 and png(figure).startswith(b"\x89PNG")
    assert "2 of 4 layers" in figure.get_suptitle()
    row = {str(i): {"mean": 0.5, "low": None, "high": None, "n": 1} for i in range(12)}
    assert png(figures.swap_heat_map({"key": "$", "rows": {"0": row, "x": row}})).startswith(
        b"\x89PNG"
    )


# swapped metadata


def swapped(folder: Path, true: dict[str, Any], fed: list[str], **more: Any) -> Path:
    """Predictions of the cases in ``true`` under each value of ``fed``, and their truth in folder/truth."""
    listed = []
    for i, value in enumerate(fed):
        cases = {}
        for j, case in enumerate(true):
            write(folder / "swap" / f"f{i}" / f"{case}.nii.gz", some(10 * i + j))
            write(folder / "truth" / f"{case}.nii.gz", some(j))
            cases[case] = entry({"labels": f"{case}.nii.gz"}, case, metadata={"k": value})
        manifest(folder / "swap" / f"f{i}", cases, **more)
        listed.append({"value": value, "folder": f"f{i}"})
    swap = {"key": "k", "true": true, "fed": listed}
    (folder / "swap" / "swap.json").write_text(json.dumps(swap))
    return folder / "swap"


def test_the_swap_table_fits_eighty_columns(tmp_path: Path, capsys: Any) -> None:
    fed = [f"value number {i}" for i in range(9)]
    swap = swapped(tmp_path, {f"c{i}": fed[i % 3] for i in range(4)}, fed)
    write(tmp_path / "truth" / "c0.nii.gz", some() * 5)
    assert run("evaluate", swap, "--truth", tmp_path / "truth") == 0
    said = capsys.readouterr().out
    # what is true of a file in every run is said once
    assert said.count("note:") == 1 and "no label (5) in 1 file" in said
    assert max(cell_len(line) for line in table_lines(said)) <= 80
    table = json.loads((swap / "swap_table.json").read_text())
    for row in table["rows"].values():
        assert all(f"{cell['mean']:.3f}" in said for cell in row.values())
    assert run("report", tmp_path / "report", "--swapped", swap) == 0


def test_a_continuous_key_has_rows_by_range_and_unknown_is_not_mixed(tmp_path: Path) -> None:
    true = {f"c{i}": float(i) for i in range(6)}
    swap = swapped(tmp_path, true, ["1", "4"], kinds={"k": "continuous"})
    assert run("evaluate", swap, "--truth", tmp_path / "truth") == 0
    table = json.loads((swap / "swap_table.json").read_text())
    assert list(table["rows"]) == ["0–1", "2–3", "4–5"]
    true = {"a": "unknown", "b": None, "c": "none"}
    swap = swapped(tmp_path / "names", true, ["none", "unknown", "(missing)"])
    assert run("evaluate", swap, "--truth", tmp_path / "names" / "truth") == 0
    table = json.loads((swap / "swap_table.json").read_text())
    assert set(table["rows"]) == {"none", "unknown", "(missing)"}
    assert all(table["rows"][name][name]["n"] == 1 for name in table["rows"])
    cell = table["differences"]["none"]["unknown"]
    assert (cell["low"], cell["p_greater"], cell["n"]) == (None, None, 1)


def test_a_swap_is_compared_folder_by_folder(tmp_path: Path, capsys: Any) -> None:
    swap = swapped(tmp_path, {"a": TYPES[0]}, list(TYPES))
    assert run("evaluate", swap, "--truth", tmp_path / "truth", "--compare", swap) == 1
    assert "compare one of its folders" in capsys.readouterr().err
    (swap / "swap.json").write_text("{}")
    assert run("evaluate", swap, "--truth", tmp_path / "truth") == 1
    error = capsys.readouterr().err
    assert "swap.json: not made by fastfilm predict --swap: key: Field required" in error
