"""The page of a trial: complete, one file, nothing in it that a name could break, wide and narrow."""

from __future__ import annotations

import base64
import copy
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")

from fastfilm.segmentation.reports import html_page
from fastfilm.segmentation.trial import pictures
from fastfilm.segmentation.trial.methods import methods
from fastfilm.segmentation.trial.page import write_page
from fastfilm.segmentation.trial.pictures import Row
from fastfilm.segmentation.trial.results import collect
from fastfilm.segmentation.trial.verdict import verdict

from ...support.trials import SHA, write_trial

EVIL = '<script>alert("x")</script>&$_{'


class Outline(HTMLParser):
    """Headings, tags and text of a page; each tag that is opened must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three keys, two labels, swaps, clusters, all arms."""
    gain = {"conditioned": 0.04, "shuffled": 0.0, "channels": 0.03, "encoder": 0.02}
    out = write_trial(
        tmp_path_factory.mktemp("trial"),
        gain,
        labels=["edema", EVIL],
        keys={"type": ["x", "y"], "age": list(range(20, 40)), EVIL: ["a", EVIL]},
        kinds={"type": "category", "age": "continuous"},
        wrong={"type": 0.05},
        cluster=EVIL,
        subjects=20,
        folds=2,
    )
    return collect(out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One label, one key, two arms, one seed, no swaps."""
    out = write_trial(
        tmp_path_factory.mktemp("trial"), {"conditioned": 0.03}, subjects=12, folds=2, seeds=1
    )
    return collect(out)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page in which every picture is the same few bytes: drawing takes long."""
    monkeypatch.setattr(html_page, "png", lambda figure: b"picture")


FINDING = {
    "kind": "label", "about": EVIL, "measure": "AUC", "value": 0.9, "low": 0.8, "high": None,
    "level": "warning", "text": f"{EVIL} codes the label.", "advice": "Leave it out.",
}  # fmt: skip


def page(
    out: Path, results: dict[str, Any], audit: dict[str, Any] | None = None
) -> tuple[Outline, str]:
    path = write_page(out, results, audit)
    assert path == out / "report.html" and [p.name for p in out.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return Outline(text), text


@pytest.mark.usefixtures("undrawn")
def test_the_answer_comes_first_and_every_part_has_its_section(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    found, _ = page(tmp_path, whole, {"findings": [FINDING]})
    sentences = verdict(whole).sentences
    places = [found.text.index(s) for s in sentences]
    assert places == sorted(places) and places[-1] < found.text.index("The effect")
    assert found.headings == [
        "The effect", "By label", "Where it helps and hurts", "What a wrong value does",
        "Are the probabilities right?", "How much is chance", "Training", "Audit of the metadata", "Notes",
        "Design", "For the methods section",
    ]  # fmt: skip
    assert found.tags.count("img") == 6
    assert methods(whole) in found.text and SHA in found.text


@pytest.mark.usefixtures("undrawn")
def test_the_file_needs_nothing_else_and_names_are_only_text(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    found, text = page(tmp_path, whole, {"findings": [FINDING]})
    assert "script" not in found.tags and f"{EVIL} codes the label." in found.text
    assert EVIL in found.cells and not re.search(r'(src|href)="(?!data:image/png;base64,)', text)
    assert "http" not in text


@pytest.mark.usefixtures("undrawn")
def test_it_is_made_for_narrow_screens(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Tables scroll in boxes of their own, pictures scale, and the width is the device's."""
    _, text = page(tmp_path, whole)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count("<table>") == text.count('<div class="wide"><table>') > 5
    assert "div.wide { overflow-x: auto" in text and "img { max-width: 100% }" in text


@pytest.mark.usefixtures("undrawn")
def test_parts_without_results_are_left_out(tmp_path: Path, plain: dict[str, Any]) -> None:
    results = copy.deepcopy(plain)
    results["calibration"], results["groups"], results["extremes"] = {}, {}, None
    results["curves"] = {arm: [] for arm in results["curves"]}
    found, _ = page(tmp_path, results)
    assert found.headings == [
        "The effect",
        "How much is chance",
        "Notes",
        "Design",
        "For the methods section",
    ]
    assert "for these networks alone" in found.text
    results["notes"] = []
    assert "Notes" not in page(tmp_path, results)[0].headings


@pytest.mark.usefixtures("undrawn")
def test_one_label_has_no_section_of_labels(tmp_path: Path, plain: dict[str, Any]) -> None:
    found, _ = page(tmp_path, plain)
    assert "By label" not in found.headings and "What a wrong value does" not in found.headings
    assert "Audit of the metadata" not in found.headings


@pytest.mark.usefixtures("undrawn")
def test_the_numbers_are_those_of_the_results(tmp_path: Path, whole: dict[str, Any]) -> None:
    results = copy.deepcopy(whole)
    results["primary"].update(mean=0.0314, low=0.0201, high=0.0427, p=0.0123)
    results["groups"]["type"]["groups"]["x"].update(
        mean=-0.0217, low=-0.0301, high=-0.0108, p_holm=0.0321
    )
    results["swaps"]["type"]["wrong"].update(mean=0.05, low=0.04, high=0.06)
    results["calibration"]["error"]["conditioned"] = 0.0123
    found, _ = page(tmp_path, results)
    for expected in (
        "+0.031",
        "+0.020 to +0.043",
        "0.0123",
        "-0.022",
        "-0.030 to -0.011",
        "0.0321",
    ):
        assert expected in found.cells, expected
    assert "A wrong value changes Dice by -0.050 (95 % interval -0.060 to -0.040" in found.text
    assert "difference +0.031, 95 % CI +0.020 to +0.043, p = 0.012" in methods(results)


@pytest.mark.usefixtures("undrawn")
def test_findings_are_listed_from_the_worst_and_fine_ones_only_in_the_table(
    tmp_path: Path, plain: dict[str, Any]
) -> None:
    levels = [("fine", "quiet"), ("look", "second"), ("warning", "first")]
    audit = {"findings": [{**FINDING, "level": level, "text": text} for level, text in levels]}
    found, _ = page(tmp_path, plain, audit)
    assert found.text.index("Warning: first") < found.text.index("Look at this: second")
    assert "quiet" not in found.text and found.cells.count("Fine") == 1
    assert "nothing to look at" in page(tmp_path, plain, {"findings": []})[0].text
    calm = {"findings": [{**FINDING, "level": "fine"}]}
    assert "1 finding, none of which needs attention" in page(tmp_path, plain, calm)[0].text


def test_the_paragraph_for_a_paper_has_the_design_and_the_clusters(
    whole: dict[str, Any], plain: dict[str, Any]
) -> None:
    text = methods(whole)
    for part in (
        "(type, age)", "20 cases of 20 subjects", "2 folds and 3 random seeds", "30 networks of 400 steps",
        SHA[:16], "was set to 0.01", "and by training run", "of whole clusters", "Against shuffled (mean 0.",
    ):  # fmt: skip
        assert part in text, part
    text = methods(plain)
    assert (
        "1 random seed," in text
        and "clustered by subject; " in text
        and "of whole subjects" in text
    )
    assert "for these networks alone" in text


def test_a_forest_shows_each_interval_where_it_is_and_marks_losses() -> None:
    rows = [
        Row("key", heading=True),
        Row("a", 0.02, 0.01, 0.03),
        Row("b", -0.02, -0.03, -0.01),
        Row("c", 0.5),
    ]
    axes = pictures.forest(rows, 0.01, {"mean": 0.015}).axes[0]
    lines = {tuple(line.get_xdata()): line for line in axes.lines}
    assert lines[0.01, 0.03].get_color() == pictures.COLOURS[0]
    assert lines[-0.03, -0.01].get_color() == pictures.COLOURS[1]
    assert (0.015, 0.015) in lines and (0.5,) in lines and len(lines) == 7
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["key", "a", "b", "c"] and axes.get_ylim() == (3.6, -0.6)


def test_the_picture_of_chance_has_a_dot_for_each_training_run_and_case(
    whole: dict[str, Any],
) -> None:
    axes = pictures.chance(whole).axes[0]
    runs, cases = (c.get_offsets()[:, 1] for c in axes.collections)
    assert len(runs) == 6 and len(cases) == 20
    assert cases.mean() == pytest.approx(whole["primary"]["mean"])
    assert runs.mean() == pytest.approx(whole["primary"]["mean"])


def test_the_pictures_hold_many_labels_and_arms(whole: dict[str, Any]) -> None:
    calibration = copy.deepcopy(whole["calibration"])
    for arm in calibration["labels"].values():
        arm.update({f"label {i}": arm["edema"] for i in range(9)})
    figure = pictures.reliability(calibration)
    assert sum(bool(a.lines) for a in figure.axes) == 6
    x, y = figure.axes[0].lines[1].get_data()
    assert x == pytest.approx([i / 10 + 0.05 for i in range(10)]) and y[5] == pytest.approx(0.52)
    axes = pictures.curves(whole["curves"]).axes[0]
    assert len(axes.lines) == 5 and max(axes.lines[0].get_xdata()) == 400


def test_every_picture_is_drawn_and_no_wider_than_the_text(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    _, text = page(tmp_path, whole)
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    sizes = [struct.unpack(">II", base64.b64decode(p)[16:24]) for p in found]
    assert len(sizes) == 6 and all(300 < w < 700 and 100 < h < 1500 for w, h in sizes), sizes
