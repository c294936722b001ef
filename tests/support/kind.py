"""A block behind its convolution as data, of which a test names what it is about."""

from __future__ import annotations

from typing import Any

from fastfilm.ops import spec
from fastfilm.ops.spec import Kind


def kind_of(**fields: Any) -> Kind:
    """A block in float64 on maps [2, 6, *S]: no norm and no activation, but for ``fields``."""
    plain = dict.fromkeys(("training", "uses_input", "update"), False)
    plain |= {"norm": "none", "activation": "none", "order": spec.ORDERS[0]}
    plain |= {"dropout_position": "end", "groups": 1, "eps": 1e-5, "slope": 0.0}
    plain |= {"batch": 2, "channels": 6, "count": 1, "wide": True}
    return Kind(**plain | fields)
