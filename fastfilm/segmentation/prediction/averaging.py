"""Cases without a value of a metadata key: predicted under each value that it may have, weighted by its frequency.

    p(mask | image) = Σ_v p(v) p(mask | image, v)

p(v) is the frequency of v in training, or a prior that is given. A missing value is taken as independent of the
image and, where several are missing, of the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..metadata.encoder import KeyEncoder, is_missing
from ..models.folder import LoadedModel
from ..support.errors import UserError
from ..support.hints import did_you_mean

MOST = 128
"""Combinations of values of several missing keys up to which a case is predicted."""

Prior = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
"""Each key, and its values with their weights, which add up to 1."""


def missing_keys(model: LoadedModel, values: Mapping[str, Any]) -> list[str]:
    """The keys that the user gives a case, and that have no value."""
    names = model.metadata_keys()
    return [n for n in names if is_missing(values.get(n), model.encoder[n])]


def weighted(
    model: LoadedModel, values: Mapping[str, Any], prior: Prior = ()
) -> list[tuple[float, dict[str, Any]]]:
    """Complete metadata of a case, each with its weight; the weights add up to 1.

    Args:
        values: key -> value; those that are missing are filled in.
        prior: of keys; the frequency in training goes for the others.

    Raises:
        UserError: a key whose values or frequencies are not known, more than ``MOST`` combinations.
    """
    given = dict(prior)
    filled = {n: given.get(n) or likely(model.encoder[n]) for n in missing_keys(model, values)}
    count = math.prod(map(len, filled.values()))
    if count > MOST:
        each = " × ".join(f"{name} {len(several)}" for name, several in filled.items())
        raise UserError(
            f"{count} combinations of missing metadata ({each}), at most {MOST} are predicted: give some of them"
            " (--meta), or fewer values (--prior)"
        )
    found = []
    for chosen in itertools.product(*filled.values()):
        names = zip(filled, chosen, strict=True)
        whole = {**values, **{name: value for name, (value, _) in names}}
        found.append((math.prod(weight for _, weight in chosen), whole))
    return found


def likely(key: KeyEncoder) -> Sequence[tuple[Any, float]]:
    """The values that a key had in training, each with its share of the cases; of a number its quantiles.

    Raises:
        UserError: a vector, several values at once, a model that does not know how often its values were there.
    """
    ask = f"--missing average: metadata {key.name!r}"
    example = f"--prior {key.name}=VALUE:WEIGHT,VALUE:WEIGHT"
    if key.kind == "vector":
        raise UserError(
            f"{ask} is a vector, over which there is no mean: give it, or --missing unknown"
        )
    if key.kind == "multilabel":
        raise UserError(
            f"{ask} has several values at once, whose combinations training does not count; give the likely ones:"
            f" {example} (as in a{key.separator}b:1,a:2)"
        )
    if key.kind == "continuous" and key.edges is None:
        values: list[Any] = [key.original(x) for x in key.quantiles]
        counts = [1] * len(values)
    else:
        values = key.values if key.edges is None else [key.original(x) for x in key.middles()]
        counts = key.counts or []
    total = sum(counts)
    if not total:
        raise UserError(
            f"{ask}: the model does not know how often its values were in training (an older fastfilm made it);"
            f" give {example}"
        )
    shares: dict[Any, float] = {}
    for value, count in zip(values, counts, strict=True):
        # equal quantiles are one value
        if count:
            shares[value] = shares.get(value, 0.0) + count / total
    return list(shares.items())


def parse_prior(texts: Sequence[str], model: LoadedModel) -> Prior:
    """``KEY=VALUE:WEIGHT,VALUE:WEIGHT`` of each key, with weights that add up to 1.

    Raises:
        UserError: another form, a key or a value that the model does not know, weights that are no shares.
    """
    found: dict[str, tuple[tuple[str, float], ...]] = {}
    for text in texts:
        name, sign, given = text.partition("=")
        if not sign:
            raise UserError(f"--prior takes KEY=VALUE:WEIGHT,VALUE:WEIGHT, got {text!r}")
        if name not in model.metadata_keys():
            raise UserError(
                f"--prior {text}: the model has no metadata key {name!r}; it has"
                f" {', '.join(model.metadata_keys()) or 'none'}{did_you_mean(name, model.metadata_keys())}"
            )
        if name in found:
            raise UserError(f"--prior gives {name!r} twice")
        pairs = [_pair(text, part, model.encoder[name]) for part in given.split(",")]
        rows = [model.encoder[name].encode(value).tobytes() for value, _ in pairs]
        if len(set(rows)) < len(rows):
            raise UserError(f"--prior {text}: two of the values are the same to the model")
        total = sum(weight for _, weight in pairs)
        if not 0 < total < math.inf:
            raise UserError(f"--prior {text}: the weights add up to {total:g}")
        found[name] = tuple((value, weight / total) for value, weight in pairs if weight)
    return tuple(found.items())


def _pair(text: str, part: str, key: KeyEncoder) -> tuple[str, float]:
    value, sign, weight = (t.strip() for t in part.rpartition(":"))
    try:
        share = float(weight) if sign else math.nan
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise UserError(
            f"--prior {text}: takes VALUE:WEIGHT with a weight of 0 or more, got {part!r}"
        )
    if key.kind == "vector":
        raise UserError(f"--prior {text}: {key.name!r} is a vector, over which there is no mean")
    if is_missing(value, key) or key.unseen_value(value):
        raise UserError(f"--prior {text}: {value!r} is not a value that was in training")
    key.encode(value)
    return value, share
