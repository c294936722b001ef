"""Compiles the probes if need be, runs them and prints a table: `python -m benchmarks.campaign.probes`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.campaign import probes
from benchmarks.campaign.bundle import write_json


def main() -> int:
    """Exit status 0 where the probes ran, 1 where they could not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign.probes", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after each probe")
    parser.add_argument("--executable", type=Path, help="program compiled beforehand")
    parser.add_argument("--folder", type=Path, help="where it is compiled, or was beforehand")
    parser.add_argument(
        "--self-test", action="store_true", help="only what needs no device: the expected results"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="limit of one probe")
    parser.add_argument("--total", type=float, default=120.0, help="limit of all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # what the host computes needs no device code, which sm_80 has none of
            arch = "80" if args.self_test else "90a"
            executable = args.executable or probes.compile(args.folder or Path(folder), arch)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        if args.self_test:
            return subprocess.run([str(executable.absolute()), "--self-test"]).returncode
        rows = []
        for row in probes.rows(executable.absolute(), args.seconds, args.total):
            rows.append(row)
            figure = "" if row["figure"] is None else f"{row['figure']:g} {row['unit']}"
            print(f"{row['probe']:24}{row['status']:9}{figure:16}{row['note']}", flush=True)
            if args.out:
                write_json(args.out, rows)
    # a row of the name `probes` says that the program did not even list its own
    return int(all(row["status"] == "SKIPPED" or row["probe"] == "probes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
