"""The audit of a plan: all questions, a correction for their number, and the result as plain JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..data.plan import PlanFolder
from .findings import FEWEST, Finding, corrected, worst_first
from .images import intensity_features
from .prediction import PERMUTATIONS
from .questions import gap_questions, image_questions, label_questions, pair_questions
from .rows import Rows, read_rows
from .values import is_identifier, sites, value_findings
from .wording import judged


def audit(
    plan: PlanFolder,
    seed: int = 0,
    progress: Callable[[int], Callable[[], object]] = lambda n: lambda: None,
) -> dict[str, Any]:
    """Audits the metadata of a plan.

    Args:
        seed: seed of drawn cases, cross-validation, bootstrap and permutations.
        progress: called with the number of images, and then with that of the tests; its result is called after
            each.

    Returns:
        ``cases``, ``subjects``, ``findings`` (as ``Finding``, worst first) and ``notes``, as plain JSON.

    Raises:
        UserError: the plan has no metadata keys, or an image cannot be read any more.
    """
    rows = read_rows(plan, seed)
    findings = value_findings(rows, plan)
    if len(rows.cases) < FEWEST:
        rows.notes.append(
            f"{len(rows.cases)} subjects are too few to look for associations ({FEWEST} are needed): labels from"
            " metadata, metadata from images, confounding and gaps were not audited"
        )
    else:
        findings += _asked(rows, plan, seed, progress)
    inputs = {c.name for c in rows.columns if c.input} | {*rows.inputs}
    ranked = worst_first([judged(f, inputs) for f in corrected(findings)])
    return {
        "cases": len(plan.cases),
        "subjects": len(rows.cases),
        "findings": [asdict(f) for f in ranked],
        "notes": rows.notes,
    }


def _asked(
    rows: Rows,
    plan: PlanFolder,
    seed: int,
    progress: Callable[[int], Callable[[], object]],
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
    how = (seed, PERMUTATIONS)
    questions = [
        *label_questions(rows, how),
        *image_questions(rows, "intensity", intensities, how),
        *image_questions(rows, "geometry", rows.geometry, how),
        *pair_questions(rows, how),
        *gap_questions(rows, chosen_by, how),
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
