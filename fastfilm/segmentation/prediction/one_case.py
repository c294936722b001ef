"""Prediction of one case: windows, tasks, flips and dropout samples, brought to the file's grid plane by plane."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastfilm.nn import ConvNormFiLM2d, ConvNormFiLM3d

from ..images.preprocessing import AXES, Geometry, Preprocessed, resample
from ..models.folder import LoadedModel
from ..support.errors import UserError
from .averaging import Prior, missing_keys, weighted
from .windows import Timing, sliding_windows

Plane = Literal["sagittal", "coronal", "axial"]


@dataclass(frozen=True)
class Options:
    """Settings of a prediction.

    Attributes:
        overlap: overlap of neighbouring windows, as a share of their size.
        batch: windows in one call of the network; None: 16 slices or 1 volume.
        flips: planes across which the case is also predicted mirrored, in all combinations, for a mean.
        samples: number of draws of the dropout masks, for a mean and its uncertainty; 0: no dropout.
        seed: seed of the draws.
        missing: prediction of a case without a value of a key: as "unknown", or as the mean over its values.
        prior: weights of these values; other keys have the frequencies of their values in training.
    """

    overlap: float = 0.5
    batch: int | None = None
    flips: tuple[Plane, ...] = ()
    samples: int = 0
    seed: int = 0
    missing: Literal["unknown", "average"] = "unknown"
    prior: Prior = ()


@dataclass
class Predicted:
    """A prediction on the grid of the case's file.

    Attributes:
        masks: [K, X, Y, Z], bool, one for each label; in output mode "classes" they do not overlap.
        strongest: [X, Y, Z], int16: 1 + the index of the most probable label whose mask is on; 0: no label.
        probabilities: [K, X, Y, Z], float32, if asked for.
        entropy: [X, Y, Z], float32: entropy in bits of the mean over dropout samples, highest over the labels.
        information: [X, Y, Z], float32: mutual information in bits of prediction and dropout mask.
        metadata_entropy: [X, Y, Z], float32: mutual information in bits of prediction and missing metadata value,
            highest over the labels; None if no mean over metadata values was taken.
        timing: seconds in and around the network.
    """

    masks: NDArray[np.bool_]
    strongest: NDArray[np.int16]
    probabilities: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None
    information: NDArray[np.float32] | None = None
    metadata_entropy: NDArray[np.float32] | None = None
    timing: Timing = field(default_factory=Timing)


@torch.no_grad()
def predict(
    model: LoadedModel,
    case: Preprocessed,
    values: Mapping[str, Any],
    options: Options | None = None,
    *,
    probabilities: bool = False,
) -> Predicted:
    """The prediction of a case with its metadata.

    Probabilities are not kept for the whole volume: finished planes are brought to the file's grid, turned into
        masks
    and dropped. Beside input and result, this needs memory for the depth of one window.

    Args:
        case: result of ``model.preprocess``.
        values: metadata, key -> value.
        probabilities: keep the probabilities, too.

    Raises:
        MetadataError (a UserError): the model cannot take the metadata.
        UserError: the options do not fit the model.
    """
    options = options or Options()
    timing = Timing()
    labels = len(model.info.labels)
    geometry = case.geometry
    uncertain = options.samples > 0
    network = CaseNetwork(model, values, options)
    turned = tuple(geometry.shape[a] for a in geometry.axes)
    maps = labels if probabilities else 0
    kept = np.zeros((maps + 2 * uncertain + network.averaged, *turned), np.float32)
    masks = np.zeros((labels, *turned), bool)
    strongest = np.zeros(turned, np.int16)
    image = torch.from_numpy(np.ascontiguousarray(case.image)).to(model.device)
    planes = windows(model, image, network, options, timing)
    (d0, _), (h0, h1), (w0, w1) = geometry.crop
    exclusive = model.info.output == "classes"
    for first, p in regridded(planes, geometry):
        at = (slice(d0 + first, d0 + first + p.shape[1]), slice(h0, h1), slice(w0, w1))
        every = (slice(None), *at)
        # plane by plane, as argmax and the comparisons make copies
        for i, on in enumerate(masks[every].swapaxes(0, 1)):
            on[...], strongest[at][i] = decide(p[:labels, i], exclusive)
        if maps:
            kept[:maps][every] = p[:labels]
        if uncertain:
            h = entropy(p[:labels], exclusive)
            kept[maps][at] = h
            kept[maps + 1][at] = np.maximum(h - p[labels], 0)
        if network.averaged:
            kept[maps][at] = p[labels]
    kept = geometry.to_file(kept)
    return Predicted(
        geometry.to_file(masks),
        geometry.to_file(strongest[None])[0],
        kept[:maps] if probabilities else None,
        kept[maps] if uncertain else None,
        kept[maps + 1] if uncertain else None,
        kept[maps] if network.averaged else None,
        timing,
    )


def windows(
    model: LoadedModel,
    image: Tensor,
    network: CaseNetwork,
    options: Options,
    timing: Timing | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Finished planes (first, [K, n, H, W]) of the probabilities of ``image`` [C, D, H, W]."""
    return sliding_windows(
        image,
        model.info.patch_size,
        network,
        overlap=options.overlap,
        batch=options.batch or (16 if model.info.spatial_dims == 2 else 1),
        timing=timing,
    )


def decide(p: NDArray[np.float32], exclusive: bool) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
    """Masks [K, …], bool, and the strongest label [...] (from 1; 0: none), int16, for probabilities [K, …].

    Args:
        exclusive: whether labels and background exclude each other and the most probable is taken; otherwise every
            label with a probability of 1/2 or more is.
    """
    best = p.argmax(0)
    highest = np.take_along_axis(p, best[None], 0)[0]
    background = 1 - p.sum(0) if exclusive else np.float32(0.5)
    # with exclusive labels the background wins a tie, as in argmax over (background, labels)
    on = highest > background if exclusive else highest >= background
    strongest = np.where(on, best + 1, 0).astype(np.int16)
    if exclusive:
        return strongest == np.arange(1, len(p) + 1).reshape(-1, *[1] * best.ndim), strongest
    return p >= 0.5, strongest


def entropy(p: NDArray[np.float32], exclusive: bool) -> NDArray[np.float32]:
    """Entropy […] in bits of probabilities [K, …]: over background and labels, or the highest of K binary ones."""
    bits = _bits(torch.from_numpy(np.ascontiguousarray(p))[None], exclusive)
    return np.asarray(bits[0, 0].numpy())


def _bits(p: Tensor, exclusive: bool) -> Tensor:
    """The same as [N, 1, …] for [N, K, …]."""
    return _entropies(p, exclusive).amax(1, keepdim=True)


def _entropies(p: Tensor, exclusive: bool) -> Tensor:
    """Entropies in bits of [N, K, …]: [N, 1, …] over background and labels, or [N, K, …], binary per label."""
    rest = (1 - p.sum(1, keepdim=True)).clamp_min(0) if exclusive else 1 - p
    if exclusive:
        whole = torch.cat([p, rest], 1)
        return -torch.xlogy(whole, whole).sum(1, keepdim=True) / np.log(2)
    return (-torch.xlogy(p, p) - torch.xlogy(rest, rest)) / np.log(2)


def check_options(model: LoadedModel, options: Options) -> list[str]:
    """Checks options against a model; returns the planes of possible flips, in the order of the windows' axes.

    Raises:
        UserError: a flip is not possible, the network has no dropout to sample, or options exclude each other.
    """
    first = model.info.preprocessing.slice_axis
    order = [int(first), *(a for a in range(3) if a != first)]
    axes = [AXES[a] for a in order][3 - model.info.spatial_dims :]
    for plane in options.flips:
        if plane not in axes:
            raise UserError(
                f"the model takes {AXES[order[0]]} slices: flips must be {' or '.join(axes)}, got {plane}"
            )
    if options.samples and not droppable(model.network):
        raise UserError("uncertainty needs a network with dropout; this one has none")
    if options.samples and options.missing == "average":
        raise UserError(
            "dropout samples and the mean over missing metadata (--samples, --missing average) do not go together"
        )
    if options.prior and options.missing != "average":
        raise UserError("--prior is for --missing average")
    return axes


def averaged_keys(model: LoadedModel, values: Mapping[str, Any], options: Options) -> list[str]:
    """The keys with missing values over which the mean is taken for a case."""
    return missing_keys(model, values) if options.missing == "average" else []


def completed(
    model: LoadedModel, values: Mapping[str, Any], options: Options
) -> list[tuple[float, dict[str, Any]]]:
    """The metadata that a case is predicted with, as pairs of weight and values: its own, or all completions.

    Raises:
        UserError: there is no mean over the missing values (``averaging.weighted``).
    """
    if averaged_keys(model, values, options):
        return weighted(model, values, options.prior)
    return [(1.0, dict(values))]


class CaseNetwork:
    """A network with the metadata of one case: windows [N, C, *S] -> probabilities [N, K, *S].

    γ and β are computed once. With dropout samples the result has one more channel: the samples' mean entropy.
    With a mean over missing metadata it has one, too: the mutual information of prediction and value,
    H(Σ w p) - Σ w H(p), highest over the labels. It is computed for each window, so that differences between
    overlapping windows do not enter it.

    Attributes:
        averaged: whether a mean over missing metadata is taken.
    """

    def __init__(self, model: LoadedModel, values: Mapping[str, Any], options: Options) -> None:
        self.model, self.options = model, options
        tasks: Sequence[str | None] = model.tasks() or [None]
        self.averaged = bool(averaged_keys(model, values, options))
        cases = completed(model, values, options)
        self.weights = [weight for weight, _ in cases]
        # γ and β [values][tasks]
        self.film = [self._film([model.encode(v, t) for t in tasks]) for _, v in cases]
        axes = check_options(model, options)
        dims = [2 + axes.index(p) for p in options.flips]
        self.flips = [c for n in range(len(dims) + 1) for c in itertools.combinations(dims, n)]

    def _film(self, rows: Sequence[NDArray[np.float32]]) -> list[Any]:
        if not self.model.encoder.size:
            return [None] * len(rows)
        modulate = getattr(self.model.network, "modulate", None)
        placed = [torch.from_numpy(r).to(self.model.device) for r in rows]
        return [r if modulate is None else modulate(r) for r in placed]

    def __call__(self, x: Tensor) -> Tensor:
        if self.averaged:
            return self._over_values(x)
        if not self.options.samples:
            return self._mean(x, self.film[0])
        exclusive = self.model.info.output == "classes"
        total = None
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), dropping(self.model.network):
            for i in range(self.options.samples):
                # draws depend on the seed alone, not on earlier windows
                torch.manual_seed(self.options.seed + i)
                p = self._mean(x, self.film[0])
                p = torch.cat([p, _bits(p, exclusive)], 1)
                total = p if total is None else total + p
        assert total is not None
        return total / self.options.samples

    def _over_values(self, x: Tensor) -> Tensor:
        exclusive = self.model.info.output == "classes"
        mean: Tensor | None = None
        within: Tensor | None = None
        for weight, film in zip(self.weights, self.film, strict=True):
            p = self._mean(x, film)
            h = weight * _entropies(p, exclusive)
            p = weight * p
            mean, within = (p, h) if mean is None or within is None else (mean + p, within + h)
        assert mean is not None and within is not None
        # weights add up to 1 only within rounding
        mean = mean.clamp_max(1)
        information = (_entropies(mean, exclusive) - within).amax(1, keepdim=True).clamp_min(0)
        return torch.cat([mean, information], 1)

    def _mean(self, x: Tensor, film: Sequence[Any]) -> Tensor:
        total: Tensor | None = None
        for dims in self.flips:
            p = self._once(x.flip(dims) if dims else x, film)
            p = p.flip(dims) if dims else p
            total = p if total is None else total + p
        assert total is not None
        return total / len(self.flips)

    def _once(self, x: Tensor, film: Sequence[Any]) -> Tensor:
        model = self.model
        outs = [
            model.activate(model.network(x) if f is None else model.network(x, f)) for f in film
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def droppable(network: nn.Module) -> list[nn.Module]:
    """The modules with active dropout in training."""
    return [
        m
        for m in network.modules()
        if (isinstance(m, ConvNormFiLM2d | ConvNormFiLM3d) and m.dropout > 0)
        or (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
    ]


@contextlib.contextmanager
def dropping(network: nn.Module) -> Iterator[None]:
    """Switches dropout on inside the block, and nothing else of training mode."""
    modules = droppable(network)
    for m in modules:
        if isinstance(m, ConvNormFiLM2d | ConvNormFiLM3d):
            m.dropout_in_evaluation = True
        else:
            m.train()
    try:
        yield
    finally:
        for m in modules:
            if isinstance(m, ConvNormFiLM2d | ConvNormFiLM3d):
                m.dropout_in_evaluation = False
            else:
                m.eval()


def regridded(
    planes: Iterator[tuple[int, Tensor]], geometry: Geometry
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Planes [K, n, H, W] on the network's grid, resampled to the grid of the crop, as arrays and in order.

    The resampling is linear, as in ``Geometry.from_network`` for a whole volume; one plane is kept in between.
    """
    depth, (h, w) = geometry.cropped[0], geometry.cropped[1:]
    if geometry.grid == geometry.cropped:
        for first, p in planes:
            yield first, p.cpu().numpy()
        return
    # centres of the result's planes in the coordinates of the given ones
    where = (np.arange(depth) + 0.5) * geometry.grid[0] / depth - 0.5
    where = where.clip(0, geometry.grid[0] - 1)
    wanted = 0
    last: NDArray[np.float32] | None = None
    for first, p in planes:
        have = resample(p.cpu().numpy(), (p.shape[1], h, w))
        if last is not None:
            have, first = np.concatenate([last, have], 1), first - 1
        end = first + have.shape[1] - 1
        while wanted < depth and where[wanted] <= end:
            low = min(int(where[wanted]), end)
            t = np.float32(where[wanted] - low)
            high = min(low + 1, end)
            yield wanted, ((1 - t) * have[:, low - first] + t * have[:, high - first])[:, None]
            wanted += 1
        last = have[:, -1:].copy()
