"""The command line: ``python -m fastfilm COMMAND``, or ``fastfilm COMMAND`` once installed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import __version__
from .machine import Table, build, devices, section, versions
from .segmentation.commands import cli


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, one line of help, what it does (returns a status), its arguments."""

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def info(_: argparse.Namespace) -> int:
    """Prints versions, devices, what was built, each backend or why it is unavailable, environment variables."""
    sections: list[tuple[str, Table]] = [
        ("versions", versions()),
        ("devices", devices()),
        ("build", build()),
        ("backends", _backends()),
        ("environment", _environment()),
    ]
    width = max(len(name) for _, rows in sections for name, _ in rows)
    print("\n\n".join(section(title, rows, width) for title, rows in sections))
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Runs every backend on this machine against the float64 reference; 1 if one is wrong."""
    from .check import report

    return report(quick=arguments.quick)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few cases only")


def tune(arguments: argparse.Namespace) -> int:
    """Measures what is fastest for a network's convolutions on this machine's GPU; 1 without one."""
    from .tune import run

    return run(arguments)


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    from .tuning.arguments import add

    add(parser)


COMMANDS = (
    Command("info", "versions, devices, and each backend or why it is unavailable", info),
    Command("check", "every backend on this machine against float64", check, _check_arguments),
    Command("tune", "the fastest tiles for a network on this machine's GPU", tune, _tune_arguments),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status (2 for a wrong command line, with the usage on stderr)."""
    if argv is None:
        argv = sys.argv[1:]
        cli.outlive_readers()
    parser = argparse.ArgumentParser(
        prog="fastfilm",
        description="Fused convolution, normalisation, activation and FiLM.",
    )
    parser.add_argument("--version", action="version", version=f"fastfilm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary.capitalize() + "."
        )
        if argv and argv[0] == command.name:  # those of others may cost an import of torch
            command.arguments(sub)
        sub.set_defaults(run=command.run)
    for name, summary in cli.SUMMARIES.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    if argv and argv[0] in cli.SUMMARIES:
        return cli.run(argv[0], argv[1:])
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    status: int = arguments.run(arguments)
    return status


def _backends() -> Table:
    from fastfilm.ops.choice import describe
    from fastfilm.ops.settings import left_out
    from fastfilm.ops.settings.tables import describe as choices

    rows: Table = []
    for name, reason, covers in describe():
        rows.append((name, "available" if reason is None else f"unavailable: {reason}"))
        rows.append(("", covers))
    if left_out.entries:
        rows.append(("left out", left_out.said()))
    return [*rows, *choices()]


def _environment() -> Table:
    from fastfilm.ops.settings.environment import VARIABLES

    return [(v.name, os.environ.get(v.name) or f"not set ({v.meaning})") for v in VARIABLES]


if __name__ == "__main__":
    sys.exit(main())
