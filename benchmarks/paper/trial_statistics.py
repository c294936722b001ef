"""How often the interval of a trial covers, and how often its tests reject, in simulated trials.

    python -m benchmarks.paper.trial_statistics docs/results/trial-statistics.json

D[c, s] = effect + site + subject + run[fold, s] + rest[c, s] (+ fold, as of networks of other training subjects,
which no method sees), with standard deviations as of Dice differences. 1000 trials a setting: a share of 5 % has a
standard error of 0.7 points. About ten minutes on one core; the same numbers on every machine with the same NumPy.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from fastfilm.segmentation.support.files import write_json
from fastfilm.segmentation.trial.statistics import Difference, difference

TRIALS = 1000
ALPHA = 0.05


@dataclass(frozen=True)
class Setting:
    """One kind of trial; spreads are standard deviations of Dice.

    Attributes:
        skewed: subjects' effects are lognormal (of a normal variable with deviation 1), not normal.
        cases: of each subject.
        sites: clusters, subjects dealt out at random; 0: none.
    """

    name: str
    folds: int
    seeds: int
    subjects: int
    effect: float = 0.0
    subject: float = 0.0
    run: float = 0.0
    rest: float = 0.0
    fold: float = 0.0
    skewed: bool = False
    cases: int = 1
    sites: int = 0
    site: float = 0.0


def settings() -> list[Setting]:
    """All kinds of trials of the table."""
    sizes = list(itertools.product((3, 5), (20, 50, 100)))
    noise: dict[str, dict[str, Any]] = {
        "runs": {"run": 0.01},
        "subjects": {"subject": 0.03},
        "runs and subjects": {"run": 0.01, "subject": 0.03},
        "runs, subjects, rest": {"run": 0.01, "subject": 0.03, "rest": 0.03},
        "runs, skewed subjects, rest": {
            "run": 0.005, "subject": 0.03, "rest": 0.03, "skewed": True,
        },
    }  # fmt: skip
    found = [
        Setting(name, folds, 3, n, **kinds) for name, kinds in noise.items() for folds, n in sizes
    ]
    usual: dict[str, Any] = noise["runs, subjects, rest"]
    found += [Setting("an effect of 0.02", f, 3, n, effect=0.02, **usual) for f, n in sizes]
    found += [
        Setting("two cases a subject", 5, 3, 50, cases=2, **usual),
        Setting("five seeds", 5, 5, 50, **usual),
        Setting("one seed", 5, 1, 50, **usual),
        Setting("8 sites", 5, 3, 60, sites=8, site=0.02, **usual),
        Setting("4 sites", 5, 3, 60, sites=4, site=0.02, **usual),
        Setting("training sets", 5, 3, 50, fold=0.01, **usual),
    ]
    return found


def draw(setting: Setting, rng: np.random.Generator) -> Difference:
    """One trial."""
    s = setting
    subject = np.repeat(np.arange(s.subjects), s.cases)
    fold = subject % s.folds
    if s.skewed:
        x = rng.lognormal(size=s.subjects)
        own = (x - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    else:
        own = rng.standard_normal(s.subjects)
    effects: NDArray[np.float64] = s.subject * own
    site = rng.integers(s.sites, size=s.subjects) if s.sites else None
    if site is not None:
        effects = effects + s.site * rng.standard_normal(s.sites)[site]
    runs = s.run * rng.standard_normal((s.folds, s.seeds))
    runs = runs + s.fold * rng.standard_normal((s.folds, 1))
    rest = s.rest * rng.standard_normal((len(subject), s.seeds))
    values = s.effect + effects[subject, None] + runs[fold] + rest
    names = [f"{i:03}" for i in subject]
    clusters = None if site is None else [str(site[i]) for i in subject]
    return difference(values, fold.tolist(), names, clusters, int(rng.integers(2**31)))


def summary(setting: Setting, trials: int = TRIALS) -> dict[str, Any]:
    """Shares of the trials, in percent, and the standard error that is true beside the mean one that was found."""
    rng = np.random.default_rng(0)
    found = [draw(setting, rng) for _ in range(trials)]
    truth = setting.effect

    def covers(low: str, high: str) -> float:
        return share([getattr(f, low) <= truth <= getattr(f, high) for f in found])

    def share(true: list[bool]) -> float:
        return round(100 * float(np.mean(true)), 1)

    squares = np.mean([f.standard_error**2 for f in found if f.standard_error is not None])
    return {
        **asdict(setting),
        "covered": {"t": covers("low", "high"), "bootstrap": covers("bootstrap_low", "bootstrap_high")},
        "rejected": {
            "p": share([f.p is not None and f.p < ALPHA for f in found]),
            "t": share([f.p_t is not None and f.p_t < ALPHA for f in found]),
            "runs": share([f.p_runs < ALPHA for f in found]),
            "units": share([f.p_units < ALPHA for f in found]),
            "larger of runs and units": share([max(f.p_runs, f.p_units) < ALPHA for f in found]),
        },
        "standard_error": {
            "true": float(f"{np.std([f.mean for f in found]):.3g}"),
            "found": float(f"{np.sqrt(squares):.3g}"),
        },
        "smallest_p": float(f"{found[0].p_smallest:.2g}"),
    }  # fmt: skip


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=TRIALS)
    given = parser.parse_args()
    rows = []
    for setting in settings():
        rows.append(summary(setting, given.trials))
        r = rows[-1]
        print(
            setting.name, setting.folds, setting.subjects, r["covered"], r["rejected"], flush=True
        )
    versions = {"numpy": np.__version__, "scipy": scipy.__version__}
    write_json(given.out, {"trials": given.trials, "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
