"""TF32 in float32 products: reading PyTorch's setting, and making one for a while.

PyTorch 2.9 brought a setting for each kind of operation (``fp32_precision``). The older flags (``allow_tf32``) set
the new ones too, but reading them raises ``RuntimeError`` once a caller has set the two apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def tf32() -> bool:
    """Whether PyTorch's convolutions may round float32 products to TF32 on a GPU."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        newer: Any = torch.backends.cudnn
        return bool(newer.conv.fp32_precision == "tf32")


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Float32 convolutions and matrix products run in TF32, or in IEEE float32, inside the block."""
    settings = _settings()
    before = [getattr(owner, name) for owner, name in settings]
    try:
        for owner, name in settings:
            newer = "tf32" if tf32 else "ieee"
            setattr(owner, name, newer if name == "fp32_precision" else tf32)
        yield
    finally:
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def _settings() -> list[tuple[Any, str]]:
    """Owner and name of each setting that can be read; the older ones first, since they set the newer ones too."""
    convolutions, matrices = torch.backends.cudnn, torch.backends.cuda.matmul
    known = [
        (convolutions, "allow_tf32"),
        (getattr(convolutions, "conv", None), "fp32_precision"),
        (matrices, "allow_tf32"),
        (matrices, "fp32_precision"),
    ]
    return [(owner, name) for owner, name in known if _readable(owner, name)]


def _readable(owner: Any, name: str) -> bool:
    try:
        getattr(owner, name)
    except (AttributeError, RuntimeError):
        return False
    return True
