"""Backends that can run on this machine, and the reason where one cannot: not installed, not built, wrong GPU."""

from __future__ import annotations

import functools
import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from ..settings import environment
from ..spec import constant_when_compiled


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (on CPU tensors)."""
    return environment.read("TRITON_INTERPRET") == "1"


def _is_built(name: str) -> bool:
    """Whether an extension module lies beside its launchers."""
    folder = Path(__file__).parent
    return any((folder / f"{name}{end}").exists() for end in EXTENSION_SUFFIXES)


# searched once: a compiler that traces the choice of a backend cannot trace a search of modules
_FOUND = {
    "triton": importlib.util.find_spec("triton") is not None,
    "cpu": _is_built("cpu/_C"),
    "cuda": _is_built("cuda/_CUDA"),
}


def triton() -> str | None:
    """The reason why Triton's kernels cannot run here; None if they can."""
    if not _FOUND["triton"]:
        return "the package triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device (set TRITON_INTERPRET=1 to run the kernels on CPU tensors, slowly)"


def cpu() -> str | None:
    """The reason why the C++ kernels cannot run here; None if they can."""
    if not _FOUND["cpu"]:
        return "the C++ extension was not built (needs a C++17 compiler at install time)"
    return None


@functools.cache
@constant_when_compiled
def cuda() -> str | None:
    """The reason why the CUDA kernels cannot run here; None if they can."""
    if not _FOUND["cuda"]:
        return "the CUDA kernels were not built (needs nvcc at install time; `fastfilm info` tells why)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    from .cuda import _CUDA

    major, minor = torch.cuda.get_device_capability()
    return why_not_architecture(_CUDA.architectures, 10 * major + minor)


def why_not_architecture(built: str, capability: int) -> str | None:
    """The reason why kernels for ``built`` ("80;90a") do not run on a GPU of a compute capability (90)."""
    if capability < 80:
        return f"needs a GPU from sm_80 on, this one is sm_{capability}"
    for target in built.split(";"):
        number = int(target.rstrip("af"))
        # machine code serves its own major version, PTX all later ones; a target with a letter serves itself
        if number == capability or (target.isdigit() and number < capability):
            return None
    names = ", ".join(f"sm_{t}" for t in built.split(";"))
    return (
        f"built for {names}, this GPU is sm_{capability}: rebuild with"
        f" FASTFILM_CUDA=1 FASTFILM_CUDA_ARCHS={capability} pip install --force-reinstall --no-deps ."
    )
