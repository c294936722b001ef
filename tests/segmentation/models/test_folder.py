"""A model folder: its files belong together, damage is refused, one process writes to it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

import fastfilm
from fastfilm.segmentation.models.folder import (
    FORMAT,
    load_model,
    read_info,
    save_weights,
)
from fastfilm.segmentation.support.errors import Problems, UserError
from fastfilm.segmentation.support.files import read_tensors, write_tensors
from fastfilm.segmentation.support.lock import NAME, locked

from ...support.models import make_model


def change(folder: Path, **values: Any) -> None:
    """Other values in model.json."""
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sealed(folder: Path, **changes: Any) -> None:
    """A model with weights that name their model.json."""
    model = make_model(folder, **changes)
    save_weights(folder, "best", model.network, model.info)


# locks


def test_a_folder_is_written_by_one_process_and_the_other_is_told_which(tmp_path: Path) -> None:
    code = (
        "import sys; from fastfilm.segmentation.support.lock import locked\n"
        "with locked(sys.argv[1], 'fastfilm train'): print('locked', flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "model"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as error, locked(folder, "fastfilm train"):
            pass
        assert f"process {other.pid}" in str(error.value) and "since" in str(error.value)
        other.send_signal(signal.SIGKILL)
    assert (folder / NAME).exists()
    with locked(folder, "fastfilm predict"):
        assert json.loads((folder / NAME).read_text())["pid"] == os.getpid()
    assert not (folder / NAME).exists()


def test_a_process_does_not_lock_a_folder_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        locked(tmp_path, "one"),
        pytest.raises(UserError, match=r"one .* is writing"),
        locked(tmp_path / "link", "two"),
    ):
        pass
    with locked(tmp_path, "again"):
        pass


def test_a_forked_child_does_not_have_its_parents_lock(tmp_path: Path) -> None:
    def child(answers: Any) -> None:
        try:
            with locked(tmp_path, "child"):
                answers.put("locked")
        except UserError as error:
            answers.put(str(error))

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with locked(tmp_path, "parent"):
        process = context.Process(target=child, args=(answers,))
        process.start()
        assert f"parent (process {os.getpid()}" in answers.get(timeout=60)
        process.join()


@pytest.mark.parametrize("left", ["", "{", '{"pid": %d, "host": "%s"}'])
def test_a_lock_left_behind_is_taken_over_also_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.lockf", refused)
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = os.uname().nodename
    (tmp_path / NAME).write_text(left % (gone.pid, host) if "%" in left else left)
    with locked(tmp_path, "one"):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    # of this very process, but not by this block: alive
    (tmp_path / NAME).write_text(json.dumps({"pid": os.getpid(), "host": host, "command": "two"}))
    with pytest.raises(UserError, match=r"two .* is writing"), locked(tmp_path, "one"):
        pass
    (tmp_path / NAME).write_text(json.dumps({"pid": gone.pid, "host": "elsewhere"}))
    with pytest.raises(UserError, match="if it is gone, remove"), locked(tmp_path, "one"):
        pass


def test_a_folder_made_for_the_lock_goes_with_it_if_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new", "one"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"), locked(tmp_path / "file", "x"):
        pass


# files that belong together


def test_any_changed_bit_of_a_tensor_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    tensors = {"a": torch.randn(2), "n": torch.tensor(3), "on": torch.ones(1, dtype=torch.bool)}
    tensors["half"] = torch.randn(1).bfloat16()
    write_tensors(path, tensors, {"state": '{"step": 1}'})
    back, about = read_tensors(path)
    assert about == {"state": '{"step": 1}'} and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in back)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last\.safetensors: "):
            read_tensors(path)
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"last\.safetensors: "):
            read_tensors(path)


def test_the_same_tensors_make_the_same_file_which_other_readers_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.randn(3, 2), "b": torch.zeros(0, 2), "c": torch.tensor(1)}
    tensors["same memory"] = tensors["a"]
    for name in ("one", "two"):
        write_tensors(tmp_path / name, tensors, {"x": "1", "y": "2"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert all(torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "one").items())
    # a file without a checksum
    save_file({"a": tensors["a"]}, tmp_path / "plain", {"format": "pt"})
    assert read_tensors(tmp_path / "plain")[1] == {"format": "pt"}


def test_weights_beside_another_model_json_are_refused(tmp_path: Path) -> None:
    sealed(tmp_path / "a")
    assert load_model(tmp_path / "a").info.format == FORMAT
    change(tmp_path / "a", training={"note": "any"}, fastfilm="0.0.1")
    load_model(tmp_path / "a")
    sealed(tmp_path / "b", patch_size=[16, 16, 16])
    (tmp_path / "b" / "model.json").replace(tmp_path / "a" / "model.json")
    with pytest.raises(
        UserError, match=r"model\.json is not the one that best\.safetensors was trained with"
    ):
        load_model(tmp_path / "a")


def test_a_newer_version_is_told_and_a_newer_major_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed(tmp_path)
    major, minor, _ = (int(n) for n in fastfilm.__version__.split(".")[:3])
    change(tmp_path, fastfilm=f"{major}.{minor + 1}.0")
    load_model(tmp_path)
    load_model(tmp_path)
    assert capsys.readouterr().err.count(f"fastfilm {major}.{minor + 1}.0") == 1
    change(tmp_path, fastfilm=f"{major + 1}.0.0")
    with pytest.raises(UserError, match="newer major version"):
        load_model(tmp_path)


WRONG: dict[str, Any] = {
    "truncated": '{"format": 2, "labels": [',
    "a list": "[1, 2]",
    "text": '"model"',
    "no text": b"\xff\xfe\x00",
    "empty": "",
    "deep": '{"format":' + "[" * 100_000,
    "a format that is no number": '{"format": true}',
    "a format of old": '{"format": 0}',
    "nan": '{"format": 2, "divisor": NaN}',
    "a long number": '{"format": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_json_that_is_none_is_a_clear_error(tmp_path: Path, name: str) -> None:
    content = WRONG[name]
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.json: not "):
        read_info(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"labels": 3},
        {"metadata": []},
        {"metadata": {"keys": [3]}},
        {"metadata": {"keys": [{"missing": 3}]}},
        {"in_channels": "many"},
        {"patch_size": [0, 8, 8]},
        {"patch_size": [8, 8]},
        {"network": None},
        {"unknown": 1},
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_wrong_values_in_a_model_json_are_listed(
    tmp_path: Path, values: dict[str, Any], version: int
) -> None:
    make_model(tmp_path)
    change(tmp_path, format=version, **values)
    with pytest.raises(Problems, match=next(iter(values))):
        read_info(tmp_path)


def test_a_model_json_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path)
    monkeypatch.setattr("fastfilm.segmentation.models.folder.LARGEST", 100)
    with pytest.raises(UserError, match="larger than"):
        read_info(tmp_path)


def test_a_model_of_format_1_predicts_as_before(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    new = make_model(tmp_path)
    value = json.loads((tmp_path / "model.json").read_text())
    value["format"] = 1
    value["metadata"]["keys"][0]["missing"] = ["?"]
    (tmp_path / "model.json").write_text(json.dumps(value))
    save_file(load_file(tmp_path / "best.safetensors"), tmp_path / "best.safetensors")
    old = load_model(tmp_path)
    assert old.info.format == FORMAT
    assert old.info.metadata.keys[0].missing == ["n/a", "na", "nan", "none", "null", "?"]
    unknown = old.encode({})
    for spelling in ("", "n/a", "NaN", " null ", "?"):
        assert (old.encode({"tumor_type": spelling}) == unknown).all(), spelling
    image, row = torch.randn(1, 1, 8, 8, 8), new.encode({"tumor_type": "ependymoma"})
    assert torch.equal(
        old.probabilities(image, old.encode({"tumor_type": "ependymoma"})),
        new.probabilities(image, row),
    )
