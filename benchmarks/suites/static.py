"""The suite ``static``: registers, spills, shared memory and matrix instructions of every shipped kernel."""

from __future__ import annotations

from ..counted.machine_code.triton_binaries import run_static
from ..measure.record import Row
from ..measure.session import Session


def run(session: Session, quick: bool | None = None) -> None:
    """Builds the kernels and adds a row each; a kernel that fails its check fails the run.

    Args:
        quick: the heaviest variant of each kernel for sm_90 alone; None: as the session is.
    """
    session.say("static: building the shipped kernel configurations")
    rows, passed = run_static(session.quick if quick is None else quick)
    fields = set(Row.__dataclass_fields__) - {"extra"}
    for values in rows:
        known = {k: v for k, v in values.items() if k in fields}
        for name in ("suite", "case", "provider", "mode", "dtype", "device"):
            known.setdefault(name, "static" if name == "suite" else "")
        extra = {k: v for k, v in values.items() if k not in fields}
        session.record.add(Row(**known, extra=extra))
    session.record.failed |= not passed
