"""The commands of the segmentation system; nothing but the standard library is imported until one is called."""

from __future__ import annotations

import importlib
import io
import keyword
import os
import sys
from collections.abc import Sequence
from typing import Any

SUMMARIES = {
    "plan": "check a data set, decide preprocessing and patch size, write the splits",
    "audit": "look for shortcuts in a plan's metadata before any training",
    "train": "train one fold of a plan",
    "predict": "segment images with a trained model",
    "evaluate": "score predictions against the truth, compare runs",
    "report": "curves, tables, overlays and comparisons as one HTML file",
    "trial": "whether the metadata help: trained with and without them, and compared",
    "inspect": "γ and β of each layer and metadata value",
    "export": "write a model as ONNX",
    "import": "make a model folder of ivadomed weights",
    "demo": "all of it on phantoms, in about three minutes",
}
"""Command -> one line of help. Each is the function ``command`` of ``fastfilm.segmentation.commands.NAME``."""

INTERRUPTED = 130
INSTALL = 'pip install "fastfilm[segmentation]"'


class _Pipe(io.FileIO):
    """A standard stream whose reader may leave (``fastfilm info | head -1``): what follows goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Lets commands go on, and end with their own status, when the reader of their output has left."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.flush()
        made = io.TextIOWrapper(
            io.BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, made)


def run(name: str, argv: Sequence[str]) -> int:
    """Runs one command; the exit status.

    0: done. 1: an error that the user can mend (one readable message on stderr), or the extra is not installed.
    2: a wrong command line. 130: interrupted (143: by SIGTERM).
    """
    from fastfilm.segmentation.support.stopping import Stopped

    try:
        status = _run(name, argv)
    except Stopped as stopped:
        print(f"\nfastfilm {name}: {stopped.text or 'interrupted'}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status == INTERRUPTED:
        print(f"\nfastfilm {name}: interrupted", file=sys.stderr)
    return status


def _run(name: str, argv: Sequence[str]) -> int:
    try:
        file = f"{name}_" if keyword.iskeyword(name) else name
        module = importlib.import_module(f"fastfilm.segmentation.commands.{file}")
        import typer
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fastfilm":
            raise
        print(f"fastfilm {name} needs {error.name}: {INSTALL}", file=sys.stderr)
        return 1
    from fastfilm.segmentation.support.errors import UserError

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(module.command)
    command = typer.main.get_command(app)
    try:
        status = command.main(list(argv), prog_name=f"fastfilm {name}", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except UserError as error:
        print(f"fastfilm {name}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # a wrong command line; the classes are click's, or those of typer's own copy of it
        if type(error).__name__ == "Abort":
            return INTERRUPTED
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        raise
