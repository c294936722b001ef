"""Prediction with a conditioned nnU-Net where every case has metadata of its own.

    python -m fastfilm.integrations.nnunet.predict MODEL_FOLDER INPUT OUTPUT --table TABLE --columns tumour

``nnUNetv2_predict`` itself knows no cases; with ``FASTFILM_NNUNET_META="tumour=astrocytoma"`` it gives all of them
the same values.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

import fastfilm

from . import cases
from .trainer import KEY


def predict(
    model: str,
    source: str,
    output: str,
    table: str,
    columns: list[str] | None = None,
    *,
    folds: tuple[str, ...] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cuda",
    mirroring: bool = True,
) -> list[Path]:
    """Segments every case of a folder with the metadata that ``table`` has for it.

    Args:
        model: nnU-Net's results folder (with ``plans.json`` and ``fold_…``).
        source, output: folders; images are named ``CASE_0000.EXT`` as nnU-Net wants them.
        table, columns: see ``cases.read``; None takes the columns of the training.

    Returns:
        The files without extension that were written.

    Raises:
        ValueError: a model without metadata, a case that is not in the table, a value that training did not know.
    """
    predictor = nnUNetPredictor(
        use_mirroring=mirroring,
        device=torch.device(device),
        perform_everything_on_device=device != "cpu",
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(model, folds, checkpoint)
    said = predictor.plans_manager.plans.get(KEY)
    if said is None:
        raise ValueError(f"{model} was trained without metadata; use nnUNetv2_predict")
    ending = predictor.dataset_json["file_ending"]
    files = create_lists_from_splitted_dataset_folder(source, ending)
    names = [os.path.basename(group[0])[: -len(ending) - 5] for group in files]
    columns = columns or [c["column"] for c in said["columns"]]
    values = cases.read(table, columns, names)
    rows = {name: cases.row(values[name], said["columns"], name) for name in names}
    Path(output).mkdir(parents=True, exist_ok=True)
    written = []
    for name, group in zip(names, files, strict=True):
        target = Path(output) / name
        with fastfilm.metadata(torch.tensor([rows[name]])):
            predictor.predict_from_files_sequential([group], [str(target)])
        written.append(target)
    return written


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastfilm.integrations.nnunet.predict")
    parser.add_argument("model", help="nnU-Net's results folder of the trainer")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--table", required=True, help="CSV, TSV, or a folder of CASE.json")
    parser.add_argument("--columns", help="of the table, by commas; default: those of the training")
    parser.add_argument("--folds", nargs="*", help="default: all that were trained")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--disable-tta", action="store_true")
    given = parser.parse_args()
    try:
        predict(
            given.model,
            given.input,
            given.output,
            given.table,
            given.columns.split(",") if given.columns else None,
            folds=tuple(given.folds) if given.folds else None,
            checkpoint=given.checkpoint,
            device=given.device,
            mirroring=not given.disable_tta,
        )
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
