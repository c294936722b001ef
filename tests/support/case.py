"""One random call of ``conv_norm_film``, run on any backend with its gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastfilm
from fastfilm.ops.settings import environment

SLOW = environment.read("FASTFILM_SLOW_TESTS") == "1"
"""Whether the slow tests run too."""

LEAVES = ("x", "weight", "bias", "norm_weight", "norm_bias", "gamma", "beta", "slope")


@dataclass(frozen=True)
class Case:
    """Shapes and options of a call; ``run`` draws the same values for every backend and dtype."""

    size: tuple[int, ...] = (7, 6)
    batch: int = 2
    channels: tuple[int, int] = (3, 5)
    kernel: int = 3
    stride: int = 1
    norm: str = "batch"
    activation: str = "silu"
    order: str = "conv-norm-film-act"
    bias: bool = True
    affine: bool = True
    film: bool = True
    training: bool = True
    running: bool = True
    dropout_position: str | None = None
    pending: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def run(
        self,
        backend: str | None,
        route: str | None,
        dtype: torch.dtype,
        storage: torch.dtype | None = None,
        device: str = "cpu",
    ) -> dict[str, Tensor]:
        """Output, gradients and running statistics.

        Values of x and weight are rounded to ``storage`` and then given in ``dtype``; the input has an
        affine pending on it if ``pending``.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, kind: torch.dtype | None = None) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind or small)

        small = torch.float64 if dtype == torch.float64 else torch.float32
        storage = storage or dtype
        ci, co = self.channels
        values = {
            "x": draw(self.batch, ci, *self.size, kind=storage).to(dtype),
            "weight": (0.3 * draw(co, ci, *[self.kernel] * len(self.size), kind=torch.float64))
            .to(storage)
            .to(dtype),
        }
        bias, norm_weight, norm_bias = draw(co), draw(co), draw(co)
        gamma, beta, slope = draw(self.batch, co), draw(self.batch, co), draw(co).abs()
        mean, var = draw(co), draw(co).abs() + 0.5
        mask = (draw(self.batch, co) > -0.5).to(small) / 0.7
        inner_weight = (0.5 * draw(ci, ci, *[1] * len(self.size), kind=torch.float64)).to(storage)
        inner = draw(self.batch, ci), draw(self.batch, ci)
        if self.bias:
            values["bias"] = bias
        if self.affine and self.norm != "none":
            values |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
        if self.film:
            values |= {"gamma": gamma, "beta": beta}
        if self.activation == "prelu":
            values["slope"] = slope
        leaves = {k: v.detach().to(device).requires_grad_() for k, v in values.items()}
        options: dict[str, Any] = {
            "norm": self.norm,
            "activation": self.activation,
            "order": self.order,
            "stride": self.stride,
            "padding": self.kernel // 2,
            "training": self.training,
            "num_groups": 1 if self.norm == "group" else None,
            **self.options,
        }
        running = self.running and self.norm in ("batch", "instance")
        if running:
            options |= {"running_mean": mean.to(device), "running_var": var.to(device)}
        if self.dropout_position is not None:
            options |= {
                "dropout_mask": mask.to(device),
                "dropout_position": self.dropout_position,
            }
        with fastfilm.backend(backend, route):
            x: Any = leaves["x"]
            if self.pending:
                x = fastfilm.conv_norm_film(
                    x,
                    inner_weight.to(dtype).to(device),
                    gamma=inner[0].to(device),
                    beta=inner[1].to(device),
                    activation="silu",
                    order="conv-norm-act-film",
                    deferred=True,
                )
            others = {k: v for k, v in leaves.items() if k != "x"}
            v = fastfilm.conv_norm_film(x, **others, **options)
        assert isinstance(v, Tensor)
        weights = torch.cos(torch.arange(v.numel(), dtype=torch.float64)).reshape(v.shape)
        out = {"output": v}
        if any(t.requires_grad for t in leaves.values()):
            grads = torch.autograd.grad(
                (v * weights.to(device, v.dtype)).sum(),
                list(leaves.values()),
                allow_unused=True,
                materialize_grads=True,
            )
            out |= {f"grad_{k}": g for k, g in zip(leaves, grads, strict=True)}
        if running:
            out |= {k: options[k] for k in ("running_mean", "running_var")}
        return out
