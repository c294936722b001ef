"""The backend ``fastfilm`` of ``torch.compile``: groups of calls run as fused blocks, all others as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .calls import checkpointed
from .effects import value
from .rewrite import Found, Rewriter

RESTS = ("eager", "inductor")
Watcher = Callable[[fx.Graph, dict[Any, Any], list[Found]], None]
"""Told of a graph, of its tensors by their placeholders, and of its convolutions."""


def fastfilm(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend for ``torch.compile(model, backend="fastfilm", options={"rest": "inductor"})``.

    Args:
        graph, inputs: as TorchDynamo gives them.
        options: ``rest``: "eager" (default) or "inductor", which runs what is not in a block; other options are
            Inductor's.
        mode: of Inductor, as in ``torch.compile``.

    Raises:
        ValueError: an unknown ``rest``, or options for Inductor without it.
    """
    given = dict(options or {})
    return compiled(graph, inputs, given.pop("rest", "eager"), given, mode)


def compiled(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    rest: str = "eager",
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    watcher: Watcher | None = None,
) -> Callable[..., Any]:
    """The function of a graph, its groups being blocks; see ``fastfilm``."""
    check(rest, options, mode)
    placeholders = graph.graph.find_nodes(op="placeholder")
    tensors = dict(zip(placeholders, inputs, strict=False))
    found: list[Found] = []
    for module in graph.modules():
        # bodies of checkpoints and other functions of functions are graphs of their own
        if isinstance(module, fx.GraphModule):
            rewriter = Rewriter(module.graph)
            if rewriter.run():
                module.graph.lint()
                module.recompile()
            found += rewriter.found
    if watcher is not None:
        watcher(graph.graph, tensors, found)
    if rest == "eager":
        for module in graph.modules():
            if isinstance(module, fx.GraphModule):
                _keep_checkpoints(module)
        return graph.forward
    from torch._inductor.compile_fx import compile_fx

    patches = dict(options or {})
    if mode is not None:
        patches = {**torch._inductor.list_mode_options(mode), **patches}
    return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=patches or None))


def _keep_checkpoints(graph: fx.GraphModule) -> None:
    """Lets checkpoints run as they do without a compiler: with the random numbers of the first time, for one."""
    changed = False
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
            continue
        body, *given = node.args
        # the function closes over parameters, and over tensors without a gradient
        inputs = [_is_input(value(n)) for n in given]
        options = dict(node.kwargs)
        context = getattr(graph, body.target).meta.get("_checkpoint_context_fn")
        if context is not None:
            options["context_fn"] = context
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(checkpointed, (body, given, inputs, options))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        changed = True
    if changed:
        graph.recompile()


def _is_input(given: Any) -> bool:
    return isinstance(given, Tensor) and given.requires_grad and not isinstance(given, nn.Parameter)


def check(rest: str, options: Mapping[str, Any] | None, mode: str | None) -> None:
    """ValueError unless ``rest`` is one of ``RESTS`` and Inductor is there for its options."""
    if rest not in RESTS:
        raise ValueError(f"rest must be one of {', '.join(map(repr, RESTS))}, got {rest!r}")
    if rest == "eager" and (options or mode is not None):
        named = [*(options or {}), *([] if mode is None else ["mode"])]
        raise ValueError(
            f"{', '.join(named)}: these are options of Inductor; pass rest='inductor' too"
        )
