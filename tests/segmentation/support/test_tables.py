"""Tables, sidecars, YAML and names of files: what users write, and what is said about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

import yaml

from fastfilm.segmentation.config.schema import read_config
from fastfilm.segmentation.data.sidecars import Sidecars, data_set_of
from fastfilm.segmentation.support.errors import Problems, UserError
from fastfilm.segmentation.support.hints import contents, did_you_mean
from fastfilm.segmentation.support.names import file_name
from fastfilm.segmentation.support.tables import read_table
from fastfilm.segmentation.support.yaml_files import load_yaml


def test_a_table_is_its_columns_rows_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbfparticipant_id\t age \r\n\r\nsub-1\t 30\r\nsub-2\t\r\n")
    table = read_table(path)
    assert table.columns == ["participant_id", "age"] and table.lines == [3, 4]
    assert table.rows == [
        {"participant_id": "sub-1", "age": "30"},
        {"participant_id": "sub-2", "age": ""},
    ]


TABLES = [
    ("a.tsv", b"", "the table is empty"),
    ("a.tsv", b"\n\n", "the table is empty"),
    (
        "a.tsv",
        b"participant_id,age\nsub-1,30\n",
        "separated by commas; a .tsv table is separated by tabs",
    ),
    ("a.csv", b"id;age\n1;30\n", "separated by semicolons; a .csv table is separated by commas"),
    ("a.csv", b"id\tage\n1\t30\n", "separated by tabs"),
    ("a.csv", b"id,age,id\n1,2,3\n", "column 'id' is there 2 times"),
    ("a.csv", b"id,age\n1,2,3\n", "line 2 has 3 cells, the header has 2 columns"),
    ("a.csv", b"id,age\n1,2\n3\n", "line 3 has 1 cells, the header has 2 columns"),
    ("a.csv", b'id,age\n1,"2\n3,4\n', "line 3"),
    ("a.tsv", b'id\tage\n1\t"a\n2\tb"\n', "a cell goes over several lines"),
    (
        "a.tsv",
        "id\tage\nMüller\t3\n".encode("latin-1"),
        "line 2 is not UTF-8 .* save the file as UTF-8",
    ),
    ("a.tsv", "id\tage\n1\t3\n".encode("utf-16"), "UTF-16, not UTF-8 text: save the file as UTF-8"),
    ("a.tsv", "id\tage\n1\t3\n".encode("utf-16-le"), "not UTF-8 text"),
    ("a.csv", b"PK\x03\x04xl/workbook.xml", "Excel or ZIP file"),
]


@pytest.mark.parametrize(("name", "data", "message"), TABLES)
def test_what_is_wrong_with_a_table_is_said_with_its_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: .*{message}|{name}: {message}"):
        read_table(tmp_path / name)


def tree(root: Path, **files: Any) -> Path:
    """A BIDS subject with one image, and JSON files (``/`` written as ``__``)."""
    image = root / "sub-1" / "ses-2" / "anat" / "sub-1_ses-2_run-1_T2w.nii.gz"
    image.parent.mkdir(parents=True)
    image.touch()
    for name, value in files.items():
        path = root / name.replace("__", "/").replace("9", "-")
        path.with_suffix(".json").write_text(json.dumps(value))
    return image


def test_sidecars_further_up_hold_unless_a_nearer_one_says_otherwise(tmp_path: Path) -> None:
    wrong: list[str] = []
    image = tree(
        tmp_path,
        T2w={"EchoTime": 1, "a": 1, "b": 1, "c": 1, "d": 1},
        T1w={"EchoTime": 5, "e": 1},
        sub91__sub91_T2w={"a": 2, "b": 2, "c": 2},
        sub91__sub92_T2w={"a": 9},
        sub91__ses92__sub91_ses92_T2w={"b": 3, "c": 3},
        sub91__ses92__anat__sub91_ses92_run91_T2w={"c": 4},
        sub91__ses92__anat__sub91_ses92_run92_T2w={"c": 9},
    )
    found = Sidecars(wrong.append).of(image, tmp_path)
    assert found.values == {"EchoTime": 1, "a": 2, "b": 3, "c": 4, "d": 1} and not wrong
    assert found.inherited == {"EchoTime", "a", "b", "d"}
    alone = Sidecars(wrong.append).of(image)
    assert alone.values == {"c": 4} and not alone.inherited
    assert data_set_of(image) is None
    (tmp_path / "dataset_description.json").write_text("{}")
    assert data_set_of(image) == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1, 2]", "must be a JSON object of keys and values, got a list"),
        (b'{"a": 1', "cannot be read as JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": "é"}'.encode("latin-1"), "save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (None, "is a link to .* not there"),
    ],
)
def test_a_sidecar_that_cannot_be_read_is_a_problem_said_once(
    tmp_path: Path, text: bytes | None, message: str
) -> None:
    image = tree(tmp_path)
    path = tmp_path / "T2w.json"
    if text is None:
        path.symlink_to(tmp_path / "annex" / "x")
    else:
        path.write_bytes(text)
    wrong: list[str] = []
    sidecars = Sidecars(wrong.append)
    for _ in range(2):
        assert sidecars.of(image, tmp_path).values == {}
    (line,) = wrong
    assert re.search(f"T2w.json: .*{message}", line)


def test_nan_in_a_sidecar_is_a_missing_value(tmp_path: Path) -> None:
    image = tree(tmp_path)
    image.with_name("sub-1_ses-2_run-1_T2w.json").write_text('{"a": NaN, "b": [1, NaN]}')
    assert Sidecars(lambda _: None).of(image).values == {"a": None, "b": [1, None]}


def test_a_key_that_is_there_twice_is_an_error_in_yaml() -> None:
    assert load_yaml("a: 1\nb: {a: 2}\nc: &x {d: 1}\ne: {<<: *x, f: 2}") == {
        "a": 1, "b": {"a": 2}, "c": {"d": 1}, "e": {"d": 1, "f": 2},
    }  # fmt: skip
    with pytest.raises(yaml.YAMLError, match="key 'a' is there twice: in line 2 and line 4"):
        load_yaml("x:\n  a: 1\n  b: 2\n  a: 3\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trainig: {epochs: 3}", "trainig: unknown key; did you mean 'training'?"),
        ("training: {epoch: 3}", "training.epoch: unknown key; did you mean 'epochs'?"),
        ("epochs: 3", "epochs: unknown key; did you mean 'training.epochs'?"),
        ("training: {optimizer: adam}", "got 'adam'; did you mean 'adamw'?"),
        (
            "metadata: {age: {knd: continuous}}",
            "metadata.age.knd: unknown key; did you mean 'kind'?",
        ),
        ("metadata: {age: {kind: continous}}", "did you mean 'continuous'?"),
        ("metadata: {x: {values: [yes, no]}}", "put such values in quotes"),
    ],
)
def test_a_slip_in_a_key_or_value_is_answered_with_what_is_meant(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{root: x, contrasts: [T1w], labels: {{a: 1}}}}\n{line}\n")
    with pytest.raises(Problems) as error:
        read_config(path)
    assert message in str(error.value)


def test_a_configuration_in_another_encoding_says_so(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("data: é".encode("latin-1"))
    with pytest.raises(UserError, match="save the file as UTF-8"):
        read_config(tmp_path / "c.yaml")


HOSTILE = [
    "..", ".", "", "/", "a/b", "../../x", "/etc/passwd", "x/../../../ESC", "a\\b", "a\nb", "a\0b", " ", "a b", "~",
    "$HOME", "`x`", ".hidden", "x.", "con:1", "*?", "é" * 300, "\udce9", "-rf", "%2F", "a%b", "a\u202eb",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_users_lead_out_of_no_folder(tmp_path: Path, text: str) -> None:
    name = file_name(text)
    path = tmp_path / f"{name}.json"
    path.write_text("x")
    assert path.resolve().parent == tmp_path.resolve() and not name.startswith(".")
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.json"]


def test_hostile_names_are_all_different() -> None:
    assert len({file_name(t) for t in HOSTILE}) == len(HOSTILE)


@given(st.text(max_size=8), st.text(max_size=8))
def test_two_names_never_become_one(a: str, b: str) -> None:
    assert (file_name(a) == file_name(b)) == (a == b)


def test_ordinary_names_stay_as_they_are() -> None:
    for text in ("sub-01_ses-2_T1w", "tumor_type=astrocytoma", "GTV(1)+2", "Größe", "a.b"):
        assert file_name(text) == text


def test_the_word_that_was_meant() -> None:
    assert did_you_mean("tumour_type", ["age", "tumor_type"]) == "; did you mean 'tumor_type'?"
    assert did_you_mean("AGE", ["age"]) == "; did you mean 'age'?"
    assert did_you_mean("x", ["age"]) == ""


def test_a_folder_of_dicom_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(40))
    (tmp_path / "b.dcm").write_bytes(b"x")
    (tmp_path / "n.txt").write_text("x")
    text = contents(tmp_path)
    assert "2 DICOM files" in text and "dcm2niix" in text
