"""Arguments of ``fastfilm tune``, defined with the standard library alone, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
from pathlib import Path


def _size(text: str) -> list[int]:
    try:
        size = [int(part) for part in text.split("x")]
    except ValueError:
        size = []
    if len(size) not in (2, 3) or min(size) < 1:
        raise argparse.ArgumentTypeError(f"must be HxW or DxHxW, got {text!r}")
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def add(parser: argparse.ArgumentParser) -> None:
    """The network (a model folder, or a FiLMed U-Net's numbers), its batch, and the bounds of the search."""
    parser.add_argument("model", nargs="?", type=Path, help="model folder; none: a FiLMed U-Net")
    parser.add_argument("--size", type=_size, help="HxW or DxHxW (a model's patch; 320x256)")
    parser.add_argument("--batch", type=_positive, default=16, help="samples (16)")
    parser.add_argument("--channels", type=_positive, default=1, help="of the image (1)")
    parser.add_argument("--filters", type=_positive, default=64, help="of the first level (64)")
    parser.add_argument("--depth", type=_positive, default=4, help="poolings (4)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(bfloat16)"
    )
    parser.add_argument("--minutes", type=_minutes, default=5.0, help="time it may take (5)")
    parser.add_argument("--shapes", type=_positive, help="only the costliest N shapes")
    parser.add_argument("--candidates", type=_positive, default=16, help="a shape and kernel (16)")
    parser.add_argument(
        "--missing", action="store_true", help="leave out what the table to merge into has"
    )
    parser.add_argument("--out", type=Path, help="table to merge into; none: the user's own")
    parser.add_argument("--dry", action="store_true", help="compile and prune only, without a GPU")
    parser.add_argument(
        "--arch", type=int, choices=(80, 90, 100), default=90, help="of a dry search (90)"
    )
