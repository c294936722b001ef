"""Level, sentence and advice of a tested finding."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .findings import Finding, Level, is_inseparable, is_leak, is_real


def judged(finding: Finding, inputs: Collection[str]) -> Finding:
    """The finding with level, text and advice; one without a test is returned unchanged.

    Args:
        inputs: names of columns that condition the network.
    """
    if finding.p is None:
        return finding
    level, advice = _JUDGES[finding.kind](finding, inputs)
    return replace(finding, level=level, advice=advice, text=_text(finding))


def _text(f: Finding) -> str:
    left, arrow, right = f.about.partition(" -> ")
    if f.kind == "label":
        begin = f"{_named(left)} {'predict' if left.startswith('all ') else 'predicts'} the {right}"
    elif arrow:
        begin = f"{left.capitalize()} of the images alone predicts {right}"
    else:
        left, _, right = f.about.partition(" - ")
        begin = f"{left} and {right} go together"
    bounds = "" if f.low is None or f.high is None else f" [{f.low:.2f}, {f.high:.2f}]"
    return f"{begin}: {f.measure} {f.value:.2f}{bounds} in {f.n} subjects; {f.chance:.2f} is chance, {_p(f)}."


def _named(source: str) -> str:
    return source if source.startswith("all ") else f"{source} alone"


def _p(f: Finding) -> str:
    assert f.p is not None and f.p_corrected is not None
    return f"p {_short(f.p)}, corrected {_short(f.p_corrected)}"


def _short(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


NOTHING = "Nothing to do: no more than chance."


def _label(f: Finding, inputs: Collection[str]) -> tuple[Level, str]:
    source = f.about.partition(" -> ")[0]
    if is_real(f) and source not in inputs and not source.startswith("all "):
        codes = (
            " and codes the label: leave it so" if is_leak(f) else ": look at results by its values"
        )
        return "look", f"The network does not get it{codes}."
    if is_leak(f):
        return "warning", (
            "It codes the label: find out whether it was measured on the label, and leave it out if it is not"
            " known before segmentation."
        )
    if is_real(f):
        return "look", (
            "A true association is what conditioning can use; make sure that the value is known before"
            " segmentation."
        )
    return "fine", NOTHING


def _image(f: Finding, inputs: Collection[str]) -> tuple[Level, str]:
    name = f.about.partition(" -> ")[2]
    if not is_real(f):
        return "fine", NOTHING
    if name in inputs:
        return "look", (
            "The network may know it from the image anyway: expect little gain, and errors where a wrong value is"
            " given."
        )
    return "look", (
        "The network can tell it from the image although it is not given: hold values out (splits.leave_out) to"
        " see the effect."
    )


def _pair(f: Finding, inputs: Collection[str]) -> tuple[Level, str]:
    a, _, b = f.about.partition(" - ")
    if not is_real(f):
        return "fine", NOTHING
    if not is_inseparable(f):
        return (
            "look",
            "Read results within the values of each of them (fastfilm evaluate groups by metadata).",
        )
    if (a in inputs) == (b in inputs):
        return "look", "One of them says nearly all that the other does: one is enough."
    given, other = (a, b) if a in inputs else (b, a)
    return "warning", (
        f"What the network learns of {given} may be {other}: no test on these data can tell them apart."
    )


def _annotation(f: Finding, inputs: Collection[str]) -> tuple[Level, str]:
    if not is_real(f):
        return "fine", NOTHING
    return "look", "The label is learned from some values only; its results hold for those."


def _fold(f: Finding, inputs: Collection[str]) -> tuple[Level, str]:
    if not is_real(f):
        return "fine", NOTHING
    return "look", "Folds differ in it: splits.stratify spreads its values evenly."


def _missing(f: Finding, inputs: Collection[str]) -> tuple[Level, str]:
    key = f.about.partition(" missing - ")[0]
    if not is_real(f):
        return "fine", NOTHING
    level: Level = "warning" if key in inputs and abs(f.value) >= 0.5 else "look"
    return level, (
        "That a value is missing tells of the label: 'unknown' is then a hint to the network, not the absence of"
        " one."
    )


_JUDGES = {
    "label": _label,
    "intensity": _image,
    "geometry": _image,
    "confounding": _pair,
    "annotation": _annotation,
    "fold": _fold,
    "missing": _missing,
}
