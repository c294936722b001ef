"""``condition``: adds FiLM at chosen layers to a model that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastfilm.nn.generator import PRESETS
from fastfilm.ops import spec

from . import sites
from .conditioned import NAME, take_metadata
from .conversion import KEY
from .film import Conditioner, FiLMHook

_FILM_FIRST, _FILM_LAST, _ = spec.ORDERS


def condition(
    model: nn.Module,
    metadata_size: int | None = None,
    *,
    encoder: nn.Module | None = None,
    where: str | Iterable[str] | Callable[[str, nn.Module], bool] = "decoder",
    order: str = "conv-norm-film-act",
    generator: str = "identity",
    hidden: Iterable[int] = (64, 16),
    example_input: Any = None,
) -> nn.Module:
    """Inserts FiLM into an existing model, in place: ``model(x, metadata)`` from now on.

    A generator (one new submodule, ``film_generator``) turns the metadata of each sample into γ and β for the
    chosen layers, where forward hooks apply them. With ``generator="identity"`` a network that was trained
    before computes what it did, to the last bit, until the generator is trained. Everything else keeps its name
    and value in the ``state_dict``. ``fastfilm.convert``, before or after, makes FiLM a part of its blocks.

    Args:
        model: any model with norms, or with convolutions and activations.
        metadata_size: M, values per sample; or features that ``encoder`` gives.
        encoder: from the metadata that a call brings to features [N, M]; trained with the generator.
        where: "decoder", "encoder", "all" (convolutions larger than 1×1 with a norm or an activation), names of
            layers or of modules that hold them, or a function of (name, layer).
        order: "conv-norm-film-act", or "conv-norm-act-film" where the activation is a module of its own behind
            its norm in a ``Sequential``; where an activation stands before its norm, FiLM follows the norm.
        generator: "identity" or "paper", see ``fastfilm.FiLMGenerator``.
        hidden: widths of the generator's hidden layers.
        example_input: an input, or a tuple of inputs, to tell the decoder of a model with unknown names by its
            map sizes (one forward in evaluation mode).

    Returns:
        ``model``. It is called as before plus metadata [N, M], [1, M] or [M], last or as ``metadata=``; or
        without, inside ``with fastfilm.metadata(rows):``.

    Raises:
        TypeError: not a module, or neither ``metadata_size`` nor ``encoder``.
        ValueError: no such layer, unknown options, an activation that cannot be told, or a model that is
            conditioned already.

    Example:
        >>> import torch, fastfilm
        >>> layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        >>> model = fastfilm.condition(torch.nn.Sequential(*layers), metadata_size=2, where="all")
        >>> model(torch.randn(3, 1, 8, 8), [[0, 1], [1, 0], [1, 0]]).shape
        torch.Size([3, 4, 6, 6])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    size = _metadata_size(metadata_size, encoder)
    order = spec.choice("order", order, spec.ORDERS)
    if order not in (_FILM_FIRST, _FILM_LAST):
        raise ValueError(
            f"order must be {_FILM_FIRST!r} or {_FILM_LAST!r}: where the activation stands before the norm is the"
            " model's own affair"
        )
    generator = spec.choice("generator", generator, PRESETS)
    compiled = model._modules.get("_orig_mod")
    if compiled is not None:
        # a module that torch.compile has wrapped
        condition(
            compiled,
            metadata_size,
            encoder=encoder,
            where=where,
            order=order,
            generator=generator,
            hidden=hidden,
            example_input=example_input,
        )
        return model
    if NAME in dict(model.named_children()):
        raise ValueError("model is conditioned already")
    found = sites.find(model)
    if not found and (isinstance(where, str) or callable(where)):
        raise ValueError(
            "model has no convolution with a norm or an activation that FiLM could act in"
        )
    chosen = sites.choose(model, found, where, example_input)
    places = {}
    for site in chosen:
        path, before = site.path, site.before
        if order == _FILM_LAST:
            path, before = sites.activation_behind(model, site), False
        places[site.name] = path, before
    conditioner = Conditioner(
        {s.name: s.channels for s in chosen}, size, encoder, generator, tuple(hidden)
    )
    take_metadata(model, {name: path for name, (path, _) in places.items()})
    # the handle is kept: a pickled handle reserves its hook's number
    handles = model.__dict__["_film_handles"] = []
    for name, (path, before) in places.items():
        layer = model.get_submodule(path)
        hook = FiLMHook(name, before)
        # in front of existing hooks, which see the layer's new output
        if before:
            handles.append(layer.register_forward_pre_hook(hook))
        else:
            handles.append(layer.register_forward_hook(hook, prepend=True))
    conditioner.to(device=next(model.parameters()).device)
    conditioner.train(model.training)
    model.add_module(NAME, conditioner)
    converted = model.__dict__.get(KEY)
    if converted is not None:
        converted.renew()
    return model


def generator_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that ``condition`` added to a model (its generator's and encoder's)."""
    return [p for c in _conditioners(model) for p in c.parameters()]


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.0, generator_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters of a conditioned model as two groups for an optimiser: the network's and the generator's.

    Args:
        weight_decay: of the network.
        generator_weight_decay: of the generator; it pulls γ and β towards the identity.

    Raises:
        ValueError: ``model`` is not conditioned.
    """
    own = generator_parameters(model)
    if not own:
        raise ValueError("model is not conditioned: it has no generator")
    ids = {id(p) for p in own}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        {"params": rest, "weight_decay": weight_decay},
        {"params": own, "weight_decay": generator_weight_decay},
    ]


def _metadata_size(size: int | None, encoder: nn.Module | None) -> int:
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    if size is None:
        if encoder is None:
            raise TypeError("metadata_size or encoder must be given")
        sizes = [
            getattr(m, "out_features", getattr(m, "embedding_dim", None)) for m in encoder.modules()
        ]
        size = next((s for s in reversed(sizes) if isinstance(s, int)), None)
        if size is None:
            raise ValueError("metadata_size must say how many features the encoder gives")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"metadata_size must be a positive integer, got {size!r}")
    return size


def _conditioners(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Conditioner)]
