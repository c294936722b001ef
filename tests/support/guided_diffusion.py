"""The U-Net of guided diffusion (Dhariwal and Nichol, 2021), written anew in its published structure.

Modules, their names and the order of operations follow the published network, since it is what people convert:
norms that compute in float32, blocks that run without a graph and again in the backward pass, scale and shift
from the time step's embedding, and convolutions that start at zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOL: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Group norm in float32, whatever the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *S] -> [N, C, *S] in the input's dtype."""
        return super().forward(x.float()).type(x.dtype)


def normalization(channels: int) -> nn.Module:
    """The norm of all blocks, with 32 groups."""
    return GroupNorm32(32, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Cosines and sines of the time steps at geometric frequencies: [N] -> [N, width]."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)[None]
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(waves, (0, width % 2))


def checkpoint(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Iterable[nn.Parameter],
    flag: bool,
) -> Tensor:
    """``function(*inputs)``; with ``flag``, its inner tensors are computed again in the backward pass."""
    if not flag:
        return function(*inputs)
    arguments = (*inputs, *parameters)
    found: Tensor = CheckpointFunction.apply(function, len(inputs), *arguments)
    return found


class CheckpointFunction(torch.autograd.Function):
    """Runs without a graph, and once more with one when gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *args: Tensor) -> Tensor:
        """Output of the function on the first ``count`` arguments; the others are its parameters."""
        ctx.function = function
        ctx.inputs, ctx.parameters = list(args[:count]), list(args[count:])
        with torch.no_grad():
            return ctx.function(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and parameters, by the second run."""
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            # the function may write to its inputs, but not to leaves
            output = ctx.function(*[x.view_as(x) for x in inputs])
        found = torch.autograd.grad(output, inputs + ctx.parameters, grads, allow_unused=True)
        del ctx.inputs, ctx.parameters
        return (None, None, *found)


class TimestepBlock(nn.Module):
    """A module that takes the embedding of the time step as its second argument."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, *S], emb [N, E]."""
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Modules in a row, of which those that take the embedding are given it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """x [N, C, *S], emb [N, E]."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Twice the size by the nearest pixel, then a convolution if asked for; 3D keeps its first axis."""

    def __init__(self, channels: int, use_conv: bool, dims: int, out: int | None = None) -> None:
        super().__init__()
        self.use_conv, self.dims = use_conv, dims
        if use_conv:
            self.conv = CONV[dims](channels, out or channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *S] -> [N, C', *T]."""
        if self.dims == 3:
            x = F.interpolate(x, (x.shape[2], x.shape[3] * 2, x.shape[4] * 2), mode="nearest")
        else:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Half the size by a strided convolution or by averages; 3D keeps its first axis."""

    def __init__(self, channels: int, use_conv: bool, dims: int, out: int | None = None) -> None:
        super().__init__()
        stride: Any = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = CONV[dims](channels, out or channels, 3, stride=stride, padding=1)
        else:
            self.op = POOL[dims](kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *S] -> [N, C', *T]."""
        return self.op(x)


class ResBlock(TimestepBlock):
    """Two norms, activations and convolutions beside a skip; the embedding acts between them.

    Args:
        channels: of the input.
        emb_channels: width of the embedding.
        out_channels: of the output; None: as many as the input.
        use_conv: whether a skip that changes the channels has a kernel of 3 instead of 1.
        use_scale_shift_norm: the embedding scales and shifts the second norm; else it is added before it.
        up, down: the size is doubled or halved between the first activation and convolution.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        *,
        dims: int = 2,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out = out_channels or channels
        self.use_checkpoint, self.use_scale_shift_norm = use_checkpoint, use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), CONV[dims](channels, out, 3, padding=1)
        )
        self.updown = up or down
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        width = 2 * out if use_scale_shift_norm else out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            normalization(out),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(CONV[dims](out, out, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out != channels:
            kernel = 3 if use_conv else 1
            self.skip_connection = CONV[dims](channels, out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, *S], emb [N, E] -> [N, C', *T]."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            before, conv = self.in_layers[:-1], self.in_layers[-1]
            h = self.h_upd(before(x))
            x = self.x_upd(x)
            h = conv(h)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Attention among positions; queries, keys and values are split inside or outside of the heads.

    Args:
        heads_first: [N, heads × 3 × C, T] as the first form of the network has it, else [N, 3 × heads × C, T].
    """

    def __init__(self, n_heads: int, heads_first: bool) -> None:
        super().__init__()
        self.n_heads, self.heads_first = n_heads, heads_first

    def forward(self, qkv: Tensor) -> Tensor:
        """[N, 3 × heads × C, T] -> [N, heads × C, T]."""
        batch, width, length = qkv.shape
        ch = width // (3 * self.n_heads)
        rows = batch * self.n_heads
        if self.heads_first:
            q, k, v = qkv.reshape(rows, 3 * ch, length).split(ch, dim=1)
        else:
            q, k, v = (part.reshape(rows, ch, length) for part in qkv.chunk(3, dim=1))
        # the root of the usual scale on each side, which float16 bears better
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length)


class AttentionBlock(nn.Module):
    """Norm, attention among all positions and projection, added to the input; always checkpointed."""

    def __init__(self, channels: int, n_heads: int, heads_first: bool) -> None:
        super().__init__()
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(n_heads, heads_first)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *S] -> [N, C, *S]."""
        return checkpoint(self._forward, (x,), self.parameters(), True)

    def _forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        x = x.reshape(batch, channels, -1)
        h = self.proj_out(self.attention(self.qkv(self.norm(x))))
        return (x + h).reshape(batch, channels, *size)


class UNetModel(nn.Module):
    """The U-Net with attention and an embedding of the time step, and of a class if there are any.

    Args:
        model_channels: of the first level; the others have multiples, ``channel_mult``.
        num_res_blocks: a level, on the way down; one more on the way up.
        attention_resolutions: factors of downsampling at which there is attention.
        num_head_channels: channels a head; -1: ``num_heads`` heads.
        resblock_updown: residual blocks change the size, instead of a convolution.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        *,
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels, self.num_classes = model_channels, num_classes
        self.dtype = torch.float32
        width = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, width)

        def res(cin: int, cout: int, **options: bool) -> ResBlock:
            return ResBlock(
                cin,
                width,
                dropout,
                cout,
                dims=dims,
                use_checkpoint=use_checkpoint,
                use_scale_shift_norm=use_scale_shift_norm,
                **options,
            )

        def attention(channels: int) -> AttentionBlock:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            return AttentionBlock(channels, heads, not use_new_attention_order)

        ch = channel_mult[0] * model_channels
        first = CONV[dims](in_channels, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        kept, factor = [ch], 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(ch, mult * model_channels)]
                ch = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(ch))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                kept.append(ch)
            if level != len(channel_mult) - 1:
                smaller = (
                    res(ch, ch, down=True)
                    if resblock_updown
                    else Downsample(ch, conv_resample, dims)
                )
                self.input_blocks.append(TimestepEmbedSequential(smaller))
                kept.append(ch)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(res(ch, ch), attention(ch), res(ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res(ch + kept.pop(), mult * model_channels)]
                ch = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(ch))
                if level and i == num_res_blocks:
                    layers.append(
                        res(ch, ch, up=True)
                        if resblock_updown
                        else Upsample(ch, conv_resample, dims)
                    )
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(ch),
            nn.SiLU(),
            zero_module(CONV[dims](ch, out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [N, C, *S], timesteps [N], classes y [N] -> [N, out, *S].

        Raises:
            ValueError: classes without ``num_classes``, or the other way round.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("y is given if and only if the network has classes")
        steps = timestep_embedding(timesteps, self.model_channels)
        emb = self.time_embed(steps.type(self.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, kept = x.type(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            kept.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, kept.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


def small(**options: Any) -> UNetModel:
    """Two levels of 32 and 64 channels on grey images, attention at the lower one, as published otherwise."""
    usual: dict[str, Any] = {
        "channel_mult": (1, 2),
        "num_head_channels": 32,
        "use_scale_shift_norm": True,
    }
    return UNetModel(1, 32, 2, 1, (2,), **(usual | options))


def stirred(model: UNetModel, seed: int = 0) -> UNetModel:
    """The network with random values in place of zeros, as after some training: all gradients are seen."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if not p.any():
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def exact(model: UNetModel) -> UNetModel:
    """A copy in float64 throughout, norms too, as the measure of errors."""
    twin = copy.deepcopy(model).double()
    twin.dtype = torch.float64
    for module in twin.modules():
        if type(module) is GroupNorm32:
            module.__class__ = nn.GroupNorm
    return twin
