"""What a training leaves behind to be looked at: log.jsonl, TensorBoard, and lines on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..support.errors import UserError
from ..support.files import write_text

LOG = "log.jsonl"


class Record:
    """Log of one training, one line an epoch.

    Args:
        folder: the model folder.
        step: training goes on behind this step: what an interrupted run wrote after it is dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / LOG
        kept = [line for line in read_log(folder) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        try:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error

    def epoch(self, values: dict[str, Any]) -> None:
        """Adds a line; numbers go to TensorBoard too, nested ones as ``outer/inner``."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        for name, value in values.items():
            inner = value if isinstance(value, dict) else {"": value}
            for key, x in inner.items():
                if isinstance(x, int | float) and name not in ("step", "epoch"):
                    tag = f"{name}/{key}".strip("/")
                    self.board.add_scalar(tag, x, values["step"])

    def close(self) -> None:
        """Writes what is pending."""
        self.board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, up to one that was cut off by a kill or is damaged."""
    path = folder / LOG
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not isinstance(value, dict) or not isinstance(value.get("step"), int):
                break
            lines.append(value)
    return lines
