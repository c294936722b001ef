"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; none: what is there")]
Threads = Annotated[
    int | None, typer.Option(help="of the CPU; none: OMP_NUM_THREADS, or one a core")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the configuration, e.g. training.epochs=20"),
]
