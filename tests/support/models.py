"""A model folder made by hand: what predicts is known, so that what comes out can be checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastfilm.segmentation.config.sections import MetadataKey, NetworkConfig
from fastfilm.segmentation.images.preprocessing import Normalisation, Preprocessing
from fastfilm.segmentation.metadata.encoder import MetadataEncoder
from fastfilm.segmentation.models.folder import (
    LabelInfo,
    LoadedModel,
    ModelInfo,
    load_model,
    save_model,
    save_weights,
)

TYPES = ("astrocytoma", "ependymoma", "hemangioblastoma")


def make_model(folder: Path, **changes: Any) -> LoadedModel:
    """A random network of depth 1 on one channel and tumour type (which may be unknown)."""
    rows = {str(i): {"tumor_type": t} for i, t in enumerate(TYPES)}
    network = {"depth": 1, "base_filters": 2, "generator": "paper", **changes.pop("network", {})}
    info = ModelInfo(
        **{
            "network": NetworkConfig(**network),
            "spatial_dims": 3,
            "in_channels": 1,
            "contrasts": ["FLAIR"],
            "labels": [LabelInfo(name="lesion", values=[1], value=1)],
            "output": "channels",
            "metadata": MetadataEncoder.fit(rows, {"tumor_type": MetadataKey()}),
            "preprocessing": Preprocessing(channels=[Normalisation(kind="none")], crop=False),
            "patch_size": [8, 8, 8],
            **changes,
        }
    )
    torch.manual_seed(0)
    save_model(folder, info)
    save_weights(folder, "best", info.build())
    return load_model(folder)
