"""What a backend must have: a module with the launchers of the interface, and its place in the registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from fastfilm.ops import choice, launchers
from fastfilm.ops.launchers import interface

AVAILABLE = [b for b in choice.BACKENDS.values() if b.unavailable() is None]


def functions(protocol: type) -> dict[str, Callable[..., Any]]:
    """The functions of a protocol without those of the protocols that it extends."""
    return {k: v for k, v in vars(protocol).items() if callable(v) and not k.startswith("_")}


def demanded(backend: choice.Backend) -> dict[str, Callable[..., Any]]:
    """The launchers that a backend must have, by its flags and by what the registry says of it."""
    kernels = launchers.of(backend.name)
    found = functions(interface.Kernels)
    if kernels.convolves:
        found |= functions(interface.ConvolvingKernels)
    if backend.fused is not None:
        found |= functions(interface.FusedKernels)
        if not kernels.reads_sources:
            del found["gradients"], found["covers_behind"]
    return found


def test_the_registry_and_the_modules_are_of_the_same_backends() -> None:
    assert set(choice.BACKENDS) == set(launchers.MODULES)


@pytest.mark.parametrize("backend", AVAILABLE, ids=lambda b: b.name)
def test_a_backend_has_every_launcher_with_the_arguments_of_the_interface(
    backend: choice.Backend,
) -> None:
    kernels = launchers.of(backend.name)
    assert isinstance(kernels.reads_sources, bool) and isinstance(kernels.convolves, bool)
    for name, function in demanded(backend).items():
        launcher = getattr(kernels, name, None)
        assert launcher is not None, f"backend {backend.name!r} has no {name}"
        wanted = [p for p in inspect.signature(function).parameters if p != "self"]
        try:
            given = inspect.signature(launcher).parameters
        except ValueError:
            continue  # of a compiled extension, which does not tell
        if any(p.kind is p.VAR_POSITIONAL for p in given.values()):
            continue  # a guard around a launcher
        assert list(given)[: len(wanted)] == wanted, f"{name} of backend {backend.name!r}"
