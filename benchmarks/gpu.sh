#!/usr/bin/env bash
# Builds, checks, measures and reports on a machine with a GPU, within a time: bash benchmarks/gpu.sh --out DIR --minutes 9
# Without a GPU: --dry runs the same on small maps, --prepare compiles for a GPU machine beforehand. See --help.
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.campaign "$@"
