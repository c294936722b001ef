"""Registration of the ``fastfilm::`` operators with ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastfilm", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., Any] | None = None,
) -> None:
    """Defines ``fastfilm::<schema>`` with its kernel, its shape function and its gradient.

    An operator without ``backward`` raises when it is differentiated: silence would be a wrong gradient.
    """
    name = "fastfilm::" + schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(schema.partition("(")[0], implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(
                f"{name} is not differentiable; use fastfilm.backend('reference') for higher derivatives"
            )

    torch.library.register_autograd(name, backward, setup_context=setup, lib=_LIBRARY)
