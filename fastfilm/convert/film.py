"""The way of γ and β: from a call's metadata, through the generator, to the hooks that apply them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastfilm.nn.generator import FiLMGenerator
from fastfilm.nn.metadata import as_metadata, on_device

Modulations = Mapping[str, tuple[Tensor, Tensor]]
"""(γ, β), each [N or 1, C], by site."""


class _Thread(threading.local):
    """Modulations and metadata of this thread. (torch.compile cannot follow context variables.)"""

    def __init__(self) -> None:
        self.modulations: Modulations | None = None
        self.given: Given | None = None


_thread = _Thread()


@dataclass(frozen=True, eq=False)
class Given:
    """Metadata of a ``with fastfilm.metadata(…)`` block."""

    rows: Any


@contextmanager
def metadata(rows: Any) -> Iterator[None]:
    """Metadata for the conditioned networks that are called without any inside this block.

    For training loops and inferers that call ``model(x)``. It holds for the thread that enters it (and for the
    replicas of ``torch.nn.DataParallel``, each of which gets its samples' rows). Each call reads the rows and runs
    the generator anew.

    Args:
        rows: [N, M] with one row for each sample of the batch, or [1, M] or [M] for any batch.

    Example:
        >>> import torch, fastfilm
        >>> layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        >>> model = fastfilm.condition(torch.nn.Sequential(*layers), metadata_size=2, where="all")
        >>> with fastfilm.metadata([[0.0, 1.0], [1.0, 0.0]]):
        ...     model(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """
    if rows is None:
        raise TypeError("rows must be metadata, got None")
    outer = _thread.given
    _thread.given = Given(rows)
    try:
        yield
    finally:
        _thread.given = outer


class Split:
    """Metadata of a batch that ``torch.nn.DataParallel`` spreads over replicas, as it spreads the batch."""

    def __init__(self, given: Given) -> None:
        self.given, self.replicas, self.used = given, 0, False

    def rows(self, index: int) -> Given:
        """The rows of one replica's samples."""
        self.used = True
        rows = self.given.rows
        single = not hasattr(rows, "__len__") or len(rows) == 1 or _number(rows[0])
        if single or (isinstance(rows, Tensor) and rows.dim() < 2):
            return Given(rows)
        size = -(-len(rows) // self.replicas)
        return Given(rows[index * size : (index + 1) * size])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "ndim", 1) == 0


def given() -> Given | None:
    """The metadata of the innermost ``with`` block of this thread."""
    return _thread.given


class FiLMHook:
    """γ·x + β behind a layer, or in front of it, in plain PyTorch and x's dtype; bit for bit x for γ = 1, β = 0.

    Args:
        site: the one that γ and β are for.
        before: it is a hook of what the layer is given.
    """

    # TorchScript asks for the name of a hook
    __name__ = "film"

    def __init__(self, site: str, before: bool) -> None:
        self.site, self.before = site, before

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if self.before:
            return (self.modulated(args[0]), *args[1:])
        return self.modulated(output)

    def modulated(self, x: Tensor) -> Tensor:
        """The map x [N, C, *S] with FiLM.

        Raises:
            RuntimeError: no conditioned network's forward runs in this thread.
            ValueError: the metadata are not those of N samples.
        """
        found = _thread.modulations
        if found is None or self.site not in found:
            raise RuntimeError(
                f"FiLM at {self.site!r} has no metadata: it runs outside of its conditioned network's forward"
            )
        gamma, beta = found[self.site]
        if gamma.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"metadata must have 1 row or one for each of the {x.shape[0]} samples of a batch,"
                f" got {gamma.shape[0]}"
            )
        shape = (*gamma.shape, *(1,) * (x.dim() - 2))
        return x * gamma.to(x.dtype).view(shape) + beta.to(x.dtype).view(shape)

    @staticmethod
    def at(module: nn.Module, site: str) -> bool:
        """Whether a module has the hook of a site."""
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        return any(isinstance(h, FiLMHook) and h.site == site for h in hooks)


class Conditioner(nn.Module):
    """The generator of a conditioned network: metadata [N, M] to γ and β of all its sites.

    Args:
        sites: channels C of every site by name.
        metadata_size: M, or the encoder's features.
        encoder: from metadata as the caller has them to [N, M] features; None where they are the metadata.
        preset, hidden: see ``fastfilm.FiLMGenerator``, which makes γ and β of all sites at once.
    """

    def __init__(
        self,
        sites: Mapping[str, int],
        metadata_size: int,
        encoder: nn.Module | None,
        preset: str,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.sites, self.metadata_size = dict(sites), metadata_size
        self.encoder = encoder
        self.generator = FiLMGenerator(
            metadata_size, sum(sites.values()), preset=preset, hidden=hidden
        )

    def forward(self, metadata: Any, batch: int) -> Modulations:
        """γ and β of every site for ``metadata`` of N = ``batch`` samples (or 1 for all of them)."""
        weight = self.generator.last.weight
        if self.encoder is not None:
            if isinstance(metadata, Tensor):
                metadata = on_device(metadata, weight.device)
            metadata = self.encoder(metadata)
        rows = as_metadata(metadata, self.metadata_size, batch, weight.device, weight.dtype)
        gamma, beta = self.generator(rows)
        sizes = list(self.sites.values())
        return dict(
            zip(
                self.sites,
                zip(gamma.split(sizes, 1), beta.split(sizes, 1), strict=True),
                strict=True,
            )
        )


@contextmanager
def applied(modulations: Modulations) -> Iterator[None]:
    """Hooks that run inside find their γ and β."""
    outer = _thread.modulations
    _thread.modulations = modulations if outer is None else {**outer, **modulations}
    try:
        yield
    finally:
        _thread.modulations = outer
