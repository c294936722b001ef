"""One network on one batch: inference, or the forward and backward pass of a training step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from ..counted.roofline import DTYPES
from ..measure.graphs import capture
from ..measure.harness import saved_bytes
from ..measure.providers import amp, channels_last
from ..measure.session import Provider, Results

Batch = tuple[Tensor, Tensor | None, Tensor]
"""Image, metadata and the gradient at the output."""


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
        self.storage = torch.float32 if self.training and dtype != "float64" else DTYPES[dtype]
        self.last = layout == "channels-last"
        model = copy.deepcopy(model).train(self.training)
        if self.last:
            form = torch.channels_last if image.dim() == 4 else torch.channels_last_3d
            model = model.to(memory_format=form)  # type: ignore[call-overload]
        self.model = model.to(self.storage)
        self._take(image, metadata)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.call: Callable[..., object] = self.model

    def _take(self, image: Tensor, metadata: Tensor | None) -> None:
        """Image and metadata in the step's dtype and layout."""
        image = channels_last(image) if self.last else image
        self.image = image.to(self.storage)
        self.metadata = None if metadata is None else metadata.to(self.storage)

    def on(self, image: Tensor, metadata: Tensor | None, upstream: Tensor) -> Step:
        """The same network, not copied, on another batch."""
        other = copy.copy(self)
        other.upstream = upstream
        other._take(image, metadata)
        return other

    def call_by(self, function: Callable[..., object]) -> None:
        """Runs once, from now on with ``function`` in the network's place: its compiled form."""
        self.call = function
        self()

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
        return self._named(self(), names)

    def _named(self, results: Results, names: list[str]) -> Results:
        out, *gradients = results
        if not self.training:
            return [out]
        found = dict(zip(self.parameters, gradients, strict=True))
        if hasattr(self.model, "to_ivadomed"):
            found = _renamed(self.model, found)
        return [out, *(found[n] for n in names)]

    def saved(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, without the parameters."""
        return saved_bytes(self.forward, list(self.model.parameters()))

    def provider(
        self, names: list[str] | None = None, small: Batch | None = None, note: str = ""
    ) -> Provider:
        """This step as something to measure.

        Args:
            names: gradients are compared by these names; None: as they come.
            small: what is compared with the reference is the step on this batch.
        """
        on = self if small is None else self.on(*small)
        check = None if names is None else partial(on.named_results, names)
        return Provider(self, self.saved if self.training else None, check, note)

    def captured(self, names: list[str]) -> Provider:
        """This step replayed from a CUDA graph; its memory is that of a plain call.

        Raises:
            CaptureFailed: the step cannot be captured.
        """
        replay, results = capture(self)

        def check() -> Results:
            replay()
            return self._named([t if t is None else t.clone() for t in results], names)

        def call() -> Results:
            replay()
            return list(results)

        saved = self.saved if self.training else None
        return Provider(call, saved, check, memory=self)


def _renamed(model: nn.Module, gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Gradients under ivadomed's names: they go through ``to_ivadomed`` as the parameters do."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in carrier.named_parameters():
            g = gradients.get(name)
            p.copy_(torch.zeros_like(p) if g is None else g)
    return dict(carrier.to_ivadomed())  # type: ignore[operator]
