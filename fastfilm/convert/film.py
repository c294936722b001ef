"""γ and β on their way from a conditioned network's generator to the groups that apply them."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

_current: ContextVar[Mapping[str, tuple[Tensor, Tensor]] | None] = ContextVar(
    "fastfilm_modulation", default=None
)


@dataclass(frozen=True)
class Film:
    """Where a group takes its γ and β from, and where in the group they act.

    Attributes:
        site: name of the site in the conditioned network.
        order: of the group, if its activation does not stand before its norm.
    """

    site: str
    order: str


class Sites:
    """The modulations of the forward that runs in this thread."""

    @staticmethod
    def now(site: str, batch: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """γ and β [N or 1, C] of a site; None outside a conditioned network's forward."""
        found = _current.get()
        if found is None:
            return None, None
        gamma, beta = found[site]
        if gamma.shape[0] not in (1, batch):
            raise ValueError(
                f"metadata must have 1 row or one for each of the {batch} samples, got {gamma.shape[0]}"
            )
        return gamma, beta
