"""``convert`` makes an existing model faster; ``condition`` adds FiLM to it."""

from .condition import condition, generator_parameters, parameter_groups
from .conversion import conversion_report, convert, restore
from .film import metadata
from .report import Report

__all__ = [
    "Report",
    "condition",
    "conversion_report",
    "convert",
    "generator_parameters",
    "metadata",
    "parameter_groups",
    "restore",
]
