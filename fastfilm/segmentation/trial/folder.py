"""The folder of a trial: its plan and its design are made once, and compared whenever the trial goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.schema import Config, decisive
from ..data.checks import check_case
from ..data.plan import (
    PlanFolder,
    make_plan,
    read_plan,
)
from ..support.errors import Problems, UserError
from ..support.files import read_json
from . import nnunet_data
from .design import check_config, check_plan, differences, fix_design

PLAN = "plan"


def open_trial(
    config: Config,
    out: Path,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
) -> tuple[PlanFolder, dict[str, Any], list[str]]:
    """The plan and the design of the trial in ``out``, made if they are not there.

    Args:
        progress: gets the number of cases; what it returns is called after each.

    Returns:
        the plan, with those settings of ``config`` that change no result; design.json; notes of the plan.

    Raises:
        Problems: a configuration or data set that no trial can be made of.
        UserError: the trial there is of another design, or of files that have changed since.
    """
    check_config(config)
    for name in ("plan.json", "model.json"):
        if os.path.exists(out / name):
            raise UserError(f"{out}: holds {name}: choose another folder for the trial")
    notes: list[str] = []
    if (out / PLAN / "plan.json").is_file():
        plan = read_plan(out / PLAN)
        found = differences(decisive(plan.config), decisive(config))
        if found:
            raise UserError(
                f"{out}: holds a trial of another configuration; a changed design is a new trial, in a folder of"
                f" its own; what differs: {'; '.join(found[:5])}"
            )
        plan.config = config
        _check_files(plan)
    else:
        plan, notes = make_plan(config, out / PLAN, progress)
    check_plan(plan)
    if nnunet_data.asked(config):
        # finds labels that overlap, before anything is trained
        nnunet_data.write_data_set(plan, out, progress)
    return plan, fix_design(out, plan), notes


def _check_files(plan: PlanFolder) -> None:
    """Refuses to go on with files that are not those of the design.

    Files with another size or time are read again: a copy of the data set is as good as the original.
    """
    facts = {c["id"]: c for c in read_json(plan.path / "fingerprint.json")["cases"]}
    wrong = []
    for case in plan.cases:
        if case.stamped().stamps == case.stamps:
            continue
        found, problems = check_case(case, plan.config.data)[:2]
        if problems or found.to_json() != facts[case.id]:
            wrong.append(f"{case.id}: {'; '.join(problems) or 'another image or label'}")
    if wrong:
        raise Problems("files have changed since the design was fixed", wrong)
