"""One convolution block with its tensors, as each provider computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastfilm

from ..counted.deciding_layers import Block
from ..counted.inside import defined_convolution
from ..counted.roofline import Layer
from ..measure.harness import saved_bytes
from ..measure.providers import channels_last
from ..measure.session import Results

CONV = {2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
SLOPE = 0.01


@dataclass
class Tensors:
    """The inputs of a block; ``upstream`` is the gradient at its output.

    ``input_grad`` says whether x is differentiated; a network's first layer does not need that.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    gamma: Tensor
    beta: Tensor
    upstream: Tensor
    input_grad: bool = True

    def leaves(self) -> list[Tensor]:
        """All that a training step differentiates."""
        first = [self.x] if self.input_grad else []
        return [*first, *self.parameters(), self.gamma, self.beta]

    def parameters(self) -> list[Tensor]:
        """What does not count as saved: the weights, not the input."""
        some = (self.weight, self.bias, self.norm_weight, self.norm_bias)
        return [t for t in some if t is not None]

    def to(self, dtype: torch.dtype, layout: str = "contiguous", grad: bool = True) -> Tensors:
        """Copies in a dtype and a layout; γ and β stay float32 unless ``dtype`` is float64."""

        def copy(t: Tensor | None, spatial: bool = False, film: bool = False) -> Tensor | None:
            if t is None:
                return None
            t = t.detach().to(torch.float32 if film and dtype != torch.float64 else dtype)
            if spatial and layout == "channels-last":
                t = channels_last(t)
            return t.clone().requires_grad_(grad)

        values = {
            name: copy(
                getattr(self, name),
                spatial=name in ("x", "weight", "upstream"),
                film=name in ("gamma", "beta"),
            )
            for name in self.__dataclass_fields__
            if name != "input_grad"
        }
        for name in ("upstream",) if self.input_grad else ("upstream", "x"):
            values[name] = values[name].detach()  # type: ignore[union-attr]
        return Tensors(**values, input_grad=self.input_grad)  # type: ignore[arg-type]


def make(block: Block, device: str, dtype: torch.dtype, seed: int = 0) -> Tensors:
    """Random inputs, rounded to ``dtype``: every provider and the reference get the same values."""
    layer, n = block.layer, block.batch
    # on the device: the host takes seconds for the maps of a large layer
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale + shift
        return values.to(dtype)

    kernel = (layer.kernel,) * len(layer.size)
    channels = (layer.cin, layer.cout) if layer.transposed else (layer.cout, layer.cin)
    fan_in = layer.cin * layer.kernel ** (0 if layer.transposed else len(kernel))
    bias = block.order == "conv-act-norm-film"  # in front of a norm a bias has no effect
    return Tensors(
        x=normal(n, layer.cin, *layer.size),
        weight=normal(*channels, *kernel, scale=fan_in**-0.5),
        bias=normal(layer.cout, scale=0.1) if bias else None,
        norm_weight=normal(layer.cout, scale=0.1, shift=1.0),
        norm_bias=normal(layer.cout, scale=0.1),
        gamma=normal(n, layer.cout, scale=0.3, shift=1.0).float(),
        beta=normal(n, layer.cout, scale=0.3).float(),
        upstream=normal(n, layer.cout, *layer.output),
        input_grad=layer.input_grad,
    )


def convolve(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's convolution by PyTorch."""
    dims = len(layer.size)
    if layer.transposed:
        return TRANSPOSED[dims](x, weight, bias, stride=layer.stride)
    return CONV[dims](x, weight, bias, stride=layer.stride, padding=(layer.kernel - 1) // 2)


def _norm(block: Block, u: Tensor, t: Tensors) -> Tensor:
    if block.norm == "batch":
        return F.batch_norm(u, None, None, t.norm_weight, t.norm_bias, training=True)
    if block.norm == "instance":
        return F.instance_norm(u, weight=t.norm_weight, bias=t.norm_bias)
    return F.group_norm(u, 1 if block.norm == "layer" else 8, t.norm_weight, t.norm_bias)


def _act(block: Block, u: Tensor) -> Tensor:
    if block.act == "leaky_relu":
        return F.leaky_relu(u, SLOPE)
    return F.silu(u) if block.act == "silu" else F.relu(u)


def eager_tail(block: Block, y: Tensor, t: Tensors, expanded: bool = False) -> Tensor:
    """Activation, norm and FiLM behind the convolution's output ``y``, layer by layer."""
    film = torch.cat([t.gamma, t.beta], 1).to(y.dtype)
    film = film.reshape(*film.shape, *(1,) * (y.dim() - 2))
    if expanded:
        film = film.repeat(1, 1, *y.shape[2:])
    gamma, beta = film.chunk(2, 1)
    if block.order == "conv-act-norm-film":
        return gamma * _norm(block, _act(block, y), t) + beta
    if block.order == "conv-norm-act-film":
        return gamma * _act(block, _norm(block, y, t)) + beta
    return _act(block, gamma * _norm(block, y, t) + beta)


def eager(block: Block, t: Tensors, expanded: bool = False) -> Tensor:
    """The block layer by layer; ``expanded`` repeats γ and β to full maps first."""
    return eager_tail(block, convolve(block.layer, t.x, t.weight, t.bias), t, expanded)


def _tail_options(block: Block, t: Tensors) -> dict[str, Any]:
    """What ``conv_norm_film`` and ``norm_film`` take of a block behind its convolution."""
    return {
        "norm": block.norm,
        "norm_weight": t.norm_weight,
        "norm_bias": t.norm_bias,
        "num_groups": 8 if block.norm == "group" else None,
        "training": True,
        "activation": block.act,
        "slope": SLOPE if block.act == "leaky_relu" else None,
        "gamma": t.gamma,
        "beta": t.beta,
        "order": block.order,
    }


def fused(block: Block, t: Tensors) -> Tensor:
    """The block as one fastfilm op."""
    out = fastfilm.conv_norm_film(
        t.x,
        t.weight,
        t.bias,
        stride=block.layer.stride,
        padding=(block.layer.kernel - 1) // 2,
        **_tail_options(block, t),
    )
    assert isinstance(out, Tensor)
    return out


def definition_tail(block: Block, y: Tensor, t: Tensors) -> Tensor:
    """Activation, norm and FiLM behind the convolution's output ``y`` by fastfilm's reference."""
    with fastfilm.backend("reference"):
        out = fastfilm.norm_film(y, **_tail_options(block, t))
    assert isinstance(out, Tensor)
    return out


def definition(block: Block, t: Tensors) -> Tensor:
    """The block by fastfilm's reference; called with float64 tensors it is the yardstick."""
    layer = block.layer
    y = defined_convolution(t.x, t.weight, t.bias, layer.stride, (layer.kernel - 1) // 2)
    return definition_tail(block, y, t)


def results(function: Callable[[Tensors], Tensor], t: Tensors, mode: str) -> Results:
    """[output], or [output, gradients of every leaf] in mode "forward+backward"."""
    if mode == "forward":
        with torch.no_grad():
            return [function(t)]
    out = function(t)
    return [out.detach(), *torch.autograd.grad(out, t.leaves(), t.upstream)]


def saved(function: Callable[[Tensors], Tensor], t: Tensors) -> int:
    """Bytes kept for the backward pass of ``function(t)``, without the parameters."""
    return saved_bytes(lambda: function(t), t.parameters())
