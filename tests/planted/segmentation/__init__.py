"""Faults in fastfilm/segmentation, a file for each room."""

from __future__ import annotations

from . import audit, data, evaluation, images, metadata, prediction, support, training, trial

FAULTS = (
    *support.FAULTS,
    *metadata.FAULTS,
    *images.FAULTS,
    *data.FAULTS,
    *prediction.FAULTS,
    *training.FAULTS,
    *evaluation.FAULTS,
    *audit.FAULTS,
    *trial.FAULTS,
)
