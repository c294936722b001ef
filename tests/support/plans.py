"""The plans (backend and route) that serve CPU tensors on this machine: tests take their parameters from here."""

from __future__ import annotations

from fastfilm.ops import choice
from fastfilm.ops.spec import Plan


def plans() -> list[Plan]:
    """The composed route of each backend but the reference, and the fused route of those that have one.

    Triton's kernels count where its interpreter is active.
    """
    found = []
    for b in choice.BACKENDS.values():
        serves = "cpu" in b.devices and b.unavailable() is None
        if (
            not serves
            or b.name == "reference"
            or (b.name == "triton" and not choice.interpreting())
        ):
            continue
        found += [
            Plan(b.name, route) for route in (("composed", "fused") if b.fused else ("composed",))
        ]
    return sorted(found)


def backends() -> list[str]:
    """The backends of ``plans``."""
    return list(dict.fromkeys(p.backend for p in plans()))
