"""Prediction: windows, the way back to the file's grid, memory, bad input, what is left on disk."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

from fastfilm.segmentation.commands import cli
from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.images.preprocessing import Normalisation, Preprocessing
from fastfilm.segmentation.images.written import write_like
from fastfilm.segmentation.metadata.encoder import MetadataEncoder
from fastfilm.segmentation.models.folder import LabelInfo, LoadedModel
from fastfilm.segmentation.prediction import many_cases as prediction
from fastfilm.segmentation.prediction.one_case import (
    CaseNetwork,
    Options,
    predict,
    regridded,
)
from fastfilm.segmentation.prediction.postprocessing import fill_holes, keep_largest
from fastfilm.segmentation.prediction.windows import Timing, sliding_windows
from fastfilm.segmentation.support.errors import UserError

from ...support.models import TYPES, make_model

ORIENTATIONS = [
    "".join(axes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for axes in itertools.product(*order)
]


def whole(image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    parts = [(first, planes.clone()) for first, planes in sliding_windows(image, *args, **kwargs)]
    assert [f for f, _ in parts] == list(np.cumsum([0] + [p.shape[1] for _, p in parts]))[:-1]
    return torch.cat([p for _, p in parts], 1)


@pytest.mark.parametrize("patch", [(8, 8), (4, 8, 8), (16, 6, 10)])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_windows_of_a_voxelwise_network_give_its_output_on_every_voxel(patch, batch) -> None:
    image = torch.randn(2, 11, 13, 9, generator=torch.Generator().manual_seed(0))
    out = whole(image, patch, lambda x: torch.cat([x, x**2], 1), batch=batch)
    torch.testing.assert_close(out, torch.cat([image, image**2]))


def test_overlapping_windows_are_averaged_with_gaussian_weights() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    image = torch.randn(1, 12, 11, 14)
    total, weights = torch.zeros(2, 12, 11, 14), torch.zeros(12, 11, 14)
    x = torch.arange(8) - 3.5
    one = torch.exp(-0.5 * x**2).clamp_min(1e-3)  # deviation: 8 / 8
    weight = one[:, None, None] * one[:, None] * one
    with torch.no_grad():
        ours = whole(image, (8, 8, 8), network, overlap=0.5)
        for d, h, w in itertools.product((0, 4), (0, 3), (0, 3, 6)):
            at = (slice(d, d + 8), slice(h, h + 8), slice(w, w + 8))
            total[(slice(None), *at)] += weight * network(image[(slice(None), *at)])
            weights[at] += weight
    torch.testing.assert_close(ours, total / weights)


@pytest.mark.parametrize("crop", [(12, 10, 8), (5, 10, 8), (12, 21, 5)])
def test_planes_are_resampled_as_a_whole_volume_is(crop) -> None:
    preprocessing = Preprocessing(crop=False)
    geometry = preprocessing.geometry([np.zeros(crop[1:] + crop[:1])], np.eye(4))
    grid = (7, 10, 9)
    geometry = type(geometry)(**{**vars(geometry), "grid": grid})
    p = np.random.default_rng(0).random((2, *grid), np.float32)
    planes = ((i, torch.from_numpy(p[:, i : i + n])) for i, n in ((0, 2), (2, 1), (3, 4)))
    got = list(regridded(planes, geometry))
    assert [f for f, _ in got] == list(range(crop[0]))
    theirs = geometry.from_network(p).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(np.concatenate([a for _, a in got], 1), theirs, atol=1e-5)


class Threshold(torch.nn.Module):
    """Logits that are positive where the image is above a limit: the mask to expect is known."""

    def __init__(self, limit: float = 0.0) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        return x - self.limit


def transparent(model: LoadedModel) -> LoadedModel:
    model.network = Threshold()
    return model


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_predictions_lie_on_their_image_in_every_orientation(tmp_path, orientation) -> None:
    """A blob at known millimetres is found at them, through the files alone."""
    model = make_model(tmp_path / "model")
    model.network = Threshold(1.0)
    model.info.preprocessing = Preprocessing(channels=[Normalisation(kind="none")])
    rng = np.random.default_rng(1)
    ras = np.where(rng.random((9, 10, 7)) < 0.3, 2.0, -2.0).astype(np.float32)
    ras[0] = 0  # a border that is cropped off
    ras[0, 0, 0] = 2
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-4, 17, 5)
    image = nib.Nifti1Image(ras, affine)
    target = nib.orientations.axcodes2ornt(orientation)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), target)
    )
    path = tmp_path / "in" / "case.nii.gz"
    path.parent.mkdir()
    nib.save(turned, path)
    case = prediction.InputCase("case", "case", (path,), {"tumor_type": TYPES[0]})
    outcome = prediction.predict_cases(
        model, [case], tmp_path / "out", Options(), prediction.Writing()
    )
    assert not outcome.failed
    got = nib.load(tmp_path / "out" / "case.nii.gz")
    assert got.shape == turned.shape
    np.testing.assert_array_equal(got.affine, turned.affine)
    assert "".join(nib.aff2axcodes(got.affine)) == orientation
    # world position -> value, whatever the axes are
    back = nib.as_closest_canonical(got)
    np.testing.assert_array_equal(np.asarray(back.dataobj), ras > 0)


def test_the_header_keeps_the_images_geometry_and_nothing_of_its_intensities(tmp_path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), None)
    affine = np.array([[0, -2, 0.1, 5], [1, 0, 0, -3], [0, 0.1, 3, 1], [0, 0, 0, 1.0]])
    image.set_sform(affine, 2)
    image.set_qform(np.diag([1.0, 2, 3, 1]), 1)
    image.header.set_slope_inter(2.0, 1.0)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 700
    nib.save(image, tmp_path / "image.nii")
    write_like(tmp_path / "out.nii.gz", np.ones((2, 3, 4), np.uint8), tmp_path / "image.nii")
    source, got = nib.load(tmp_path / "image.nii"), nib.load(tmp_path / "out.nii.gz")
    for name in ("sform_code", "qform_code", "pixdim", "srow_x", "quatern_b", "qoffset_x"):
        np.testing.assert_array_equal(got.header[name], source.header[name], name)
    assert got.header.get_xyzt_units() == ("mm", "sec")
    assert got.get_data_dtype() == np.uint8 and float(got.header["cal_max"]) == 0
    assert np.asarray(got.dataobj).tolist() == np.ones((2, 3, 4)).tolist()


def high_water() -> int:
    """Highest resident memory in bytes since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays_below_that_of_the_probability_map(tmp_path) -> None:
    labels = [LabelInfo(name=f"l{i}", values=[i], value=i) for i in range(1, 13)]
    model = make_model(tmp_path, labels=labels, patch_size=[16, 96, 96])

    class Many(torch.nn.Module):
        def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return x.expand(-1, 12, -1, -1, -1)

    model.network = Many()
    volume = np.random.default_rng(0).standard_normal((96, 96, 384)).astype(np.float32)
    ready = model.preprocess([volume], np.eye(4))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not reset the high-water mark of memory")
    before = resident()
    found = predict(model, ready, {"tumor_type": TYPES[0]})
    grown = high_water() - before
    assert found.masks[3].sum() == (volume >= 0).sum()
    # 12 labels: 162 MiB of probabilities; the masks are 40 MiB, the strongest label 7 MiB
    assert grown < 0.6 * volume.nbytes * 12, f"{grown / 2**20:.0f} MiB"


def test_little_time_is_spent_around_the_network(tmp_path) -> None:
    model = make_model(tmp_path, network={"base_filters": 8, "depth": 2}, patch_size=[16, 32, 32])
    image = torch.randn(1, 32, 64, 64)
    network = CaseNetwork(model, {"tumor_type": TYPES[0]}, Options())
    with torch.no_grad():
        for _ in range(3):
            timing = Timing()
            whole(image, model.info.patch_size, network, timing=timing)
            if timing.overhead <= 0.1:
                break
    assert timing.overhead <= 0.1


def test_mirrored_predictions_are_averaged_in_the_images_own_direction(tmp_path) -> None:
    model = transparent(make_model(tmp_path))
    volume = np.random.default_rng(0).standard_normal((9, 12, 10)).astype(np.float32)
    ready = model.preprocess([volume], np.eye(4))
    found = predict(model, ready, {}, Options(flips=("sagittal", "axial")), probabilities=True)
    np.testing.assert_allclose(found.probabilities[0], 1 / (1 + np.exp(-volume)), atol=1e-5)

    class Position(torch.nn.Module):
        """Grows along the last axis of a window: right in orientation RAS is the first file axis."""

        def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return torch.arange(8.0)[:, None].expand_as(x) - 3.5

    model.network = Position()
    ready = model.preprocess([volume[:8, :8, :8]], np.eye(4))
    found = predict(model, ready, {}, Options(flips=("sagittal",)), probabilities=True)
    np.testing.assert_allclose(found.probabilities, 0.5, atol=1e-6)
    with pytest.raises(UserError, match="flips must be"):
        flat = make_model(tmp_path / "2d", spatial_dims=2, patch_size=[8, 8])
        predict(flat, ready, {}, Options(flips=("axial",)))


def test_dropout_samples_are_reproducible_and_give_uncertainty(tmp_path) -> None:
    model = make_model(tmp_path, network={"dropout": 0.5, "norm": "batch"})
    volume = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    ready = model.preprocess([volume], np.eye(4))
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    runs = [
        predict(model, ready, {}, Options(samples=8, seed=s), probabilities=True) for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    plain = predict(model, ready, {}, probabilities=True)
    assert np.array_equal(runs[0].probabilities, runs[1].probabilities)
    assert not np.array_equal(runs[0].probabilities, runs[2].probabilities)
    assert not np.array_equal(runs[0].probabilities, plain.probabilities)
    p = runs[0].probabilities[0].astype(float)
    entropy = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    np.testing.assert_allclose(runs[0].entropy, entropy, atol=1e-4)
    assert runs[0].information.max() > 1e-4
    assert (runs[0].information <= runs[0].entropy + 1e-5).all()
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())
    assert plain.entropy is None
    with pytest.raises(UserError, match="dropout"):
        predict(make_model(tmp_path / "none"), ready, {}, Options(samples=2))


def test_every_task_is_predicted_under_its_own_metadata(tmp_path) -> None:
    names = ["anterior", "posterior"]
    encoder = MetadataEncoder.fit(
        {n: {"task": n} for n in names}, {"task": MetadataKey(values=names, dropout=0)}
    )
    labels = [LabelInfo(name=n, values=[i + 1], value=i + 1) for i, n in enumerate(names)]
    model = make_model(tmp_path, labels=labels, output="task", task_key="task", metadata=encoder)
    volume = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    ready = model.preprocess([volume], np.eye(4))
    found = predict(model, ready, {}, probabilities=True)
    x = torch.from_numpy(ready.image)[None]
    for k, name in enumerate(names):
        with torch.no_grad():
            p = model.probabilities(x, model.encode({}, name))[0]
        np.testing.assert_allclose(
            found.probabilities[k], ready.geometry.from_network(p.numpy())[0], atol=1e-5
        )


def test_exclusive_labels_are_the_most_probable_one_background_included(tmp_path) -> None:
    labels = [LabelInfo(name=n, values=[i + 1], value=i + 1) for i, n in enumerate("ab")]
    model = make_model(tmp_path, labels=labels, output="classes", spatial_dims=2, patch_size=[8, 8])
    volume = np.random.default_rng(0).standard_normal((9, 8, 5)).astype(np.float32)
    ready = model.preprocess([volume], np.eye(4))
    found = predict(model, ready, {})
    x = torch.from_numpy(ready.image).transpose(0, 1)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0))
    network = CaseNetwork(model, {}, Options())
    with torch.no_grad():
        p = whole(padded.transpose(0, 1), [8, 8], network, batch=16)
    chosen = torch.cat([1 - p.sum(0, keepdim=True), p]).argmax(0).numpy()
    expected = ready.geometry.from_network(chosen[None].astype(np.float32))[0]
    assert np.array_equal(found.strongest, expected)
    assert np.array_equal(found.masks, np.stack([expected == 1, expected == 2]))


def test_the_largest_component_and_filled_holes() -> None:
    mask = np.zeros((9, 9, 9), bool)
    mask[1:6, 1:6, 1:6] = True
    mask[3, 3, 3] = False
    mask[7, 7, 7] = True
    kept = keep_largest(mask)
    assert not kept[7, 7, 7] and kept.sum() == 124
    assert fill_holes(kept).sum() == 125


# the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a folder with three images and a table."""
    root = tmp_path_factory.mktemp("predict")
    make_model(root / "model")
    (root / "in").mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        image = nib.Nifti1Image(rng.standard_normal((8, 9, 7)).astype(np.float32), np.eye(4))
        nib.save(image, root / "in" / f"{name}.nii.gz")
    rows = "".join(f"{n}\t{t}\n" for n, t in zip("abc", TYPES, strict=True))
    (root / "in" / "participants.tsv").write_text(f"participant_id\ttumor_type\n{rows}")
    return root


def run(*argv: Any) -> int:
    return cli.run(str(argv[0]), [str(a) for a in argv[1:]])


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in (folder / "in").iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def outputs(out: Path) -> set[str]:
    return {p.name for p in out.iterdir()}


def test_metadata_come_from_the_command_the_table_and_the_sidecar(folder, tmp_path, capsys) -> None:
    source = copied(folder, tmp_path / "in")
    assert run("predict", folder / "model", source, tmp_path / "table") == 0
    assert "unknown" not in capsys.readouterr().out
    (source / "participants.tsv").unlink()
    (source / "b.json").write_text(json.dumps({"tumor_type": TYPES[1]}))
    assert run("predict", folder / "model", source, tmp_path / "sidecar") == 0
    assert "tumor_type is unknown in 2 of 3 cases: a, c" in capsys.readouterr().out
    meta = f"tumor_type={TYPES[2]}"
    assert run("predict", folder / "model", source, tmp_path / "meta", "--meta", meta) == 0

    def fed(name: str) -> list[Any]:
        cases = json.loads((tmp_path / name / "predictions.json").read_text())["cases"]
        return [cases[c]["metadata"]["tumor_type"] for c in "abc"]

    assert fed("table") == list(TYPES)
    assert fed("sidecar") == [None, TYPES[1], None]
    assert fed("meta") == [TYPES[2]] * 3


def test_one_image_is_written_under_the_name_that_is_asked_for(folder, tmp_path) -> None:
    out = tmp_path / "mask.nii.gz"
    assert run("predict", folder / "model", folder / "in" / "a.nii.gz", out) == 0
    assert nib.load(out).shape == (8, 9, 7)
    assert outputs(tmp_path) == {"mask.nii.gz"}


def test_images_are_never_overwritten(folder, tmp_path, capsys) -> None:
    source = copied(folder, tmp_path / "in")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    assert run("predict", folder / "model", source, source) == 1
    assert "another folder" in capsys.readouterr().err
    assert run("predict", folder / "model", source / "a.nii.gz", source / "a.nii.gz") == 1
    assert "another name" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_text_where_a_number_belongs_is_named(tmp_path, capsys) -> None:
    rows = {str(i): {"age": 30 + i} for i in range(5)}
    encoder = MetadataEncoder.fit(rows, {"age": MetadataKey(kind="continuous")})
    make_model(tmp_path / "model", metadata=encoder)
    (tmp_path / "in").mkdir()
    image = nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4))
    for name in "ab":
        nib.save(image, tmp_path / "in" / f"{name}.nii.gz")
    (tmp_path / "in" / "participants.tsv").write_text("participant_id\tage\na\t31\nb\told\n")
    assert run("predict", tmp_path / "model", tmp_path / "in", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "- b: " in error and "'age'" in error and "'old'" in error
    assert outputs(tmp_path / "out") == {"a.nii.gz", "predictions.json"}


BAD: dict[str, tuple[Any, str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-300]), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "text": (lambda p: p.write_bytes(b"hello" * 200), "cannot be read"),
    "4D": (
        lambda p: nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), p),
        "3D",
    ),
    "NaN": (
        lambda p: nib.save(nib.Nifti1Image(np.full((8, 8, 8), np.nan, np.float32), np.eye(4)), p),
        "NaN",
    ),
    "row": (
        lambda p: (p.parent / "participants.tsv").write_text(
            f"participant_id\ttumor_type\na\t{TYPES[0]}\nc\t{TYPES[2]}\n"
        ),
        "no row for b",
    ),
    "category": (
        lambda p: (
            (p.parent / "b.json").write_text('{"tumor_type": "glioma"}')
            and (p.parent / "participants.tsv").unlink()
        ),
        "'glioma'",
    ),
    "sidecar": (
        lambda p: (
            (p.parent / "b.json").write_text('{"tumor_type": ')
            and (p.parent / "participants.tsv").unlink()
        ),
        "b.json",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_case_is_named_and_the_others_are_predicted(folder, tmp_path, capsys, what) -> None:
    source = copied(folder, tmp_path / "in")
    spoil, message = BAD[what]
    spoil(source / "b.nii.gz")
    assert run("predict", folder / "model", source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "1 failed" in error and "- b: " in error and message in error
    assert "Traceback" not in error
    assert outputs(tmp_path / "out") == {"a.nii.gz", "c.nii.gz", "predictions.json"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--meta", "age=3"], "'age'"),
        (["--meta", "tumor_type=glioma"], "'glioma'"),
        (["--meta", "tumor_type"], "KEY=VALUE"),
        (["--flip", "left"], "--flip"),
        (["--swap", "grade"], "'grade'"),
        (["--weights", "final"], "no such weights"),
        (["--table", "none.tsv"], "none.tsv"),
    ],
)
def test_a_wrong_setting_stops_before_anything_is_written(
    folder, tmp_path, capsys, argv, message
) -> None:
    assert run("predict", folder / "model", folder / "in", tmp_path / "out", *argv) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["full disk", "interrupt"])
def test_what_stops_writing_leaves_no_half_of_a_case(
    folder, tmp_path, monkeypatch, capsys, moment
) -> None:
    real = nib.save
    calls = []

    def save(image: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise (
                OSError(28, "No space left on device")
                if moment == "full disk"
                else (KeyboardInterrupt())
            )
        real(image, path)

    monkeypatch.setattr(nib, "save", save)
    argv = ["predict", folder / "model", folder / "in", tmp_path / "out", "--probabilities"]
    status = run(*argv)
    error = capsys.readouterr().err
    # a case is two files; the fourth is the second of b
    left = {"a.nii.gz", "a_lesion_probability.nii.gz", "predictions.json"}
    if moment == "full disk":
        assert status == 1 and "b_lesion" not in error and "No space left" in error
        left |= {"c.nii.gz", "c_lesion_probability.nii.gz"}
    else:
        assert status == 130 and "interrupted" in error
    assert outputs(tmp_path / "out") == left
    monkeypatch.undo()
    written = (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns
    assert run(*argv, "--continue") == 0
    assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns == written
    assert "b.nii.gz" in outputs(tmp_path / "out")
    capsys.readouterr()
    assert run(*argv, "--continue", "--keep-largest") == 1
    assert "other settings" in capsys.readouterr().err


def test_continue_predicts_an_image_anew_that_has_changed(folder, tmp_path) -> None:
    shutil.copytree(folder / "in", tmp_path / "in")
    argv = ["predict", folder / "model", tmp_path / "in", tmp_path / "out"]
    assert run(*argv) == 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.nii.gz")}
    image = nib.load(tmp_path / "in" / "b.nii.gz")
    array = np.flip(np.asarray(image.dataobj), 0).copy()
    nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "in" / "b.nii.gz")
    assert run(*argv, "--continue") == 0
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.nii.gz")}
    assert {n for n in before if before[n] != after[n]} == {"b.nii.gz"}


def test_a_folder_that_cannot_be_written_is_one_message(folder, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run("predict", folder / "model", folder / "in", tmp_path / "file" / "out") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_swap_predicts_under_every_value(folder, tmp_path) -> None:
    assert run("predict", folder / "model", folder / "in", tmp_path, "--swap", "tumor_type") == 0
    values = [*TYPES, "unknown"]
    for v in values:
        cases = json.loads((tmp_path / f"tumor_type={v}" / "predictions.json").read_text())["cases"]
        assert {c["metadata"]["tumor_type"] or "unknown" for c in cases.values()} == {v}
    swap = json.loads((tmp_path / "swap.json").read_text())
    assert swap["true"] == dict(zip("abc", TYPES, strict=True))
    assert [f["value"] for f in swap["fed"]] == values
