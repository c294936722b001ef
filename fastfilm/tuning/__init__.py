"""The fastest backend, route and tiles for a network on a GPU (``fastfilm tune``), and the cost model."""

from .search import Search, tune
from .shapes import Shape, of_model

__all__ = ["Search", "Shape", "of_model", "tune"]
