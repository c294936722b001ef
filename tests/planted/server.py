"""Runs pytest in forks of one process that has imported what takes long, though nothing of the package.

Reads lines of JSON, arguments of pytest and a file for its output; writes a line with the fork's process and, when
it has ended, a line with its exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys

# first the environment that PyTorch and Triton read when they are imported
for name in ("tests.conftest", "torch.distributed", "torch.fx", "hypothesis.extra.numpy"):
    importlib.import_module(name)
with contextlib.suppress(ImportError):  # its tests skip
    importlib.import_module("triton.language")

import pytest  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402

# a failure is enough, its smallest example would take minutes
settings.register_profile("planted", phases=(Phase.explicit, Phase.generate))
settings.load_profile("planted")

for line in sys.stdin:
    arguments, log = json.loads(line)
    fork = os.fork()
    if fork == 0:
        os.setsid()
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(int(code))
    print(fork, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
