"""Who is measured: fastfilm's backends, torch.compile, and the reasons why one is left out."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

import fastfilm

from .harness import TookTooLong, time_limit

CANDIDATES = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


def channels_last(t: Tensor) -> Tensor:
    """``t`` [N, C, *S] in channels-last strides."""
    layout = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return t.contiguous(memory_format=layout)


def backends(device: str) -> tuple[list[str], list[tuple[str, str]]]:
    """fastfilm's backends that serve this device, and (name, reason) of those that do not.

    The reference backend is eager PyTorch again: it stands in only where nothing else is available.
    """
    usable: list[str] = []
    missing: list[tuple[str, str]] = []
    image = torch.zeros(1, 2, 4, 4, device=device)
    weight = torch.zeros(2, 2, 3, 3, device=device)
    for name in CANDIDATES[device]:
        if name == "reference" and usable:
            continue
        try:
            with fastfilm.backend(name):
                fastfilm.conv_norm_film(image, weight, padding=1)
            usable.append(name)
        except (ValueError, NotImplementedError, ImportError) as error:
            missing.append((name, one_line(error)))
    return usable, missing


def one_line(error: BaseException) -> str:
    """First line of an error's text, at most 120 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]


def why_not_compile(device: str, quick: bool) -> str | None:
    """Why torch.compile is left out; None if it can be tried."""
    if quick:
        return "quick runs leave it out, because compiling takes longer than the run"
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler for torch.compile on a CPU"
    return None


def compile_modes(device: str) -> dict[str, str | None]:
    """Provider name -> mode of torch.compile."""
    modes: dict[str, str | None] = {"compile": None}
    if device == "cuda":
        modes["compile-max-autotune"] = "max-autotune-no-cudagraphs"
    return modes


def compiled(
    function: Callable[..., object], mode: str | None, first: Callable[..., object], seconds: float
) -> tuple[Callable[..., object] | None, str]:
    """``function`` compiled and run once by ``first(compiled)``, or None and the reason."""
    torch._dynamo.reset()
    try:
        with time_limit(seconds, "compiling"):
            result = torch.compile(function, mode=mode, dynamic=False)
            first(result)
        return result, ""
    except TookTooLong as error:
        return None, one_line(error)
    except Exception as error:  # whatever the compiler raises is a reason, not an end of the run
        if "TookTooLong" in repr(error):
            return None, f"compiling took longer than {seconds:.0f} s"
        return None, f"torch.compile failed: {one_line(error)}"


def amp(device: str, dtype: str) -> AbstractContextManager[object]:
    """Autocast to a 16-bit dtype; nothing for float32."""
    if dtype not in ("bfloat16", "float16"):
        return contextlib.nullcontext()
    return torch.autocast(device, getattr(torch, dtype))
