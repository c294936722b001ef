"""The audit of a plan: all questions, one correction over them, plain JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.plan import PlanFolder
from .findings import FEWEST, Finding, corrected, worst_first
from .images import intensity_features
from .prediction import PERMUTATIONS
from .questions import (
    gap_questions,
    image_questions,
    label_questions,
    pair_questions,
)
from .rows import Rows, read_rows
from .values import is_identifier, sites, value_findings
from .wording import judged


def audit(
    plan: PlanFolder,
    seed: int = 0,
    progress: Callable[[int], Callable[[], object]] = lambda n: lambda: None,
    permutations: int = PERMUTATIONS,
) -> dict[str, Any]:
    """What the metadata of a plan give away.

    Args:
        seed: of drawn cases, cross-validation, bootstrap and permutations.
        progress: gets a number of steps, of the images and then of the tests; what it returns is called after
            each.
        permutations: at most, for each test.

    Returns:
        ``cases``, ``subjects``, ``findings`` (those of ``Finding``, worst first) and ``notes``; plain JSON.

    Raises:
        UserError: no metadata keys, an image that cannot be read any more.
    """
    rows = read_rows(plan, seed)
    findings = value_findings(rows, plan)
    if len(rows.cases) < FEWEST:
        rows.notes.append(
            f"{len(rows.cases)} subjects are too few to look for associations ({FEWEST} are needed): labels from"
            " metadata, metadata from images, confounding and gaps were not audited"
        )
    else:
        findings += _asked(rows, plan, seed, progress, permutations)
    inputs = {c.name for c in rows.columns if c.input} | {*rows.inputs}
    ranked = worst_first([judged(f, inputs) for f in corrected(findings)])
    return {
        "cases": len(plan.cases),
        "subjects": len(rows.cases),
        "findings": [f.to_json() for f in ranked],
        "notes": rows.notes,
    }


def _asked(
    rows: Rows,
    plan: PlanFolder,
    seed: int,
    progress: Callable[[int], Callable[[], object]],
    permutations: int,
) -> list[Finding]:
    for column in rows.columns:
        if is_identifier(column):
            rows.notes.append(
                f"{column.name}: nearly every subject has a value of its own; not compared with other keys"
            )
    done = progress(len(rows.cases))
    intensities = intensity_features(rows.cases, plan.plan.preprocessing, done)
    splits = plan.config.splits
    chosen_by = {k for k in (splits.leave_out, splits.group) if k is not None} | {*splits.stratify}
    how = (seed, permutations)
    questions = [
        *label_questions(rows, *how),
        *image_questions(rows, "intensity", intensities, *how),
        *image_questions(rows, "geometry", rows.geometry, *how),
        *pair_questions(rows, *how),
        *gap_questions(rows, chosen_by, *how),
    ]
    done = progress(len(questions))
    findings = []
    for question in questions:
        findings.append(question.ask())
        done()
    rows.notes.append(
        f"{len(findings)} associations were looked at; p is corrected over all of them (Holm)"
    )
    if places := sites(plan):
        rows.notes.append(
            f"not given to the network, or where subjects come from: {', '.join(places)}"
        )
    return findings
