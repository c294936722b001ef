"""Step time on several GPUs under data parallelism (DDP): one GPU's step and the all-reduce of the gradients.

A ring all-reduce of G bytes over n GPUs sends 2 · (n - 1) / n · G over each link, in 2 · (n - 1) steps, each
with a latency (Patarasuk and Yuan 2009). DDP reduces buckets while the backward pass still computes, all but the
last one, which is only there when the backward pass is over. What the backward pass cannot hide is added to the
step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKET_BYTES = 25 << 20
"""DDP's default."""


@dataclass(frozen=True)
class Link:
    """What connects the GPUs: bytes/s of a GPU's all-reduce, seconds of one step of the ring."""

    bandwidth: float
    latency: float = 5e-6


NVLINK = Link(360e9)
"""Eight GPUs by NVLink 4, an assumption: four fifths of the datasheet's 450 GB/s each way."""


@dataclass(frozen=True)
class Step:
    """A training step on ``gpus`` devices, each with the same batch as a single one.

    Attributes:
        communication: seconds of all all-reduces.
        exposed: seconds of them that the backward pass does not hide.
        seconds: of the step.
        efficiency: throughput over that of ``gpus`` single ones.
    """

    gpus: int
    communication: float
    exposed: float
    seconds: float
    efficiency: float


def all_reduce(size: float, gpus: int, link: Link) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes."""
    if gpus == 1:
        return 0.0
    return 2 * (gpus - 1) * (size / (gpus * link.bandwidth) + link.latency)


def step(
    forward: float,
    backward: float,
    gradient_bytes: int,
    gpus: int,
    link: Link = NVLINK,
    synchronised_norms: int = 0,
) -> Step:
    """A step under DDP.

    Args:
        forward, backward: seconds on one GPU.
        gradient_bytes: of all parameters, in the type in which they are reduced.
        synchronised_norms: batch norms over processes; each reduces twice, a few bytes and so the latency alone.

    Raises:
        ValueError: ``gpus`` below 1.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    buckets = max(1, math.ceil(gradient_bytes / BUCKET_BYTES))
    last = gradient_bytes - (buckets - 1) * BUCKET_BYTES
    early = sum(all_reduce(BUCKET_BYTES, gpus, link) for _ in range(buckets - 1))
    final = all_reduce(last, gpus, link)
    norms = 2 * synchronised_norms * all_reduce(0, gpus, link)
    exposed = max(0.0, early - backward) + final + norms
    seconds = forward + backward + exposed
    return Step(gpus, early + final + norms, exposed, seconds, (forward + backward) / seconds)
