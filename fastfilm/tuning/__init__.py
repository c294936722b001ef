"""The fastest backend, route and tiles for a network's convolutions on a GPU: ``fastfilm tune``. The cost model."""

from .search import Search, tune
from .shapes import Shape, of_model

__all__ = ["Search", "Shape", "of_model", "tune"]
