"""Training step against the size of the image or volume and against the batch: it should grow linearly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

import fastfilm

from ..counted.roofline import work
from ..measure import providers
from ..measure.session import Case, Session
from ..subjects.networks import NETWORKS, Network
from ..subjects.step import Step
from .model import initialise, one_hot, twin

SIZES = {2: (128, 256, 512, 1024), 3: (64, 96, 128, 192, 256)}
BATCHES = {2: (1, 4, 16, 32), 3: (1, 2, 4)}


def cases(session: Session) -> list[tuple[str, Network]]:
    """("size" or "batch", network), small ones first."""
    flat, deep = NETWORKS[:2]
    sizes, batches = SIZES, BATCHES
    if session.device != "cuda":
        flat = replace(flat, widths=(8, 16), size=(48, 48))
        deep = replace(deep, widths=(4, 8), size=(16, 16, 16))
        sizes = {2: (32, 64), 3: (16, 24)} if session.quick else {2: (64, 128), 3: (16, 32)}
        batches = {2: (1, 2), 3: (1, 2)}
    found = []
    for base in (flat, deep):
        dims = base.dims
        found += [("size", replace(base, batch=1, size=(s,) * dims)) for s in sizes[dims]]
        found += [("batch", replace(base, batch=n)) for n in batches[dims]]
    return sorted(found, key=lambda pair: voxels(pair[1]) * pair[1].widths[0])


def voxels(network: Network) -> int:
    """Of the whole batch."""
    return network.batch * math.prod(network.size)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Exponent p of seconds ~ voxels^p by least squares on logarithms; 1 is linear. None below two points."""
    if len({x for x, _ in points}) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    top = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return top / sum((x - mean_x) ** 2 for x, _ in logs)


def run(session: Session) -> None:
    """The faster eager layout on the device beside fastfilm, 16-bit first."""
    dtype = session.dtypes[0]
    for axis, network in cases(session):
        if session.budget.spent():
            return
        _case(session, axis, network, dtype)
        if session.device == "cuda":
            torch.cuda.empty_cache()


def _case(session: Session, axis: str, network: Network, dtype: str) -> None:
    torch.manual_seed(0)
    case = Case(
        "scaling",
        network.case,
        "training",
        dtype,
        work(network.layers().elements(), network.batch, dtype, "training", session.ceilings),
        {"axis": axis, "voxels": voxels(network), "dims": network.dims, "batch": network.batch},
    )
    model = network.build().to(session.device)
    initialise(model)
    image = torch.randn(network.batch, network.channels, *network.size).to(session.device)
    upstream = torch.randn(network.batch, network.classes, *network.size).to(session.device)
    batch = (image, one_hot(network.batch, session.device), upstream)
    step = partial(Step, mode="training", dtype=dtype, layout="channels-last")
    usable, _ = providers.backends(session.device)
    automatic = partial(fastfilm.backend, None if session.device == "cuda" else usable[0])
    session.measure(
        case,
        {
            "eager-channels-last": step(model, *batch).provider(),
            "fastfilm": step(twin(model).to(session.device), *batch, scope=automatic).provider(),
        },
    )
