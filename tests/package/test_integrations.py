"""fastfilm inside nnU-Net's training and MONAI's inference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastfilm
from fastfilm.integrations.nnunet import cases
from fastfilm.integrations.nnunet.settings import settings

ROWS = {
    "a": {"tumour": "x", "age": "10"},
    "b": {"tumour": "y", "age": "n/a"},
    "c": {"tumour": "", "age": "30"},
}


def write(path: Path) -> Path:
    lines = ["case,tumour,age", *(f"{k},{v['tumour']},{v['age']}" for k, v in ROWS.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_table_and_json_files_give_the_same_rows(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv")
    for case, values in ROWS.items():
        (tmp_path / f"{case}.json").write_text(json.dumps(values), encoding="utf-8")
    found = cases.read(str(table), ["tumour", "age"], ROWS)
    assert found == cases.read(str(tmp_path), ["tumour", "age"], ROWS) == ROWS
    description = cases.describe(found, ["tumour", "age"])
    assert description[0]["values"] == ["x", "y"] and description[1]["numbers"]
    rows = torch.tensor([cases.row(found[c], description, c) for c in ROWS])
    encoder = cases.Columns(description)
    encoder.fit(rows)
    features = encoder(rows)
    assert features.shape == (3, encoder.size) == (3, 5)
    assert features[:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert features[:, 3].tolist() == [-1, 0, 1] and features[:, 4].tolist() == [0, 1, 0]


def test_what_a_table_lacks_is_named(tmp_path: Path) -> None:
    table = str(write(tmp_path / "table.csv"))
    with pytest.raises(FileNotFoundError, match="FASTFILM_NNUNET_TABLE=nowhere"):
        cases.read("nowhere", ["age"], ["a"])
    with pytest.raises(ValueError, match="no row for case 'z'"):
        cases.read(table, ["age"], ["z"])
    with pytest.raises(ValueError, match="no column 'sex' for case 'a'"):
        cases.read(table, ["sex"], ["a"])
    description = cases.describe(cases.read(table, ["tumour", "age"], ROWS), ["tumour", "age"])
    with pytest.raises(ValueError, match=r"case 'n': tumour must be one of \['x', 'y'\], got 'z'"):
        cases.row({"tumour": "z", "age": "1"}, description, "n")
    with pytest.raises(ValueError, match="case 'n': age must be a number, got 'old'"):
        cases.row({"tumour": "x", "age": "old"}, description, "n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TABLE", "t.csv", "must be set together"),
        ("WHERE", "middle", "FASTFILM_NNUNET_WHERE must be one of"),
        ("META", "tumour", "FASTFILM_NNUNET_META must be like column=value"),
        ("EPOCHS", "0", "FASTFILM_NNUNET_EPOCHS must be a positive integer"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FASTFILM_NNUNET_{name}", value)
    with pytest.raises(ValueError, match=message):
        settings()


def test_sliding_windows_carry_the_row_of_their_own_sample() -> None:
    pytest.importorskip("monai")
    from fastfilm.integrations.monai import ConditionedSlidingWindowInferer

    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU()
    net = fastfilm.condition(nn.Sequential(*layers).eval(), 2, where="all")
    for p in fastfilm.generator_parameters(net):
        nn.init.normal_(p)
    inferer = ConditionedSlidingWindowInferer((16, 16), sw_batch_size=3, mode="gaussian")
    x, rows = torch.randn(2, 1, 40, 24), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        whole = inferer(x, net, metadata=rows)
        for i in range(2):
            alone = inferer(x[i : i + 1], net, metadata=rows[i])
            torch.testing.assert_close(whole[i : i + 1], alone)
        assert not torch.allclose(inferer(x, net, metadata=rows.flip(0)), whole)
    with pytest.raises(ValueError, match="1 row or one for each of the 2 samples, got 3"):
        inferer(x, net, metadata=torch.rand(3, 2))
    with pytest.raises(TypeError, match="metadata is missing"):
        inferer(x, net)


@pytest.mark.skipif(
    os.environ.get("FASTFILM_SLOW_TESTS") != "1", reason="two minutes; FASTFILM_SLOW_TESTS=1"
)
def test_nnunet_trains_two_epochs_and_predicts_with_metadata(tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2")
    nib = pytest.importorskip("nibabel")
    from fastfilm.phantom import make_phantom

    data = tmp_path / "raw" / "Dataset001_Phantom"
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (data / folder).mkdir(parents=True)
    kinds = ["astrocytoma", "ependymoma", "hemangioblastoma"]
    rows = ["case,tumour,age"]
    for i in range(6):
        image, mask = make_phantom(shape=(40, 40, 24), tumour_type=kinds[i % 3], seed=i)
        for folder in ("imagesTr", "imagesTs")[: 2 if i < 2 else 1]:
            nib.save(image, data / folder / f"case{i}_0000.nii.gz")
        label = nib.Nifti1Image((mask.get_fdata() > 0).astype(np.uint8), mask.affine)
        nib.save(label, data / "labelsTr" / f"case{i}.nii.gz")
        rows.append(f"case{i},{kinds[i % 3]},{20 + i}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows), encoding="utf-8")
    description: dict[str, Any] = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (data / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    site = tmp_path / "site"
    site.mkdir()
    # torchvision without its operators does not import, and nnU-Net imports it
    (site / "sitecustomize.py").write_text(
        "try:\n    import torchvision\nexcept Exception:\n    import torch\n"
        "    kept = torch.library.Library('torchvision', 'DEF')\n"
        "    kept.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "    kept.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n",
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "nnUNet_raw": str(tmp_path / "raw"),
        "nnUNet_preprocessed": str(tmp_path / "pre"),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "PYTHONPATH": str(site),
    }

    def run(*command: str, **more: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    folder = run(Path(sys.executable).name, "-m", "fastfilm.integrations.nnunet").strip()
    with_table = {
        "nnUNet_extTrainer": folder,
        "nnUNet_n_proc_DA": "0",
        "FASTFILM_NNUNET_TABLE": str(table),
        "FASTFILM_NNUNET_COLUMNS": "tumour,age",
        "FASTFILM_NNUNET_EPOCHS": "2",
        "FASTFILM_NNUNET_ITERATIONS": "2",
    }
    train = ("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", "nnUNetTrainerFastFiLM")
    assert "Mean Validation Dice" in run(*train, "-device", "cpu", **with_table)
    model = next((tmp_path / "results").glob("*/nnUNetTrainerFastFiLM__*"))
    assert json.loads((model / "plans.json").read_text())["fastfilm"]["columns"][1]["numbers"]
    run(
        Path(sys.executable).name,
        *("-m", "fastfilm.integrations.nnunet.predict", str(model), str(data / "imagesTs")),
        *(str(tmp_path / "out"), "--table", str(table), "--device", "cpu", "--disable-tta"),
        **{"nnUNet_extTrainer": folder},
    )
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    run(
        *("nnUNetv2_predict", "-i", str(data / "imagesTs"), "-o", str(tmp_path / "same")),
        *("-d", "1", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerFastFiLM"),
        *("-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"),
        **{"nnUNet_extTrainer": folder, "FASTFILM_NNUNET_META": "tumour=ependymoma,age=30"},
    )
    assert len(list((tmp_path / "same").glob("*.nii.gz"))) == 2
