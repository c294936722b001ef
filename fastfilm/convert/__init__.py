"""Existing models made faster (``convert``) and metadata-conditioned (``condition``)."""

from .engine import conversion_report, convert, restore
from .report import Report

__all__ = ["Report", "conversion_report", "convert", "restore"]
