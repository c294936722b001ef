"""What ``--device`` says, as a device that is there."""

from __future__ import annotations

import torch

from .errors import UserError

TYPES = ("cpu", "cuda", "mps", "xpu")


def choose(name: str | None = None, *, local: int = 0, world: int = 1) -> torch.device:
    """The device to compute on.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``xpu``; None or ``auto``: a GPU of CUDA if there is one,
            else the CPU.
        local: number of this process among those of the machine; without a number of its own, each takes a GPU.
        world: number of processes.

    Raises:
        UserError: no such device here, or fewer than processes.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    assert name is not None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in TYPES:
        hint = "; did you mean cuda?" if name.lower().startswith("gpu") else ""
        raise UserError(
            f"--device must be auto, {', '.join(TYPES)}, or one with a number such as cuda:1, got {name!r}{hint}"
        )
    if device.type == "cuda":
        return _cuda(device, local, world)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or "not available"
        raise UserError(f"--device {name}: not there: {reason}") from error
    return device


def _cuda(device: torch.device, local: int, world: int) -> torch.device:
    if not torch.cuda.is_available():
        why = (
            f"PyTorch {torch.__version__} was built without CUDA"
            if torch.version.cuda is None
            else "PyTorch finds no GPU (nvidia-smi lists those that the driver sees)"
        )
        raise UserError(f"--device {device}: {why}; --device cpu computes without one")
    count = torch.cuda.device_count()
    if device.index is not None and world > 1:
        raise UserError(
            f"--device {device} is one GPU for {world} processes: --device cuda gives each one"
        )
    index = local if device.index is None else device.index
    if index >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count))
        raise UserError(f"--device cuda:{index}: there is no such GPU; there are {there}")
    try:
        torch.zeros(1, device=f"cuda:{index}")
    except RuntimeError as error:
        raise UserError(f"--device cuda:{index}: {str(error).splitlines()[0]}") from error
    return torch.device("cuda", index)
