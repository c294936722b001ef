"""Further networks of the packages that ``fastfilm.convert`` knows, for counts and slow tests."""

from __future__ import annotations

from .backbones import BACKBONES
from .encoders import ENCODERS
from .medical import MEDICAL
from .small import NETWORKS, Network
from .unets import UNETS

EVERY: tuple[Network, ...] = (*NETWORKS, *MEDICAL, *UNETS, *ENCODERS, *BACKBONES)
"""The networks of the table, and all others."""
