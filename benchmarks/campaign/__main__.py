"""``bash benchmarks/gpu.sh``: the campaign's command line."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from . import prepare, runner
from .steps import Step, steps

NEEDED = ("numpy", "setuptools", "pybind11", "pytest", "hypothesis")
"""Modules, and packages of the same name, beside torch and triton."""


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a step FAILED; 2: wrong arguments."""
    p = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Builds, checks, measures and reports on a GPU within a time. After every step DIR holds"
        " bundle.tar.gz, results.json, report.md and at most two pictures.",
    )  # fmt: skip
    p.add_argument("--dry", action="store_true", help="the same on a CPU, emulated, on tiny maps")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("fastfilm-campaign"))
    p.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    p.add_argument("--from", dest="bundle", metavar="BUNDLE", type=Path, help="go on from a bundle")
    p.add_argument("--only", metavar="STEP,…", default="", help="these steps, done before or not")
    p.add_argument("--list", action="store_true", help="print the steps with their bounds")
    p.add_argument(
        "--prepare", action="store_true",
        help="compile for a GPU machine: CUDA objects, probes, Triton's kernels; needs nvcc and no GPU",
    )  # fmt: skip
    p.add_argument("--arch", default="90a", help="target of --prepare (default: 90a)")
    args = p.parse_args(argv)
    if args.prepare:
        return prepare.main(args.arch)
    if not args.minutes > 0:
        p.error(f"--minutes must be positive, got {args.minutes:g}")
    device = "cpu" if args.dry else "cuda"
    arch = "" if args.dry or args.list else architecture()
    if arch is None:
        p.error("nvidia-smi names no GPU here; --dry runs the same on a CPU")
    wanted = [*requirements(), *steps(device)]
    if args.list:
        for step in wanted:
            print(f"{step.name:<20} {step.seconds:4.0f} s  {step.why}")
        return 0
    only = [name for name in args.only.split(",") if name]
    try:
        return runner.run(
            args.out, device, 60 * args.minutes, wanted, args.bundle, only, {"arch": arch}
        )
    except (ValueError, OSError) as error:
        p.error(str(error))


def architecture() -> str | None:
    """Target of the CUDA kernels for the first GPU: "90a", "80"; None without one."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
        number = done.stdout.split()[0].replace(".", "")
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return {"90": "90a"}.get(number, number) if number.isdigit() else None


def requirements() -> list[Step]:
    """A step that brings what is not installed into the campaign's own folder; none where all is there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    command = f"{{python}} -m pip install --quiet --no-compile --target {{work}}/libraries {' '.join(missing)}"
    why = f"{', '.join(missing)}, which are not installed"
    return [Step("requirements", why, command, 60, after=(), setup=True)]


if __name__ == "__main__":
    os.environ.pop("FASTFILM_BACKEND", None)  # a forced backend would be in every row
    os.environ.pop("FASTFILM_ROUTE", None)
    # where toolkits are installed, on the path or not
    places = (Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*")))
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    sys.exit(main())
