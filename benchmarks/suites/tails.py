"""Norm, activation and FiLM behind a convolution, in inference: without it, and as part of it.

Without the convolution, on a map of 32 channels: instance norm with leaky ReLU takes statistics of the map, batch
norm with ReLU has its running ones. With the convolution, at batch 1 and with running statistics, norm and FiLM
are one factor and one shift a channel. These go into the weights of the fused graph that cuDNN has for a
convolution with a bias and a ReLU (``aten::cudnn_convolution_relu``). For several samples with metadata of their
own there is no such graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastfilm

from ..counted.roofline import DTYPES, Layer, work, yardstick
from ..measure.providers import channels_last
from ..measure.session import Case, Provider, Results, Session
from ..subjects.blocks import CONV, SLOPE

CHANNELS = 32
KINDS = {"instance": "leaky_relu", "batch": "relu"}
EPS = 1e-5

Inputs = dict[str, Tensor]
"""A map or image "y" [1, Ci, *S]; "mean", "var", "weight" and "bias" of the norm [C]; "gamma" and "beta" [1, C];
"kernel" [C, Ci, *K] where a convolution is in front."""


def make(
    size: tuple[int, ...], device: str, dtype: torch.dtype, layer: Layer | None = None
) -> Inputs:
    """Random inputs, rounded to ``dtype``: a map of ``CHANNELS``, or a layer's image and kernel."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std + mean).to(dtype)

    c = CHANNELS if layer is None else layer.cout
    found = {
        "y": normal(1, c if layer is None else layer.cin, *size),
        "weight": normal(c, mean=1.0, std=0.1),
        "bias": normal(c, std=0.1),
        "mean": normal(c, std=0.1),
        "var": normal(c, std=0.1).abs() + 1.0,
        "gamma": normal(1, c, mean=1.0, std=0.3),
        "beta": normal(1, c, std=0.3),
    }
    if layer is not None:
        kernel = (layer.kernel,) * len(size)
        std = (layer.cin * layer.kernel ** len(size)) ** -0.5
        found["kernel"] = normal(c, layer.cin, *kernel, std=std)
    return found


def _last(t: Inputs) -> Inputs:
    """The same with maps and kernel in channels-last strides."""
    return {k: channels_last(v) if v.dim() > 2 else v for k, v in t.items()}


def _film(u: Tensor, t: Inputs) -> Tensor:
    tail = (..., *(None,) * (u.dim() - 2))
    return t["gamma"][tail] * u + t["beta"][tail]


def _batch_norm(u: Tensor, t: Inputs) -> Tensor:
    return F.batch_norm(u, t["mean"], t["var"], t["weight"], t["bias"], eps=EPS)


def eager(norm: str, t: Inputs) -> Tensor:
    """Norm, activation and FiLM layer by layer in PyTorch."""
    if norm == "batch":
        return _film(F.relu(_batch_norm(t["y"], t)), t)
    u = F.instance_norm(t["y"], weight=t["weight"], bias=t["bias"])
    return _film(F.leaky_relu(u, SLOPE), t)


def ours(norm: str, t: Inputs) -> Tensor:
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


def eager_block(layer: Layer, t: Inputs) -> Tensor:
    """Convolution, batch norm with its running statistics, FiLM, ReLU."""
    padding = (layer.kernel - 1) // 2
    y = CONV[len(layer.size)](t["y"], t["kernel"], stride=layer.stride, padding=padding)
    return F.relu(_film(_batch_norm(y, t), t))


def our_block(layer: Layer, t: Inputs) -> Tensor:
    """The same as one fastfilm call."""
    out = fastfilm.conv_norm_film(
        t["y"],
        t["kernel"],
        stride=layer.stride,
        padding=(layer.kernel - 1) // 2,
        norm="batch",
        norm_weight=t["weight"],
        norm_bias=t["bias"],
        running_mean=t["mean"],
        running_var=t["var"],
        eps=EPS,
        activation="relu",
        gamma=t["gamma"],
        beta=t["beta"],
        order="conv-norm-film-act",
    )
    assert isinstance(out, Tensor)
    return out


def folded(t: Inputs) -> tuple[Tensor, Tensor]:
    """Kernel and bias of one convolution that does what convolution, norm and FiLM do; exact in float64."""
    wide = {k: t[k].double() for k in ("mean", "var", "weight", "bias", "gamma", "beta")}
    gamma, beta = wide["gamma"][0], wide["beta"][0]
    factor = gamma * wide["weight"] * (wide["var"] + EPS).rsqrt()
    shift = gamma * wide["bias"] + beta - factor * wide["mean"]
    kernel = t["kernel"].double() * factor.view(-1, *(1,) * (t["kernel"].dim() - 1))
    return kernel.to(t["kernel"].dtype), shift.to(t["kernel"].dtype)


def vendors_block(layer: Layer, t: Inputs) -> Provider:
    """cuDNN's fused graph."""
    if not t["y"].is_cuda:

        def refuse() -> Results:
            raise NotImplementedError("cuDNN runs on CUDA devices")

        return Provider(refuse)
    kernel, bias = folded(t)
    kernel, dims = channels_last(kernel), len(layer.size)
    geometry = [layer.stride] * dims, [(layer.kernel - 1) // 2] * dims, [1] * dims, 1
    fused = torch.ops.aten.cudnn_convolution_relu
    return Provider(lambda: [fused(t["y"], kernel, bias, *geometry)])


def measure(session: Session, dtype: str) -> None:
    """The block behind a convolution, then both kinds without one; sized for the device."""
    exact = DTYPES[yardstick(session.device, dtype)]
    layer = Layer(64, 64, (320, 256) if session.device == "cuda" else (64, 64))
    plain = make(layer.size, session.device, DTYPES[dtype], layer)
    true, last = {k: v.to(exact) for k, v in plain.items()}, _last(plain)
    least = work([layer], 1, dtype, "forward", session.ceilings)
    name = f"{layer.label} b1 frozen batch conv-norm-film-act"
    candidates = {
        "eager": Provider(lambda: [eager_block(layer, plain)]),
        "eager-channels-last": Provider(lambda: [eager_block(layer, last)]),
        "cudnn-fused": vendors_block(layer, last),
        "fastfilm": Provider(lambda: [our_block(layer, last)]),
    }
    with torch.no_grad():
        case = Case("ops", name, "inference", dtype, least)
        session.measure(case, candidates, lambda: [eager_block(layer, true)])
    size = (128, 128, 128) if session.device == "cuda" else (64, 64, 64)
    size = (32, 32, 32) if session.quick else size
    for norm, act in KINDS.items():
        _without(session, dtype, norm, act, size)


def _without(session: Session, dtype: str, norm: str, act: str, size: tuple[int, ...]) -> None:
    """One kind without a convolution."""
    plain = make(size, session.device, DTYPES[dtype])
    true = {k: v.to(DTYPES[yardstick(session.device, dtype)]) for k, v in plain.items()}
    last = _last(plain)
    label = f"{norm}{' in evaluation' if norm == 'batch' else ''} {act} FiLM"
    name = f"{label} {CHANNELS} @ {'×'.join(map(str, size))} b1"
    candidates = {
        "eager": Provider(lambda: [eager(norm, plain)]),
        "eager-channels-last": Provider(lambda: [eager(norm, last)]),
        "fastfilm": Provider(lambda: [ours(norm, last)]),
    }
    with torch.no_grad():
        case = Case("ops", name, "inference", dtype)
        session.measure(case, candidates, lambda: [eager(norm, true)])
