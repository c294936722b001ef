"""Benchmarks of fastfilm and its peers: ``python benchmarks/run.py --help``."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

STARTED = time.monotonic()


def load_package() -> None:
    """Makes this folder importable as ``benchmarks``, the checkout staying off ``sys.path``."""
    if "benchmarks" in sys.modules:
        return
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "benchmarks", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


# here and not in main: the static suite's worker processes import this file and need the package too
load_package()


def main(argv: list[str] | None = None) -> int:
    """Runs the suites asked for and returns the exit status."""
    # before torch is imported: on a busy machine threads that spin at a barrier slow a call tenfold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # the profiler, which counts memory, tells when it starts and ends
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from benchmarks import cli

    return cli.main(argv, STARTED)


if __name__ == "__main__":
    sys.exit(main())
