"""A block in inference at batch 1, which cuDNN's own fused graph can express.

Norm and FiLM are one factor and one shift a channel there.

cuDNN fuses a convolution with a bias and a ReLU (``aten::cudnn_convolution_relu``); norm and FiLM with frozen
statistics go into its weights. For several samples with metadata of their own it has no such graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastfilm

from ..blocks import CONV
from ..providers import channels_last
from ..roofline import DTYPES, Layer, work, yardstick
from ..session import Case, Provider, Results, Session

EPS = 1e-5


class Inputs(NamedTuple):
    """One sample, a convolution, a norm's affine and statistics, and FiLM [1, C]."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor

    def to(self, dtype: torch.dtype, layout: str = "contiguous") -> Inputs:
        """In another dtype and layout."""
        moved = [t.to(dtype) for t in self]
        if layout == "channels-last":
            moved[:2] = [channels_last(t) for t in moved[:2]]
        return Inputs(*moved)


def make(layer: Layer, device: str, dtype: torch.dtype) -> Inputs:
    """Random inputs, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(dtype).to(device)

    dims, co = len(layer.size), layer.cout
    weight = normal(
        co, layer.cin, *[layer.kernel] * dims, std=(layer.cin * layer.kernel**dims) ** -0.5
    )
    affine = normal(co, mean=1.0, std=0.1), normal(co, std=0.1)
    statistics = normal(co, std=0.1), normal(co, std=0.1).abs() + 1.0
    film = normal(1, co, mean=1.0, std=0.3), normal(1, co, std=0.3)
    return Inputs(normal(1, layer.cin, *layer.size), weight, *affine, *statistics, *film)


def eager(layer: Layer, i: Inputs) -> Tensor:
    """Convolution, batch norm with its running statistics, FiLM, ReLU."""
    dims = len(layer.size)
    y = CONV[dims](i.x, i.weight, stride=layer.stride, padding=(layer.kernel - 1) // 2)
    y = F.batch_norm(y, i.mean, i.var, i.scale, i.shift, eps=EPS)
    tail = (..., *(None,) * dims)
    return F.relu(i.gamma[tail] * y + i.beta[tail])


def folded(i: Inputs) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that does what convolution, norm and FiLM do; exact in float64."""
    factor = i.gamma[0].double() * i.scale.double() * (i.var.double() + EPS).rsqrt()
    bias = i.gamma[0].double() * i.shift.double() + i.beta[0].double() - factor * i.mean.double()
    weight = i.weight.double() * factor.view(-1, *(1,) * (i.weight.dim() - 1))
    return weight.to(i.weight.dtype), bias.to(i.weight.dtype)


def vendors(layer: Layer, i: Inputs) -> Provider:
    """cuDNN's fused graph."""
    if not i.x.is_cuda:

        def refuse() -> Results:
            raise NotImplementedError("cuDNN runs on CUDA devices")

        return Provider(refuse)
    weight, bias = folded(i)
    dims = len(layer.size)
    weight = channels_last(weight)
    stride, padding = [layer.stride] * dims, [(layer.kernel - 1) // 2] * dims
    fused = torch.ops.aten.cudnn_convolution_relu
    return Provider(lambda: [fused(i.x, weight, bias, stride, padding, [1] * dims, 1)])


def ours(layer: Layer, i: Inputs) -> Tensor:
    """The block as one fastfilm call."""
    out = fastfilm.conv_norm_film(
        i.x,
        i.weight,
        stride=layer.stride,
        padding=(layer.kernel - 1) // 2,
        norm="batch",
        norm_weight=i.scale,
        norm_bias=i.shift,
        running_mean=i.mean,
        running_var=i.var,
        eps=EPS,
        activation="relu",
        gamma=i.gamma,
        beta=i.beta,
        order="conv-norm-film-act",
    )
    assert isinstance(out, Tensor)
    return out


def measure(session: Session, dtype: str) -> None:
    """One case, sized for the device."""
    size = (320, 256) if session.device == "cuda" else (64, 64)
    layer = Layer(64, 64, size)
    source = make(layer, session.device, DTYPES[dtype])
    plain, last = (source.to(DTYPES[dtype], layout) for layout in ("contiguous", "channels-last"))
    least = work([layer], 1, dtype, "forward", session.ceilings)
    case = Case(
        "ops", f"{layer.label} b1 frozen batch conv-norm-film-act", "inference", dtype, least
    )
    exact = DTYPES[yardstick(session.device, dtype)]
    with torch.no_grad():
        session.measure(
            case,
            {
                "eager": Provider(lambda: [eager(layer, plain)]),
                "eager-channels-last": Provider(lambda: [eager(layer, last)]),
                "cudnn-fused": vendors(layer, last),
                "fastfilm": Provider(lambda: [ours(layer, last)]),
            },
            lambda: [eager(layer, source.to(exact))],
        )
