"""What stands behind a convolution, without it: norm, activation and FiLM on a map of 32 channels.

Instance norm with leaky ReLU takes statistics of the map; batch norm with ReLU has its running ones. No gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastfilm

from ..blocks import SLOPE
from ..providers import channels_last
from ..roofline import DTYPES, yardstick
from ..session import Case, Provider, Session

CHANNELS = 32
KINDS = {"instance": "leaky_relu", "batch": "relu"}
Tail = Callable[[str, dict[str, Tensor]], Tensor]


def make(size: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A map y [1, C, *size], the norm's weight, bias, mean, variance [C] and γ, β [1, C], rounded to ``dtype``."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std + mean).to(dtype)

    return {
        "y": normal(1, CHANNELS, *size),
        "weight": normal(CHANNELS, mean=1.0, std=0.1),
        "bias": normal(CHANNELS, std=0.1),
        "mean": normal(CHANNELS, std=0.1),
        "var": normal(CHANNELS, std=0.1).abs() + 1.0,
        "gamma": normal(1, CHANNELS, mean=1.0, std=0.3),
        "beta": normal(1, CHANNELS, std=0.3),
    }


def eager(norm: str, t: dict[str, Tensor]) -> Tensor:
    """Layer by layer in PyTorch."""
    if norm == "instance":
        u = F.instance_norm(t["y"], weight=t["weight"], bias=t["bias"])
        u = F.leaky_relu(u, SLOPE)
    else:
        u = F.relu(F.batch_norm(t["y"], t["mean"], t["var"], t["weight"], t["bias"]))
    tail = (..., *(None,) * (u.dim() - 2))
    return t["gamma"][tail] * u + t["beta"][tail]


def ours(norm: str, t: dict[str, Tensor]) -> Tensor:
    """The same as one fastfilm call."""
    running = norm == "batch"
    out = fastfilm.norm_film(
        t["y"],
        norm=norm,
        norm_weight=t["weight"],
        norm_bias=t["bias"],
        running_mean=t["mean"] if running else None,
        running_var=t["var"] if running else None,
        activation=KINDS[norm],
        slope=None if running else SLOPE,
        gamma=t["gamma"],
        beta=t["beta"],
        order="conv-norm-act-film",
    )
    assert isinstance(out, Tensor)
    return out


def measure(session: Session, dtype: str) -> None:
    """Both kinds on one map."""
    size = (128, 128, 128) if session.device == "cuda" else (64, 64, 64)
    size = (32, 32, 32) if session.quick else size
    plain = make(size, session.device, DTYPES[dtype])
    last = plain | {"y": channels_last(plain["y"])}
    exact = {k: v.to(DTYPES[yardstick(session.device, dtype)]) for k, v in plain.items()}
    for norm, act in KINDS.items():
        label = f"{norm}{' in evaluation' if norm == 'batch' else ''} {act} FiLM"
        case = Case(
            "ops", f"{label} {CHANNELS} @ {'×'.join(map(str, size))} b1", "inference", dtype
        )

        def provider(tail: Tail, t: dict[str, Tensor], norm: str = norm) -> Provider:
            return Provider(lambda: [tail(norm, t)])

        with torch.no_grad():
            session.measure(
                case,
                {
                    "eager": provider(eager, plain),
                    "eager-channels-last": provider(eager, last),
                    "fastfilm": provider(ours, last),
                },
                partial(lambda norm: [eager(norm, exact)], norm),
            )
