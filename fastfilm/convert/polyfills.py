"""Functions that TorchDynamo does not follow though a forward that calls them could be one graph."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch


@functools.cache
def register() -> None:
    """Lets TorchDynamo follow ``torch.jit.isinstance``, at which MONAI's BasicUNet would fall into many graphs.

    Where another version of TorchDynamo has no place for it, the graphs stay many.
    """
    original = torch.jit.isinstance
    from torch._dynamo import trace_rules

    with contextlib.suppress(AttributeError, ValueError, TypeError):
        rules = trace_rules.get_torch_obj_rule_map()
        rule = rules.pop(original, None)
        try:
            torch.compiler.substitute_in_graph(original)(_isinstance(original))
        except (ValueError, TypeError):
            if rule is not None:
                rules[original] = rule


def _isinstance(original: Any) -> Any:
    beyond = torch.compiler.disable(original)

    def isinstance_(obj: Any, target_type: Any) -> bool:
        if isinstance(target_type, type):
            return isinstance(obj, target_type)
        # a type of the module typing
        return beyond(obj, target_type)

    return isinstance_
