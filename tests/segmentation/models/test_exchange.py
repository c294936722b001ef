"""Weights of ivadomed as a model folder, and ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import fastfilm
from fastfilm.segmentation.commands import cli
from fastfilm.segmentation.models.folder import load_model

from ...support.models import TYPES, make_model


def run(*argv: Any) -> int:
    return cli.run(str(argv[0]), [str(a) for a in argv[1:]])


@pytest.mark.parametrize(("dims", "outputs"), [(2, 1), (2, 3), (3, 1)])
def test_imported_weights_predict_what_ivadomed_does(
    tmp_path: Path, dims: int, outputs: int
) -> None:
    torch.manual_seed(0)
    norm = "batch" if dims == 2 else "instance"
    net = fastfilm.FiLMedUNet(
        2,
        outputs,
        spatial_dims=dims,
        depth=2,
        base_filters=4,
        metadata_size=3,
        norm=norm,
        final_activation="sigmoid",
        drop_background=outputs > 1,
    ).eval()
    torch.save(net.to_ivadomed(), tmp_path / "weights.pt")
    names = [f"l{i}" for i in range(max(1, outputs - 1))]
    argv = ["import", tmp_path / "weights.pt", tmp_path / "model", "--contrast", "T1w"]
    argv += ["--contrast", "FLAIR", *(x for n in names for x in ("--label", n))]
    argv += ["--metadata", "tumor_type=" + ",".join(TYPES), "--patch", ",".join(["8"] * dims)]
    assert run(*argv) == 0
    model = load_model(tmp_path / "model")
    x = torch.randn(2, 2, *[8] * dims)
    rows = torch.eye(3)[[1, 2]]
    with torch.no_grad():
        torch.testing.assert_close(model.probabilities(x, rows), net(x, rows))
    assert model.encode({"tumor_type": TYPES[2]}).tolist() == [[0, 0, 1]]


def test_what_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=2, metadata_size=3)
    torch.save(net.to_ivadomed(), tmp_path / "w.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "bad.safetensors").write_bytes(b"hello" * 20)
    first = "encoder.down_path.0.conv1.weight"
    whole = dict(net.to_ivadomed())
    torch.save({**whole, first: torch.zeros(3)}, tmp_path / "flat.pt")
    torch.save({**whole, first: whole[first] * float("nan")}, tmp_path / "nan.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    end = ["--contrast", "T1w", "--label", "x", "--patch", "8,8"]
    for name, more, message in (
        ("w.pt", ["--metadata", "tumor_type=a,b"], "has 3 --metadata values, got 2"),
        ("w.pt", ["--metadata", "tumor_type"], "KEY=VALUE"),
        ("other.pt", [], "other.pt"),
        ("text.pt", [], "without executing code"),
        ("module.pt", [], "without executing code"),
        ("none.pt", [], "no such file"),
        ("w.pt", ["--metadata", "tumor_type="], "KEY=VALUE"),
        ("w.pt", ["--metadata", "tumor_type=a,,b"], "a name is empty"),
        ("w.pt", ["--metadata", "tumor_type=a,b,a"], "'a' is there twice"),
        ("w.pt", ["--label", "x"], "'x' is there twice"),
        ("w.pt", ["--contrast", "T1w"], "'T1w' is there twice"),
        ("w.pt", ["--patch", "0,8"], "above 0"),
        ("w.pt", ["--patch", "-8,8"], "above 0"),
        ("w.pt", ["--metadata", "tumor_type=a,b,c", "--patch", "1,8"], "at least 2"),
        ("bad.safetensors", [], "bad.safetensors: not a safetensors file"),
        ("flat.pt", [], "flat.pt: not weights of such a network"),
        ("nan.pt", [], "finite"),
    ):
        assert run("import", tmp_path / name, tmp_path / "model", *end, *more) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "model").exists()


def test_a_model_that_is_there_is_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=2)
    torch.save(net.to_ivadomed(), tmp_path / "w.pt")
    argv = ["import", tmp_path / "w.pt", tmp_path / "model", "--contrast", "T1w", "--label", "x"]
    argv += ["--patch", "8,8"]
    assert run(*argv) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    assert run(*argv) == 1
    assert "there is a model in it already" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize("name", ["x.txt", "x", "x.onnx.gz", "folder.onnx"])
def test_an_unknown_format_is_refused_before_anything_is_loaded(
    tmp_path: Path, name: str, capsys: Any
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    assert run("export", tmp_path / "no-model", tmp_path / name) == 1
    error = capsys.readouterr().err
    assert name in error and "no-model" not in error


def test_an_exported_model_takes_metadata_and_agrees(tmp_path: Path, capsys: Any) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    import onnxruntime

    make_model(tmp_path / "model", spatial_dims=2, patch_size=[8, 8])
    path = tmp_path / "model.onnx"
    assert run("export", tmp_path / "model", path) == 0
    assert "agrees to" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()] == ["image", "metadata"]
    info = json.loads(session.get_modelmeta().custom_metadata_map["fastfilm"])
    assert info["labels"][0]["name"] == "lesion"
    model = load_model(tmp_path / "model")
    x, row = torch.randn(1, 1, 8, 8), model.encode({"tumor_type": TYPES[1]})
    (found,) = session.run(None, {"image": x.numpy(), "metadata": row})
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(found), model.probabilities(x, row), atol=1e-4, rtol=1e-3
        )
