"""The choice of a plan, backend and route, for a call: from what is forced, available, supported and measured."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..launchers import available
from ..settings import force, left_out, tables
from ..settings.forced import thread
from ..spec import Plan, transformed
from . import registry
from .registry import BACKENDS, ROUTES, Request

UNMEASURED = "composed"
"""The route where no table says which is the faster one.

A conclusion of the cost model (`fastfilm.tuning.cost`), held by ``tests/kernels/test_cost.py``: by its figures a
training step is nowhere faster by the fused route, beyond what they are uncertain by.
"""

EAGER = Plan("reference", "eager")


def _check_names(name: str | None, route: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if route is not None and route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")


def backend(name: str | None, route: str | None = None) -> contextlib.AbstractContextManager[None]:
    """Forces one backend, and optionally one route, inside a ``with`` block (this thread only).

    Args:
        name: ``"reference"``, ``"triton"``, ``"cuda"``, ``"cpu"``, or None for the automatic choice.
        route: ``"fused"``, ``"composed"``, or None for the automatic choice.

    Raises:
        ValueError: an unknown name. A call inside the block that the forced combination cannot serve
            raises NotImplementedError saying what is unsupported.
    """
    _check_names(name, route)
    return force(name, route)


def state() -> tuple[Any, ...]:
    """Global state that affects the choice: forced backend and route, interpreter mode, kernels left out."""
    return thread.backend, thread.route, available.interpreting(), left_out.entries


def exporting() -> bool:
    """Whether an exporter records a call.

    The flag behind ``torch.compiler.is_exporting``, which is True in every ``torch.compile`` before PyTorch 2.13.
    """
    return torch.compiler._is_exporting_flag


def traced() -> bool:
    """Whether a call is recorded in PyTorch's own operators: by an exporter or a ``torch.func`` transform."""
    return exporting() or transformed()


_watchers: list[list[Request]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[Request]]:
    """The requests that are made inside the block."""
    seen: list[Request] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def choose(request: Request) -> Plan:
    """The plan for a request, from what is forced, available and supported.

    Raises:
        NotImplementedError: the forced backend or route cannot serve the request; says why.
    """
    for seen in _watchers:
        seen.append(request)
    if traced():
        name = thread.backend
        if name is None:
            return EAGER
        if name != "reference" and not exporting():
            raise NotImplementedError(
                f"backend {name!r} cannot serve a torch.func transform;"
                " use fastfilm.backend('reference'), or force none"
            )
    return _choose(request, *state())


def forget() -> None:
    """Every later choice is made anew: the tables of measured choices have changed."""
    _choose.cache_clear()


def for_pass(y: Tensor) -> Plan:
    """The plan for a pass over an existing map [N, C, *S]."""
    dims = y.dim() - 2
    one = (1,) * dims
    return choose(Request(y.device.type, y.dtype, dims, one, one, one))


def automatic(device: str) -> str:
    """The backend for tensors of a device, where none is forced or measured and it serves the call."""
    return "triton" if device == "cuda" else "cpu"


def why_not_plan(plan: Plan, request: Request) -> str | None:
    """The reason why a plan cannot serve ``request``; None if it can."""
    name, route = plan
    b = BACKENDS.get(name)
    if b is None:
        return f"there is no backend {name!r}"
    reason = registry.why_not_backend(b, request)
    if reason is not None or route == "composed":
        return reason
    return (
        registry.why_not_fused(b, request) if route == "fused" else f"there is no route {route!r}"
    )


def measured(request: Request, name: str | None) -> Plan | None:
    """The plan that was measured to be the fastest, if this request and the backend asked for allow it."""
    r = request
    irregular = len(set(r.kernel)) > 1 or len(set(r.stride)) > 1
    irregular |= r.transposed or r.groups != 1 or set(r.dilation) != {1}
    if r.device != "cuda" or irregular:
        return None
    entry = tables.measured(r.dtype, r.batch, r.channels, r.kernel, r.stride, r.output)
    if entry is None:
        return None
    plan = Plan.of(entry.plan)
    return None if name not in (None, plan.backend) or why_not_plan(plan, request) else plan


@functools.lru_cache(maxsize=4096)
def _choose(
    request: Request, name: str | None, route: str | None, interpreted: bool, without: Any
) -> Plan:
    plan = None if route is not None else measured(request, name)
    if plan is not None:
        return plan
    if name is None:
        # the interpreter is for tests: on CPU tensors it is used only where it is asked for by name
        name = automatic(request.device)
        if registry.why_not_backend(BACKENDS[name], request) is not None:
            name = "reference"
    b = BACKENDS[name]
    reason = registry.why_not_backend(b, request)
    if reason is not None:
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {reason}")
    if name == "reference":
        if route not in (None, "eager"):
            raise NotImplementedError(
                f"backend 'reference' has the route 'eager' only, got {route!r}"
            )
        return EAGER
    fused_reason = registry.why_not_fused(b, request)
    if route is None:
        route = UNMEASURED if fused_reason is None else "composed"
    elif route == "fused" and fused_reason is not None:
        raise NotImplementedError(
            f"route 'fused' of backend {name!r} cannot serve this call: {fused_reason}"
        )
    elif route == "eager":
        raise NotImplementedError(
            f"backend {name!r} has the routes 'fused' and 'composed', got 'eager'"
        )
    return Plan(name, route)
