"""The command line: ``python -m fastfilm COMMAND``, or ``fastfilm COMMAND`` once installed."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Table = list[tuple[str, str]]


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, one line of help, what it does (returns a status), its arguments."""

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def info(_: argparse.Namespace) -> int:
    """Prints versions, devices, each backend or why it is unavailable, environment variables."""
    sections: list[tuple[str, Table]] = [
        ("versions", _versions()),
        ("devices", _devices()),
        ("backends", _backends()),
        ("environment", _environment()),
    ]
    width = max(len(name) for _, rows in sections for name, _ in rows)
    print("\n\n".join(_section(title, rows, width) for title, rows in sections))
    return 0


COMMANDS = (Command("info", "versions, devices, and each backend or why it is unavailable", info),)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status (2 for a wrong command line, with the usage on stderr)."""
    parser = argparse.ArgumentParser(
        prog="fastfilm",
        description="Fused convolution, normalisation, activation and FiLM.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary.capitalize() + "."
        )
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    status: int = arguments.run(arguments)
    return status


def _section(title: str, rows: Iterable[tuple[str, str]], width: int) -> str:
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _versions() -> Table:
    import numpy
    import torch

    import fastfilm

    return [
        ("fastfilm", fastfilm.__version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", torch.__version__),
        ("triton", _installed("triton")),
        ("numpy", numpy.__version__),
    ]


def _installed(package: str) -> str:
    """Version of a package, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> Table:
    import torch

    rows = [("CPU threads", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "torch is built without CUDA" if built is None else "torch finds no CUDA device"
        return [*rows, ("CUDA device", f"none ({reason})"), ("driver", "none"), ("cuDNN", "none")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = p.total_memory / 2**30
        rows.append((f"CUDA device {i}", f"{p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB"))
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return [
        *rows,
        ("driver", _driver() or "unknown"),
        ("CUDA runtime", torch.version.cuda or "none"),
        ("cuDNN", "none" if cudnn is None else str(cudnn)),
    ]


def _driver() -> str | None:
    """Version of the NVIDIA driver, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _backends() -> Table:
    from fastfilm.ops.backends import describe

    rows: Table = []
    for name, reason, covers in describe():
        rows.append((name, "available" if reason is None else f"unavailable: {reason}"))
        rows.append(("", covers))
    return rows


def _environment() -> Table:
    from fastfilm.ops.environment import VARIABLES

    return [(v.name, os.environ.get(v.name) or f"not set ({v.meaning})") for v in VARIABLES]


if __name__ == "__main__":
    sys.exit(main())
