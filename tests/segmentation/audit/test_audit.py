"""The audit: its statistics against other programs' and by hand, what is planted is found, and chance is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("sklearn", reason="needs the extra [segmentation]")

from numpy.typing import NDArray
from scipy import stats
from scipy.stats import contingency
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastfilm.__main__ import main
from fastfilm.segmentation.audit import association, audit, prediction
from fastfilm.segmentation.audit.findings import Finding, corrected
from fastfilm.segmentation.audit.images import of_channel
from fastfilm.segmentation.audit.page import lines, page
from fastfilm.segmentation.audit.questions import (
    gap_questions,
    image_questions,
    label_questions,
    pair_questions,
)
from fastfilm.segmentation.audit.rows import Rows, add_keys, read_rows
from fastfilm.segmentation.audit.values import value_findings
from fastfilm.segmentation.audit.wording import judged
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.data.demo import write_configuration, write_data_set
from fastfilm.segmentation.data.plan import PlanFolder, read_plan
from fastfilm.segmentation.data.sources import Case
from fastfilm.segmentation.support.errors import UserError

Array = NDArray[np.float64]

FAST = 300
"""Permutations of a test: the smallest p is 1 / 301."""


def rows_of(keys: dict[str, dict[str, Any]], values: dict[str, list[Any]], **volumes: Any) -> Rows:
    """One case of each subject; ``volumes``: label -> mL."""
    n = len(next(iter(values.values())))
    cases = [
        Case(f"s{i:03d}", f"s{i:03d}", (Path("x"),), {}, {k: v[i] for k, v in values.items()})
        for i in range(n)
    ]
    rows = Rows(cases, fold=np.arange(n) % 5.0)
    add_keys(rows, {k: MetadataKey(**key) for k, key in keys.items()})
    rows.volumes = {k: np.asarray(v, float) for k, v in volumes.items()}
    return rows


def asked(
    rows: Rows, features: Array | None = None, permutations: int = FAST
) -> dict[str, Finding]:
    """All questions, corrected and judged; by what they are about."""
    how = (0, permutations)
    questions = [*label_questions(rows, *how), *pair_questions(rows, *how)]
    questions += gap_questions(rows, set(), *how)
    if features is not None:
        questions += image_questions(rows, "intensity", features, *how)
    found = corrected([q.ask() for q in questions])
    inputs = {c.name for c in rows.columns if c.input} | {*rows.inputs}
    return {f.about: judged(f, inputs) for f in found}


def cross_validated(x: Array, y: Array, seed: int) -> list[tuple[Array, Array]]:
    """(prediction, mean of the training) of each repeat, by scikit-learn."""
    rng, n, result = np.random.default_rng(seed), len(x), []
    for _ in range(prediction.REPEATS):
        predicted, mean = np.zeros(y.shape), np.zeros(y.shape)
        for held in np.array_split(rng.permutation(n), prediction.FOLDS):
            train = np.setdiff1d(np.arange(n), held)
            model = make_pipeline(StandardScaler(), Ridge(prediction.RIDGE * len(train)))
            predicted[held] = model.fit(x[train], y[train]).predict(x[held])
            mean[held] = y[train].mean(0)
        result.append((predicted, mean))
    return result


def test_measures_are_those_of_scikit_learn_cross_validated() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(43, 3)), np.full((43, 1), 7.0)], 1)
    y = x[:, 0] + rng.normal(size=43)
    found = prediction.r2(x, y, seed=4, permutations=FAST)
    # about the mean of the training, not of those held out
    expected = [
        1 - ((y - p) ** 2).sum() / ((y - m) ** 2).sum() for p, m in cross_validated(x, y, 4)
    ]
    assert found.value == pytest.approx(np.mean(expected)) and found.n == 43
    rough = [r2_score(y, p) for p, _ in cross_validated(x, y, 4)]
    assert found.value == pytest.approx(np.mean(rough), abs=0.05)
    assert found.low < found.value < found.high and found.p == pytest.approx(1 / 301)
    one = y > 0.5
    found = prediction.auc(x, one, seed=5, permutations=FAST)
    expected = [roc_auc_score(one, p - m) for p, m in cross_validated(x, one.astype(float), 5)]
    assert found.value == pytest.approx(np.mean(expected))
    three = np.digitize(y, (-0.7, 1.0))
    found = prediction.balanced_accuracy(x, three, seed=6, permutations=FAST)
    expected = [
        balanced_accuracy_score(three, np.argmax(p / m, 1))
        for p, m in cross_validated(x, np.eye(3)[three], 6)
    ]
    assert found.value == pytest.approx(np.mean(expected))
    assert found.low < found.value < found.high


@pytest.mark.parametrize("kind", ["auc", "r2", "balanced_accuracy"])
def test_p_values_without_association_are_even(kind: str) -> None:
    """40 of them, against the uniform distribution; the classes are uneven."""
    p = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(24, 2)), rng.normal(size=24)
        if kind == "auc":
            p.append(prediction.auc(x, y > 0.8, seed, 99).p)
        elif kind == "r2":
            p.append(prediction.r2(x, y, seed, 99).p)
        else:
            y = np.digitize(y, (-0.8, 0.8))
            p.append(
                prediction.balanced_accuracy(x, np.unique(y, return_inverse=True)[1], seed, 99).p
            )
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_a_model_that_knows_nothing_is_at_chance_although_held_out_means_differ() -> None:
    """A constant key: held out from the mean of the others, positives would have the lower score."""
    y = np.arange(20) < 5
    found = prediction.auc(np.ones((20, 1)), y, permutations=FAST)
    assert (found.value, found.low, found.high, found.p) == (0.5, 0.5, 0.5, 1.0)


def test_cramers_v_is_that_of_bergsma_and_1_where_one_determines_the_other() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    y[:20] = x[:20]
    table = contingency.crosstab(x, y).count
    phi = stats.chi2_contingency(table, correction=False).statistic / 50
    assert association.chi_square(x[:, None], y[:, None])[0] == pytest.approx(phi)
    phi_corrected = phi - 2 * 3 / 49
    r, c = 3 - 2**2 / 49, 4 - 3**2 / 49
    v = np.sqrt(phi_corrected / min(r - 1, c - 1))
    found = association.associate(x, y, (True, True), permutations=FAST)
    assert found.value == pytest.approx(v) and found.measure == "Cramer's V"
    assert 0 < v < contingency.association(table)
    certain = association.associate(x, (x + 1) % 3, (True, True), permutations=FAST)
    assert certain.value == pytest.approx(1) and certain.p == pytest.approx(1 / 301)
    assert certain.low == pytest.approx(1)


def test_eta_is_that_of_the_analysis_of_variance_and_spearman_that_of_scipy() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 3, 40).astype(float), rng.normal(size=40)
    y += x
    f = stats.f_oneway(*(y[x == k] for k in range(3))).statistic
    expected = np.sqrt(2 * f / (2 * f + 37))
    for pair in ((x, y, (True, False)), (y, x, (False, True))):
        found = association.associate(*pair, permutations=FAST)  # type: ignore[arg-type]
        assert found.value == pytest.approx(expected) and found.measure == "eta"
        assert found.chance == pytest.approx(np.sqrt(2 / 39)) and found.low < expected < found.high
    rho = stats.spearmanr(x, -y).statistic
    found = association.associate(x, -y, (False, False), permutations=FAST)
    assert found.value == pytest.approx(rho) and rho < 0 and found.p < 0.01
    with pytest.raises(ValueError, match="two values"):
        association.associate(np.zeros(9), y[:9], (True, False))


def test_only_what_was_tested_is_corrected() -> None:
    untested = Finding("rare", "x", "subjects", 1, None, None, 5, 9)
    tested = Finding("label", "x", "R2", 0, None, None, 0, 9, p=0.02)
    found = corrected([tested, untested, tested])
    assert [f.p_corrected for f in found] == [0.04, None, 0.04]


def lesions(n: int, seed: int = 0) -> Array:
    """Volumes in mL, a fifth of them none."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 0.2, 0, np.exp(rng.normal(2, 0.8, n)))


@pytest.mark.parametrize(
    ("leak", "key", "about"),
    [
        ("volume", {"kind": "continuous"}, "volume of lesion"),
        ("volume", {"kind": "continuous", "scaling": "bins"}, "volume of lesion"),
        ("tertile", {}, "volume of lesion"),
        ("tertile", {"kind": "ordered", "values": ["0", "1", "2"]}, "volume of lesion"),
        ("presence", {}, "presence of lesion"),
        ("presence", {"kind": "multilabel"}, "presence of lesion"),
    ],
)
def test_metadata_that_code_the_label_are_a_warning(
    leak: str, key: dict[str, Any], about: str
) -> None:
    for seed in range(2):
        v = lesions(40, seed) + (leak == "tertile")
        coded: dict[str, list[Any]] = {
            "volume": [f"{x:.2f}" for x in v],
            "tertile": [str(t) for t in np.digitize(v, np.quantile(v, (1 / 3, 2 / 3)))],
            "presence": ["seen" if x > 0 else "none" for x in v],
        }
        sex = np.random.default_rng(seed).choice(["f", "m"], 40).tolist()
        rows = rows_of({"leak": key, "sex": {}}, {"leak": coded[leak], "sex": sex}, lesion=v)
        found = asked(rows)
        assert found[f"leak -> {about}"].level == "warning"
        assert found[f"all input keys -> {about}"].level == "warning"
        assert found[f"sex -> {about}"].level == "fine"
        assert "leave it out" in found[f"leak -> {about}"].advice


def test_a_code_of_the_label_that_the_network_does_not_get_is_no_warning() -> None:
    v = lesions(40)
    coded = ["seen" if x > 0 else "none" for x in v]
    found = asked(rows_of({"leak": {"input": False}}, {"leak": coded}, lesion=v))
    assert found["leak -> presence of lesion"].level == "look"
    assert "all input keys -> presence of lesion" not in found


def test_an_ordinary_association_is_worth_a_look_and_its_sentence_has_the_numbers() -> None:
    rng = np.random.default_rng(3)
    kind = rng.choice(["high", "low"], 80)
    v = np.exp(rng.normal(2, 0.8, 80) + 1.2 * (kind == "high"))
    found = asked(rows_of({"grade": {}}, {"grade": kind.tolist()}, lesion=v))
    finding = found["grade -> volume of lesion"]
    assert finding.level == "look" and 0.1 < finding.value < 0.6
    assert finding.text.startswith(
        f"grade alone predicts the volume of lesion: R2 {finding.value:.2f} [{finding.low:.2f}, "
    )
    assert "in 80 subjects; 0.00 is chance, p 0.003, corrected" in finding.text


@pytest.mark.parametrize("seed", range(20))
def test_metadata_of_chance_give_no_warning(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 30
    values = {
        "type": rng.choice(list("abc"), n).tolist(),
        "age": [f"{x:.1f}" for x in rng.normal(50, 10, n)],
        "findings": [
            "; ".join(rng.permutation(["p", "q", "r"])[: rng.integers(4)]) for _ in range(n)
        ],
        "site": rng.choice(list("xyzw"), n).tolist(),
    }
    for i in rng.choice(n, 6, replace=False):
        values["age"][i] = "n/a"
    keys: dict[str, dict[str, Any]] = {"type": {}, "age": {"kind": "continuous"}}
    keys |= {"findings": {"kind": "multilabel"}, "site": {"input": False}}
    found = asked(rows_of(keys, values, lesion=lesions(n, seed)), rng.normal(size=(n, 6)))
    assert len(found) > 25
    assert [f.about for f in found.values() if f.level == "warning"] == []
    assert sum(f.level == "look" for f in found.values()) <= 1


def test_a_site_that_goes_with_the_type_is_a_warning_and_two_input_keys_are_not() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 45)
    site = np.where(rng.random(45) < 0.05, 0, kind)
    keys: dict[str, dict[str, Any]] = {"type": {}, "same": {}, "site": {"input": False}}
    values = {"type": [*map(str, kind)], "same": [*map(str, kind)], "site": [*map(str, site)]}
    found = asked(rows_of(keys, values, lesion=lesions(45)))
    assert found["type - site"].level == "warning" and found["type - site"].value > 0.8
    assert "What the network learns of type may be site" in found["type - site"].advice
    assert found["type - same"].level == "look"
    assert "one is enough" in found["type - same"].advice


def test_values_missing_with_the_label_and_labels_missing_with_a_value_are_found() -> None:
    rng = np.random.default_rng(5)
    v = lesions(60, 5)
    age = [("n/a" if x == 0 else f"{rng.normal(50, 10):.1f}") for x in v]
    site = rng.choice(["a", "b"], 60)
    core = np.where(site == "a", np.nan, rng.random(60))
    keys: dict[str, dict[str, Any]] = {"age": {"kind": "continuous"}, "site": {}}
    rows = rows_of(keys, {"age": age, "site": site.tolist()}, lesion=v, core=core)
    found = asked(rows, permutations=2000)
    assert found["age missing - presence of lesion"].level == "warning"
    assert found["age missing - presence of lesion"].value == pytest.approx(1)
    assert found["site - core annotated"].level == "look"
    assert found["site - fold"].level == "fine"


def test_intensities_that_tell_a_key_are_worth_a_look() -> None:
    rng = np.random.default_rng(7)
    site = rng.integers(0, 3, 60)
    features = rng.normal(size=(60, 5))
    features[:, 2] += 3 * site
    age = 50 + 5 * features[:, 1] + rng.normal(size=60)
    keys: dict[str, dict[str, Any]] = {"site": {"input": False}, "age": {"kind": "continuous"}}
    values = {"site": [*map(str, site)], "age": [f"{a:.2f}" for a in age]}
    found = asked(rows_of(keys, values, lesion=lesions(60)), features)
    assert found["intensity -> site"].level == found["intensity -> age"].level == "look"
    assert found["intensity -> site"].measure == "balanced accuracy"
    assert found["intensity -> site"].chance == pytest.approx(1 / 3)
    assert found["intensity -> site"].value > 0.7 and found["intensity -> age"].value > 0.8
    assert "although it is not given" in found["intensity -> site"].advice


def test_what_cannot_be_asked_is_said() -> None:
    values = {"type": ["a"] * 11 + ["b"], "scan": [str(i) for i in range(12)], "gone": [None] * 12}
    rows = rows_of(
        {"type": {}, "scan": {"input": False}, "gone": {}},
        values,
        lesion=[1.0] * 10 + [0, 0],
        core=[np.nan] * 6 + [1.0] * 6,
    )
    found = asked(rows, np.ones((12, 2)))
    assert not any("core" in about for about in found)
    assert {*rows.notes} == {
        "gone is left out: none of the drawn cases has a value",
        "presence of lesion is not audited: 2 subjects are unlike the others, 5 are needed",
        "label core is annotated in 6 subjects: not audited",
        "intensity is the same in all images: nothing is predicted from it",
    }
    rows.notes.clear()
    asked(rows, np.random.default_rng(0).normal(size=(12, 2)))
    assert (
        "intensity -> type is not audited: fewer than two values with 5 subjects each" in rows.notes
    )


def test_a_key_of_another_kind_is_left_out_and_said() -> None:
    rows = rows_of({"age": {"kind": "continuous"}}, {"age": ["1", "2", "3"]}, lesion=[1, 2, 3])
    add_keys(rows, {"embedding": MetadataKey().model_copy(update={"kind": "vector"})})
    assert rows.notes == ["embedding is left out: kind vector is not audited"]
    assert [c.name for c in rows.columns] == ["age"] == [*rows.encoded]


def test_a_histograms_numbers_by_hand() -> None:
    x = np.array([[0, 0, 0, 1], [1, 1, 2, 3]], float)
    found = of_channel(x)
    assert found.shape == (13,)
    assert found[[0, 3, 6]] == pytest.approx(np.percentile(x, (1, 50, 99)))
    assert found[7:10] == pytest.approx([1, np.sqrt(1), 3 / 8])
    assert found[10:12] == pytest.approx([stats.skew(x.ravel()), stats.kurtosis(x.ravel())])
    assert found[12] == pytest.approx(stats.entropy([3, 3, 1, 1]))
    assert of_channel(np.zeros((2, 2))).tolist() == [0] * 9 + [1, 0, 0, 0]


def planned(
    tmp_path: Path, cases: list[Case], metadata: dict[str, Any], **sections: Any
) -> PlanFolder:
    """A plan without images: every image 10 x 10 x 10 voxels of 2 mm, the label in 1000 of them."""
    data = {"root": str(tmp_path), "contrasts": ["T1w"], "labels": {"lesion": 1}}
    config = parse({"data": data, "metadata": metadata, **sections}, "test")
    facts = [
        {"id": c.id, "digest": c.images[0].name, "shape": [10, 10, 10], "spacing": [2.0, 2.0, 2.0],
         "voxels": {"lesion": 1000} if c.labels else {}}
        for c in cases if c.images[0] is not None
    ]  # fmt: skip
    (tmp_path / "fingerprint.json").write_text(json.dumps({"cases": facts}), encoding="utf-8")
    subjects = sorted({c.subject for c in cases})
    folds = [
        {"train": [s for s in subjects if s not in subjects[k::2]], "val": subjects[k::2]}
        for k in range(2)
    ]
    return PlanFolder(tmp_path, config, None, cases, folds)  # type: ignore[arg-type]


def case(subject: str, visit: str = "a", image: str = "", **values: Any) -> Case:
    labels = {"lesion": Path("y")} if visit == "a" else {}
    name = subject + visit
    return Case(name, subject, (Path(image or name),), labels, values)


def test_one_case_of_each_subject_and_one_subject_of_identical_images_is_drawn(
    tmp_path: Path,
) -> None:
    cases = [case(f"s{i}", v, site=v) for i in range(6) for v in "abc"]
    cases += [case("twin", image="s3b", site="a")]
    plan = planned(tmp_path, cases, {"site": {}})
    drawn = [[c.id for c in read_rows(plan, seed).cases] for seed in range(8)]
    assert all([name[:2] for name in names] == [f"s{i}" for i in range(6)] for names in drawn)
    assert {n[2] for names in drawn for n in names} == {*"abc"} and drawn[0] != drawn[1]
    rows = read_rows(plan, 0)
    assert rows.notes == [
        "subjects count, not cases: one of the 19 cases of each of the 7 subjects was drawn",
        "left out, images identical to another subject's: twin",
    ]
    first = np.array([c.id.endswith("a") for c in rows.cases])
    assert np.isnan(rows.volumes["lesion"][~first]).all()
    assert rows.volumes["lesion"][first] == pytest.approx(8.0)
    assert rows.fold.tolist() == [0, 1, 0, 1, 0, 1]
    assert rows.geometry[0] == pytest.approx(np.log([10, 10, 10, 2, 2, 2]))


def test_values_that_teach_nothing_are_named(tmp_path: Path) -> None:
    """16 subjects; type c has two, of which one is in the training of each fold; all b are of site y."""
    kinds = ["a"] * 8 + ["b"] * 6 + ["c"] * 2
    cases = [
        case(
            f"s{i:02d}",
            type=kind,
            scan=str(i),
            one="same",
            hospital="y" if kind == "b" or i % 2 else "x",
        )
        for i, kind in enumerate(kinds)
    ]
    metadata = {"type": {}, "scan": {}, "one": {}, "hospital": {"input": False}}
    plan = planned(tmp_path, cases, metadata)
    rows = read_rows(plan, 0)
    found = {(f.kind, f.about): f for f in value_findings(rows, plan)}
    assert {*found} == {
        ("constant", "one"),
        ("identifier", "scan"),
        ("rare", "type = c"),
        ("one site", "type = b"),
    }
    assert (
        found["identifier", "scan"].level == "warning" and found["identifier", "scan"].value == 16
    )
    assert (
        found["rare", "type = c"].value == 1 and "a (4 in fold 0)" in found["rare", "type = c"].text
    )
    assert found["one site", "type = b"].text == "All 6 subjects with type = b have hospital = y."
    plan.config.metadata["scan"].input = False
    rows = read_rows(plan, 0)
    assert ("identifier", "scan") not in {(f.kind, f.about) for f in value_findings(rows, plan)}


def test_few_subjects_are_audited_for_their_values_alone(tmp_path: Path) -> None:
    cases = [case(f"s{i}", site="x") for i in range(9)]
    result = audit(planned(tmp_path, cases, {"site": {}}))
    assert (result["cases"], result["subjects"]) == (9, 9)
    assert {f["kind"] for f in result["findings"]} == {"constant", "rare"}
    assert result["notes"][0].startswith("9 subjects are too few to look for associations (10")


def test_a_plan_without_keys_or_with_another_fingerprint_is_refused(tmp_path: Path) -> None:
    cases = [case("s0", site="x")]
    with pytest.raises(UserError, match="nothing to audit"):
        audit(planned(tmp_path, cases, {}))
    plan = planned(tmp_path, cases, {"site": {}})
    plan.cases.append(case("s1", site="y"))
    with pytest.raises(UserError, match="has no case 's1a'"):
        audit(plan)
    (tmp_path / "fingerprint.json").write_text('{"cases": [{"id": "s0a"}]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"not the fingerprint of a plan: cases.0.digest"):
        audit(plan)


def test_the_page_escapes_names_and_shows_the_worst_first() -> None:
    findings = [
        Finding("label", "<b> -> volume of x", "R2", 0.9, 0.8, 1.0, 0, 40, 0.0002, 0.004, "warning",
                "<b> alone predicts x.", "Leave it out."),
        Finding("rare", "k = v", "subjects", 3, None, None, 5, 40, None, None, "look", "Few.", "Join."),
        Finding("confounding", "a - b", "eta", 0.1, 0.0, 0.3, 0.2, 40, 0.5, 1.0, "fine", "None.", "-"),
    ]  # fmt: skip
    result = {
        "cases": 50,
        "subjects": 40,
        "notes": ["n & m"],
        "findings": [f.to_json() for f in findings],
    }
    text = page(result)
    assert "<b> ->" not in text and "&lt;b&gt; -&gt; volume of x" in text and "n &amp; m" in text
    assert (
        text.index("Warnings (1)")
        < text.index("Worth a look (1)")
        < text.index("Nothing found (1)")
    )
    shown = "\n".join(lines(result))
    assert "cases 50, subjects 40: warnings 1, worth a look 1, nothing found 1" in shown
    assert shown.index("warning: <b> alone") < shown.index("look: Few. Join.")
    assert "a - b" not in shown and "note: n & m" in shown


def test_the_command_audits_a_configuration_and_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The phantoms' tumour type decides which parts are the target; a column codes its volume."""
    write_data_set(tmp_path / "data", 12, (24, 24, 8))
    write_configuration(tmp_path / "config.yaml", quick=True)
    assert main(["plan", str(tmp_path / "config.yaml"), str(tmp_path / "plain")]) == 0
    table = tmp_path / "data" / "participants.tsv"
    volumes = [
        f["voxels"]["target"]
        for f in json.loads((tmp_path / "plain" / "fingerprint.json").read_text())["cases"]
    ]
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    rows = [f"{r}\t{v * 0.144:.2f}" for r, v in zip(rows, volumes, strict=True)]
    table.write_text("\n".join([f"{head}\tmillilitres", *rows]) + "\n", encoding="utf-8")
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    text = text.replace("metadata:\n", "metadata:\n  millilitres: {kind: continuous}\n")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert main(["audit", str(tmp_path / "config.yaml"), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "warning: millilitres alone predicts the volume of target" in out
    made = json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert (made["cases"], made["subjects"]) == (12, 12)
    assert made["findings"][0]["level"] == "warning" and made["findings"][-1]["level"] == "fine"
    assert any(f["about"] == "intensity -> millilitres" for f in made["findings"])
    assert "fastfilm audit" in (tmp_path / "audit" / "audit.html").read_text(encoding="utf-8")
    assert main(["plan", str(tmp_path / "config.yaml"), str(tmp_path / "plan")]) == 0
    assert main(["audit", str(tmp_path / "plan"), "--seed", "3", "--out", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "audit.json").read_text(encoding="utf-8")) == made
    assert audit(read_plan(tmp_path / "plan"), 3) == made
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "nothing")]) == 1
    assert "not a plan" in capsys.readouterr().err
