"""What a plan decides by itself: dimensions, spacing, normalisation, patch, depth and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

import fastfilm

from ..config.schema import Config
from ..config.sections import NetworkConfig, Section
from ..images.preprocessing import (
    AXES,
    Normalisation,
    Preprocessing,
)
from ..support import memory
from ..support.errors import UserError
from .checks import CaseFacts

LARGEST_2D, LARGEST_3D = 512 * 512, 128**3
CPU_2D, CPU_3D = 256 * 256, 64**3
"""Voxels of a patch at most, on a GPU and without one."""

LEFT = 6
"""A case is named of which fewer voxels are left along an axis, where this many times more were."""

KEPT_MAPS = 24
"""Bytes a training step needs, in float32 maps of the first level (measured: 8 to 18)."""


class Plan(Section):
    """What ``plan`` decided.

    Attributes:
        files: name -> SHA-256 of the plan's other files, which were written together with this one.
    """

    fastfilm: str = fastfilm.__version__
    spatial_dims: Literal[2, 3]
    patch_size: list[int]
    batch_size: int
    network: NetworkConfig
    preprocessing: Preprocessing
    files: dict[str, str] = Field(default_factory=dict)


def decide(config: Config, facts: Sequence[CaseFacts]) -> Plan:
    """Dimensions, spacing, normalisation, patch, depth and batch size from the fingerprint."""
    p = config.preprocessing
    spacings = np.array([f.spacing for f in facts])
    median = np.median(spacings, 0)
    if p.spacing in ("auto", "keep", "median"):
        spread = spacings.max(0) - spacings.min(0)
        varies = [p.spacing == "median" or (p.spacing == "auto" and s > 0.1 * m)
                  for s, m in zip(spread, median, strict=True)]  # fmt: skip
        target: list[float | None] = [
            float(m) if v else None for m, v in zip(median, varies, strict=True)
        ]
    else:
        target = [s for s in p.spacing if not isinstance(s, str)]
    now = [t or float(m) for t, m in zip(target, median, strict=True)]
    shapes = (
        np.array([f.shape for f in facts])
        * spacings
        / np.where([t is None for t in target], spacings, now)
    )
    shape = np.median(shapes, 0)
    thick = int(np.argmax(now))
    axis = thick if now[thick] > 1.5 * np.median(now) else 2
    if p.slice_axis != "auto":
        axis = AXES.index(p.slice_axis)
    if p.dimensions == "auto":
        dims = 3 if shape.min() >= 24 and max(now) <= 3 * min(now) else 2
    else:
        dims = 3 if p.dimensions == "3d" else 2
    if dims == 2:
        # slices are what they are
        target[axis] = None
    order = [axis, *(a for a in range(3) if a != axis)]
    size = [float(shape[a]) for a in order][3 - dims :]
    network, patch = _network_and_patch(config, size, dims)
    channels = 1 if config.data.combine == "samples" else len(config.data.contrasts)
    preprocessing = Preprocessing(
        slice_axis=axis,
        spacing=(target[0], target[1], target[2]),
        channels=[_normalisation(config, facts, c) for c in range(channels)],
        crop=p.crop == "nonzero",
    )
    batch = config.training.batch_size or _batch_size(network, patch, dims)
    return Plan(
        spatial_dims=dims,
        patch_size=patch,
        batch_size=batch,
        network=network,
        preprocessing=preprocessing,
    )


def _network_and_patch(
    config: Config, size: list[float], dims: int
) -> tuple[NetworkConfig, list[int]]:
    """The network with its depth, and a patch size that it takes."""
    network, wanted = config.network, config.preprocessing.patch_size
    if wanted is not None and len(wanted) != dims:
        raise UserError(f"preprocessing.patch_size needs {dims} numbers, got {wanted}")
    smallest = min(wanted or size)
    if network.depth is not None and network.name == "FiLMedUNet":
        most = int(np.log2(max(smallest, 2)))
        if network.depth > most + 1:
            shown = "x".join(f"{n:.0f}" for n in wanted or size)
            raise UserError(
                f"network.depth {network.depth} halves {network.depth} times and needs patches of at least"
                f" {2**network.depth} voxels along each axis; {'patches' if wanted else 'images'} are {shown}:"
                f" depth can be at most {most}"
            )
    if network.name == "FiLMedUNet" and network.depth is None:
        # at least 4 voxels at the bottom, at most 4 poolings (2D: 5)
        depth = int(np.clip(np.log2(max(smallest, 1) / 4), 1, 6 - dims + 1))
        network = network.model_copy(update={"depth": depth})
    step = {"Modified3DUNet": 16, "condition": 32}.get(network.name, 2 ** (network.depth or 1))
    if wanted is not None:
        if network.name == "Modified3DUNet" and any(n % step for n in wanted):
            raise UserError(f"Modified3DUNet needs patch sizes divisible by 16, got {wanted}")
        if min(wanted) < step:
            raise UserError(f"preprocessing.patch_size must be at least {step}, got {wanted}")
        if max(wanted) == step:
            raise UserError(
                f"preprocessing.patch_size: at {wanted} one voxel is left at the bottom of the network;"
                f" one side must be larger than {step}"
            )
        return network, list(wanted)
    patch = [max(step, int(np.ceil(n / step)) * step) for n in size]
    gpu = torch.cuda.is_available()
    most = {2: LARGEST_2D if gpu else CPU_2D, 3: LARGEST_3D if gpu else CPU_3D}[dims]
    while np.prod(patch) > most and max(patch) > step:
        patch[int(np.argmax(patch))] -= step
    if max(patch) == step:
        # a norm over one voxel is none
        patch[-1] *= 2
    return network, patch


def _batch_size(network: NetworkConfig, patch: list[int], dims: int) -> int:
    """As many as half of the memory at hand holds; at most 16 slices or 4 volumes."""
    there = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else memory.available()
    return int(np.clip(there // 2 // _sample(network, patch), 1, 16 if dims == 2 else 4))


def _sample(network: NetworkConfig, patch: Sequence[int]) -> int:
    """Bytes of one sample in a training step."""
    return KEPT_MAPS * 4 * network.base_filters * int(np.prod([int(n) for n in patch]))


def demands(config: Config, plan: Plan, facts: Sequence[CaseFacts]) -> tuple[list[str], list[str]]:
    """Memory that preprocessing and training will need: what cannot be had here, and what will be tight.

    Returns:
        problems and notes, one line each.
    """
    problems: list[str] = []
    notes: list[str] = []
    there = memory.physical()
    target = plan.preprocessing.spacing
    channels, labels = len(plan.preprocessing.channels), len(config.data.labels)
    needs = []
    for f in facts:
        grid = [
            int(max(1, round(n * s / (t or s))))
            for n, s, t in zip(f.shape, f.spacing, target, strict=True)
        ]
        # the channels, one more while it is resampled, and the masks as bytes and as float32
        voxels = int(np.prod(grid, dtype=object))
        needs.append((voxels * (4 * (channels + 2) + 5 * labels), f, grid))
        if any(n < LEFT and n * LEFT < m for n, m in zip(grid, f.shape, strict=True)):
            notes.append(
                f"{f.id}: {'x'.join(map(str, f.shape))} voxels of {_mm(f.spacing)} become"
                f" {'x'.join(map(str, grid))}: hardly anything is left (is the unit of length right?)"
            )
    most, case, grid = max(needs, key=lambda x: x[0])
    text = (
        f"{case.id}: {'x'.join(map(str, case.shape))} voxels of {_mm(case.spacing)} become"
        f" {'x'.join(map(str, grid))} and need {memory.gib(most)} of memory; the machine has {memory.gib(there)}"
    )
    if most > there:
        problems.append(f"{text} (preprocessing.spacing, data.exclude)")
    elif most > there / 2:
        notes.append(text)
    step = plan.batch_size * _sample(plan.network, plan.patch_size)
    place, there = "machine", there
    if torch.cuda.is_available():
        place, there = "GPU", torch.cuda.mem_get_info()[1]
    if step > there:
        notes.append(
            f"a training step of {plan.batch_size} patches of {'x'.join(map(str, plan.patch_size))} needs about"
            f" {memory.gib(step)} of memory; this {place} has {memory.gib(there)} (preprocessing.patch_size,"
            " training.batch_size, network.base_filters)"
        )
    return problems, notes


def _mm(spacing: Sequence[float]) -> str:
    return " × ".join(f"{s:.3g}" for s in spacing) + " mm"


def _normalisation(config: Config, facts: Sequence[CaseFacts], channel: int) -> Normalisation:
    p = config.preprocessing
    there = [i for f in facts if (i := f.intensities[channel]) is not None]
    kind = p.normalisation
    if kind == "auto":
        # Hounsfield units: integers with air at -1000
        lowest = float(np.median([i["lowest"] for i in there])) if there else 0.0
        kind = "ct" if lowest <= -500 and all(f.integers for f in facts) else "zscore"
    if kind != "ct":
        return Normalisation(kind=kind, nonzero=p.nonzero)
    inside = np.concatenate([f.inside[channel] for f in facts]).astype(np.float64)
    if inside.size == 0:
        raise UserError("normalisation 'ct' needs labelled voxels to take its constants from")
    low, high = np.percentile(inside, (0.5, 99.5))
    clipped = np.clip(inside, low, high)
    return Normalisation(
        kind="ct",
        low=float(low),
        high=float(high),
        mean=float(clipped.mean()),
        std=float(clipped.std()) or 1.0,
    )
