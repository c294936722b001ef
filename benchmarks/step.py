"""One network on one batch: inference, or the forward and backward pass of a training step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from .harness import saved_bytes
from .providers import amp, channels_last
from .roofline import DTYPES
from .session import Provider, Results


class Step:
    """A network with its batch, ready to be timed.

    16-bit inference runs on a network cast to that dtype; 16-bit training runs under autocast with
    float32 parameters. No loss function and no optimiser are in the figures.

    Args:
        model: any network called as ``model(image, metadata)``; it is copied.
        image, metadata, upstream: float32 batch, and the gradient at the output.
        mode: "inference" or "training".
        layout: "contiguous" or "channels-last", of the image and of the parameters.
        scope: context in which every call runs (a forced backend).
    """

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        metadata: Tensor | None,
        upstream: Tensor,
        *,
        mode: str,
        dtype: str,
        layout: str = "contiguous",
        scope: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self.training = mode == "training"
        self.device, self.scope, self.upstream = image.device.type, scope, upstream
        self.amp_dtype = dtype if self.training else "float32"
        model = copy.deepcopy(model).train(self.training)
        if layout == "channels-last":
            form = torch.channels_last if image.dim() == 4 else torch.channels_last_3d
            model = model.to(memory_format=form)  # type: ignore[call-overload]
            image = channels_last(image)
        if dtype == "float64" or not self.training:
            storage = DTYPES[dtype]
            model, image = model.to(storage), image.to(storage)
            metadata = None if metadata is None else metadata.to(storage)
        self.model, self.image, self.metadata = model, image, metadata
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.call: Callable[..., object] = model

    def forward(self) -> Tensor:
        """The output, with a graph when training."""
        with self.scope(), amp(self.device, self.amp_dtype), torch.set_grad_enabled(self.training):
            out = self.call(self.image, self.metadata)
        assert isinstance(out, Tensor)
        return out

    def __call__(self) -> Results:
        """[output], or [output, gradient of each parameter]."""
        out = self.forward()
        if not self.training:
            return [out]
        with self.scope():
            gradients = torch.autograd.grad(
                out, list(self.parameters.values()), self.upstream.to(out.dtype), allow_unused=True
            )
        return [out.detach(), *gradients]

    def named_results(self, names: list[str]) -> Results:
        """[output], or [output, gradient of each of ``names``], which are ivadomed's names."""
        out, *gradients = self()
        if not self.training:
            return [out]
        found = dict(zip(self.parameters, gradients, strict=True))
        if hasattr(self.model, "to_ivadomed"):
            found = _renamed(self.model, found)
        return [out, *(found[n] for n in names)]

    def saved(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, without the parameters."""
        return saved_bytes(self.forward, list(self.model.parameters()))

    def provider(self, names: list[str] | None = None) -> Provider:
        """This step as something to measure; with ``names``, gradients are compared by name."""
        check = None if names is None else partial(self.named_results, names)
        return Provider(self, self.saved if self.training else None, check)


def _renamed(model: nn.Module, gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Gradients under ivadomed's names: they go through ``to_ivadomed`` as the parameters do."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in carrier.named_parameters():
            g = gradients.get(name)
            p.copy_(torch.zeros_like(p) if g is None else g)
    return dict(carrier.to_ivadomed())  # type: ignore[operator]
