"""``fastfilm tune``: the network at hand, the search, and what it prints."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace

import torch

import fastfilm
from fastfilm.ops.settings import tables

from .tuning.search import (
    PRUNED,
    RIGHT,
    SKIPPED,
    TIMED,
    WRONG,
    Search,
    save,
)
from .tuning.shapes import Shape, of_model

DEFAULT_SIZE = [320, 256]
METADATA = 3
"""Columns of a FiLMed U-Net's metadata; no convolution depends on them."""


def network_shapes(arguments: argparse.Namespace) -> list[Shape]:
    """Shapes of the network that the arguments describe; they are found without memory for it or its maps."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype = getattr(torch, arguments.dtype)
    size, channels, metadata = arguments.size, arguments.channels, METADATA
    with FakeTensorMode():
        if arguments.model is None:
            size = size or DEFAULT_SIZE
            network: torch.nn.Module = fastfilm.FiLMedUNet(
                channels,
                1,
                spatial_dims=len(size),
                base_filters=arguments.filters,
                depth=arguments.depth,
                metadata_size=metadata,
            )
        else:
            from fastfilm.segmentation.models.folder import read_info

            info = read_info(arguments.model)
            network, size = info.build(), size or info.patch_size
            channels, metadata = info.in_channels, info.metadata.size
        image = torch.empty(arguments.batch, channels, *size)
        rows = [torch.empty(arguments.batch, metadata)] if metadata else []
        with torch.no_grad():
            found = of_model(network.eval(), image, *rows)
    return [replace(shape, dtype=dtype) for shape in found]


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 1 where a search is not possible here or no candidate was right, else 0."""
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.dry:
        print(
            "fastfilm tune: this machine has no CUDA device to measure on; --dry compiles only",
            file=sys.stderr,
        )
        return 1
    arch = tables.architecture() if cuda else None
    number = int((arch or f"sm_{arguments.arch}").removeprefix("sm_"))
    shapes = network_shapes(arguments)[: arguments.shapes]
    device = "cuda" if cuda and not arguments.dry else "cpu"
    print(f"{len(shapes)} shapes, {arguments.minutes:g} minutes at most, for sm_{number}")
    path = arguments.out or tables.user_path(f"sm_{number}")
    there = arguments.missing and device == "cuda" and path.exists()
    search = Search(
        shapes,
        device,
        number,
        60 * arguments.minutes,
        most=arguments.candidates,
        known=frozenset(tables.read(path).entries) if there else frozenset(),
        say=lambda text: print(text, flush=True),
    )
    if device == "cuda":
        table = save(search, path)
        print(f"\n{len(table.entries)} entries in {path}")
    else:
        for _ in search.entries():
            pass
        print("\nnothing was measured, and no table was written")
    found = Counter(o.status for o in search.outcomes)
    print(", ".join(f"{found[s]} {s}" for s in (TIMED, RIGHT, WRONG, PRUNED, SKIPPED) if found[s]))
    return 1 if found[WRONG] and not found[TIMED] + found[RIGHT] else 0
