"""The metadata encoder: values of any kind -> the numbers that condition the network.

It is fitted on the training split, kept as plain JSON in the model folder, and travels with the model. Each key
gets a block of columns; where a key can be unknown the last column of its block is 1 for an unknown value and the
others are 0, so that the generator's first layer learns a vector for "unknown".

| kind | columns |
|---|---|
| category | one a value (one-hot) |
| multilabel | one a value (several may be 1) |
| ordered | n - 1 for n values: column i is 1 if the value ranks above i |
| continuous | (x - mean) / std, of x or of log x; or one a bin |
| vector | (x - mean) / std of each component; or of the first principal components |
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..config.sections import (
    MISSING,
    MetadataKey,
    Section,
)
from ..support.errors import MetadataError, Problems
from .density import density_edges
from .vectors import VectorEncoder, numbers

T = TypeVar("T")

QUANTILES = 9
"""Values of a continuous key that stand for its distribution in training."""


def is_missing(value: Any, key: MetadataKey | KeyEncoder | None = None) -> bool:
    """Whether a value is not there: None, NaN, an empty list, blank text, or text that ``key.missing`` lists.

    Text that is one of ``key.values`` is a value, however it is spelt. Upper and lower case of ``key.missing`` do
    not matter.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, list | tuple):
        return all(is_missing(v, key) for v in value)
    if not isinstance(value, str):
        return False
    text = value.strip()
    if not text or key is None:
        return not text
    if text in (key.values or ()):
        return False
    spellings = MISSING["bids"] if key.missing is None else key.missing
    return text.casefold() in {s.casefold() for s in spellings}


def _float(value: Any) -> float:
    # Python takes 1_000 for a number
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError
    return float(value)


def is_blank(cell: str) -> bool:
    """Whether a table's cell that should hold a path or names holds none, by any usual spelling."""
    return cell.strip().casefold() in ("", *MISSING["csv"])


def as_category(value: Any) -> str:
    """The name of a category; 3 and 3.0 are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def bin_of(x: float, edges: Sequence[float]) -> int:
    """Which of the bins [-∞, e₀), [e₀, e₁), … a number lies in."""
    return int(np.searchsorted(edges, x, side="right"))


class KeyEncoder(Section):
    """One fitted key.

    Attributes:
        name: the key.
        kind: category, continuous, ordered, multilabel or vector.
        source: where its values come from: table, entity (file name), sidecar, or auto, the first that has it; or
            dicom.
        tag: dicom: keyword or number of the tag; None: the key's name.
        values: the values it knows, in the order of the columns (none for continuous and vector).
        unknown: there is a trained "unknown"; without it a missing value is an error.
        unseen: what happens to a value that is not in ``values``.
        dropout: probability that training hides a value.
        log: continuous: the logarithm is encoded.
        mean, std: continuous, of the training values (of their logarithms with ``log``).
        edges: continuous in bins: the inner edges; None means standardised.
        lowest, highest: continuous: range in training.
        counts: training cases with each of ``values``, or in each bin; None: not known (of a multilabel key, and
            of models that were made before they were counted).
        quantiles: continuous: values in training (of their logarithms with ``log``) at ``QUANTILES`` equal steps.
        separator: multilabel, between the values in a text.
        table_columns: vector: the table's columns with its components; none: one cell or entry has them all.
        vector: vector: how it is standardised and projected.
        missing: spellings of a missing value (blank text is one anyway; a text in ``values`` is none).
    """

    name: str
    kind: Literal["category", "continuous", "ordered", "multilabel", "vector"]
    source: Literal["auto", "table", "entity", "sidecar", "dicom"] = "auto"
    tag: str | None = None
    values: list[str] = Field(default_factory=list)
    unknown: bool = False
    unseen: Literal["error", "unknown"] = "error"
    dropout: float = 0.0
    log: bool = False
    mean: float = 0.0
    std: float = 1.0
    edges: list[float] | None = None
    lowest: float = 0.0
    highest: float = 0.0
    counts: list[int] | None = None
    quantiles: list[float] = Field(default_factory=list)
    separator: str = ";"
    table_columns: list[str] = Field(default_factory=list)
    vector: VectorEncoder | None = None
    missing: list[str] = Field(default_factory=lambda: list(MISSING["bids"]))

    @property
    def known_width(self) -> int:
        """Columns without the one for "unknown"."""
        if self.kind == "continuous":
            return 1 if self.edges is None else len(self.edges) + 1
        if self.kind == "vector":
            return self.fitted_vector.width
        return len(self.values) - (self.kind == "ordered")

    @property
    def fitted_vector(self) -> VectorEncoder:
        """Of a vector key."""
        assert self.vector is not None, self.name
        return self.vector

    @property
    def width(self) -> int:
        """Columns in all."""
        return self.known_width + self.unknown

    def columns(self) -> list[str]:
        """A name for each column, e.g. ``tumor_type=astrocytoma``, ``age``, ``age=unknown``."""
        if self.kind == "continuous":
            known = [self.name]
            if self.edges is not None:
                ends = [-math.inf, *self.edges, math.inf]
                known = [f"{self.name} in [{a:.4g}, {b:.4g})" for a, b in itertools.pairwise(ends)]
        elif self.kind == "vector":
            known = self.fitted_vector.names(self.name, self.table_columns)
        elif self.kind == "ordered":
            known = [f"{self.name}>{v}" for v in self.values[:-1]]
        else:
            known = [f"{self.name}={v}" for v in self.values]
        return known + [f"{self.name}=unknown"] * self.unknown

    def encode(self, value: Any) -> NDArray[np.float32]:
        """The columns for ``value``.

        Raises:
            MetadataError: missing without an "unknown", not a number, never seen in training.
        """
        row = np.zeros(self.width, np.float32)
        known = None if is_missing(value, self) else self._known(value)
        if known is not None:
            row[: self.known_width] = known
        elif self.unknown:
            row[-1] = 1
        else:
            raise MetadataError(
                f"metadata {self.name!r} is missing, and the model was trained without missing values of it;"
                f" give {self._expected()}"
            )
        return row

    def _plain(self, value: Any) -> None:
        several = isinstance(value, list | tuple)
        for v in value if several else [value]:
            if isinstance(v, Mapping | list | tuple):
                raise MetadataError(
                    f"metadata {self.name!r} must be text, a number or a list of them, got {value!r}"
                )
        if several and self.kind in ("category", "ordered"):
            raise MetadataError(
                f"metadata {self.name!r} is a list, {value!r}: kind multilabel takes several values at once"
            )

    def number(self, value: Any) -> float:
        """A continuous value as a float; lists (echo times) are averaged."""
        try:
            several = value if isinstance(value, list | tuple) else [value]
            x = float(np.mean([_float(v) for v in several]))
        except (TypeError, ValueError, OverflowError):
            hint = "" if any(c.isdigit() for c in str(value)) else self._spelling()
            raise MetadataError(
                f"metadata {self.name!r} must be a number, got {value!r}{hint}"
            ) from None
        if not math.isfinite(x) or (self.log and x <= 0):
            kind = "a positive number" if self.log else "a finite number"
            hint = self._spelling() if math.isnan(x) else ""
            raise MetadataError(f"metadata {self.name!r} must be {kind}, got {value!r}{hint}")
        return math.log(x) if self.log else x

    def components(self, value: Any) -> NDArray[np.float64]:
        """A vector's components, of whatever length."""
        try:
            return numbers(value)
        except ValueError as error:
            raise MetadataError(f"metadata {self.name!r}: {error}") from None

    def _spelling(self) -> str:
        return f" (if that stands for a missing value: metadata.{self.name}.missing)"

    def several(self, value: Any) -> list[str]:
        """The names in a multilabel value."""
        parts = value if isinstance(value, list | tuple) else str(value).split(self.separator)
        return [as_category(p) for p in parts if not is_missing(p, self)]

    def _known(self, value: Any) -> NDArray[np.float32] | None:
        """The columns without "unknown"; None if the value counts as unknown."""
        self._plain(value)
        row = np.zeros(self.known_width, np.float32)
        if self.kind == "continuous":
            x = self.number(value)
            if self.edges is None:
                with np.errstate(over="ignore"):
                    row[0] = (x - self.mean) / self.std
                if not np.isfinite(row[0]):
                    raise MetadataError(
                        f"metadata {self.name!r}: {value!r} is beyond all numbers; expected {self._expected()}"
                    )
            else:
                row[bin_of(x, self.edges)] = 1
            return row
        if self.kind == "vector":
            try:
                with np.errstate(over="ignore"):
                    row[:] = self.fitted_vector.encode(self.components(value))
            except ValueError as error:
                raise MetadataError(f"metadata {self.name!r} {error}") from None
            if not np.isfinite(row).all():
                raise MetadataError(f"metadata {self.name!r}: components are beyond all numbers")
            return row
        names = self.several(value) if self.kind == "multilabel" else [as_category(value)]
        for name in names:
            if name not in self.values:
                if self.unseen == "unknown" and self.unknown:
                    return None
                raise MetadataError(
                    f"metadata {self.name!r} has the value {name!r}, which was not in training;"
                    f" expected {self._expected()}"
                )
            i = self.values.index(name)
            if self.kind == "ordered":
                row[:i] = 1
            else:
                row[i] = 1
        return row

    def original(self, x: float) -> float:
        """The value of a continuous key that ``number`` makes ``x`` of."""
        return math.exp(x) if self.log else x

    def middles(self) -> list[float]:
        """A number in each bin, as ``number`` makes them: the middle, and the range's end in the outer ones."""
        edges = self.edges or []
        return [
            self.lowest,
            *((a + b) / 2 for a, b in itertools.pairwise(edges)),
            *([self.highest] if edges else []),
        ]

    def range_text(self) -> str:
        """A continuous key's range in training."""
        low, high = self.original(self.lowest), self.original(self.highest)
        return f"{low:.6g} to {high:.6g}"

    def outside(self, value: Any) -> bool:
        """Whether a continuous value lies outside the training's range."""
        if self.kind != "continuous" or is_missing(value, self):
            return False
        return not self.lowest <= self.number(value) <= self.highest

    def unseen_value(self, value: Any) -> bool:
        """Whether a value that training did not see counts as unknown."""
        return (
            self.kind != "continuous" and not is_missing(value, self) and self._known(value) is None
        )

    def _expected(self) -> str:
        if self.kind == "continuous":
            return f"a number (training had {self.range_text()})"
        if self.kind == "vector":
            return f"a vector of {self.fitted_vector.length} numbers"
        return "one of " + ", ".join(self.values)


class MetadataEncoder(Section):
    """All keys of a model.

    Example:
        >>> from fastfilm.segmentation.config.sections import MetadataKey
        >>> rows = {"a": {"tumor_type": "astrocytoma"}, "b": {"tumor_type": "ependymoma"}}
        >>> encoder = MetadataEncoder.fit(rows, {"tumor_type": MetadataKey(dropout=0.1)})
        >>> encoder.columns()
        ['tumor_type=astrocytoma', 'tumor_type=ependymoma', 'tumor_type=unknown']
        >>> encoder.encode({"tumor_type": "ependymoma"}).tolist(), encoder.encode({}).tolist()
        ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    """

    keys: list[KeyEncoder] = Field(default_factory=list)

    @classmethod
    def fit(
        cls, rows: Mapping[str, Mapping[str, Any]], keys: Mapping[str, MetadataKey]
    ) -> MetadataEncoder:
        """Fits every key on the training cases.

        Args:
            rows: case -> key -> value as it stands in the table (text), sidecar (any JSON) or file name.
            keys: how each key is to be encoded.

        Raises:
            Problems: all values that do not fit, each with its case and key.
        """
        fitted, wrong = [], []
        for name, config in keys.items():
            try:
                fitted.append(_fit_key(name, config, {c: r.get(name) for c, r in rows.items()}))
            except Problems as error:
                wrong += error.problems
        if wrong:
            raise Problems("problems in the metadata", wrong)
        return cls(keys=fitted)

    @property
    def size(self) -> int:
        """M, the number of columns: the network's ``metadata_size``."""
        return sum(k.width for k in self.keys)

    def names(self) -> list[str]:
        """The keys, in the order of the columns."""
        return [k.name for k in self.keys]

    def columns(self) -> list[str]:
        """A name for each of the M columns."""
        return [c for k in self.keys for c in k.columns()]

    def values(self, name: str) -> list[str]:
        """The values that a category, ordered or multilabel key knows."""
        return list(self[name].values)

    def __getitem__(self, name: str) -> KeyEncoder:
        for k in self.keys:
            if k.name == name:
                return k
        raise MetadataError(f"metadata key {name!r} is not one of the model's: {self._list()}")

    def encode(self, values: Mapping[str, Any], hide: Collection[str] = ()) -> NDArray[np.float32]:
        """The row [M], float32, for one case.

        Args:
            values: key -> value; a key that is not there is missing.
            hide: keys to treat as missing (metadata dropout).

        Raises:
            MetadataError: a key the model does not have (a slip must not become "unknown"), a missing value of a
            key without "unknown", a value never seen, text where a number belongs.
        """
        strange = sorted(set(values) - set(self.names()))
        if strange:
            raise MetadataError(
                f"metadata key {strange[0]!r} is not one of the model's: {self._list()}"
            )
        rows = [k.encode(None if k.name in hide else values.get(k.name)) for k in self.keys]
        return np.concatenate(rows) if rows else np.zeros(0, np.float32)

    def draw_hidden(self, rng: np.random.Generator) -> set[str]:
        """Keys that metadata dropout hides from one training sample (one draw a key)."""
        draws = rng.random(len(self.keys))
        return {k.name for k, x in zip(self.keys, draws, strict=True) if x < k.dropout}

    def grow(self, name: str, value: str) -> tuple[MetadataEncoder, int]:
        """With one more value of a category, multilabel or ordered key (ranked highest).

        Returns:
            the new encoder, and the position in its row of the column that is new.
        """
        key = self[name]
        if key.kind == "continuous":
            raise MetadataError(f"metadata {name!r} is continuous: it has no values to add to")
        if key.kind == "vector":
            raise MetadataError(f"metadata {name!r} is a vector: it has no values to add to")
        if value in key.values:
            raise MetadataError(f"metadata {name!r} has the value {value!r} already")
        offset = 0
        for k in self.keys:
            if k.name == name:
                break
            offset += k.width
        counts = None if key.counts is None else [*key.counts, 0]
        grown = key.model_copy(update={"values": [*key.values, value], "counts": counts})
        keys = [grown if k.name == name else k for k in self.keys]
        return MetadataEncoder(keys=keys), offset + key.known_width

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; inverse of ``from_json``."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Any) -> MetadataEncoder:
        """The encoder in ``to_json``'s value."""
        return cls.model_validate(value)

    def _list(self) -> str:
        return ", ".join(self.names()) or "it has none"


def _fit_key(name: str, config: MetadataKey, values: Mapping[str, Any]) -> KeyEncoder:
    present = {c: v for c, v in values.items() if not is_missing(v, config)}
    key = KeyEncoder(
        name=name,
        kind=config.kind,
        source=config.source,
        tag=config.tag,
        values=config.values or [],
        unknown=config.dropout > 0 or len(present) < len(values),
        unseen=config.unseen,
        dropout=config.dropout,
        log=config.kind == "continuous" and config.scaling == "log",
        separator=config.separator,
        table_columns=config.columns or [],
        missing=list(MISSING["bids"] if config.missing is None else config.missing),
    )
    if not present:
        raise Problems(name, [f"metadata {name!r} has no value in any training case"])
    if config.unseen == "unknown" and not key.unknown:
        raise Problems(
            name,
            [
                f"metadata {name!r}: unseen 'unknown' needs dropout > 0, or missing values, that train it"
            ],
        )
    _each(present, key._plain, name)
    if config.kind == "continuous":
        return _fit_continuous(key, config, present)
    if config.kind == "vector":
        return _fit_vector(key, config, present)
    if config.values is None:
        found: set[str] = set()
        for v in present.values():
            found.update(key.several(v) if config.kind == "multilabel" else [as_category(v)])
        key.values = sorted(found)
        if not found:
            raise Problems(name, [f"metadata {name!r} has no value in any training case"])
    else:
        _each(present, key.encode, name)
    if config.kind != "multilabel":
        counts = Counter(map(as_category, present.values()))
        key.counts = [counts[v] for v in key.values]
    return key


def _each(present: Mapping[str, Any], work: Callable[[Any], T], name: str) -> list[T]:
    """``work`` on every case's value; Problems with all that do not fit."""
    done, wrong = [], []
    for case, value in present.items():
        try:
            done.append(work(value))
        except MetadataError as error:
            wrong.append(f"{case}: {error}")
    if wrong:
        raise Problems(name, wrong)
    return done


def _fit_continuous(key: KeyEncoder, config: MetadataKey, present: Mapping[str, Any]) -> KeyEncoder:
    x = np.array(_each(present, key.number, key.name))
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(x.mean()), float(x.std())
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise Problems(
            key.name,
            [
                f"metadata {key.name!r}: values of up to {np.abs(x).max():.3g} are beyond all numbers"
            ],
        )
    key.lowest, key.highest = float(x.min()), float(x.max())
    steps = min(QUANTILES, len(x))
    # values that were there: field strengths have none between 1.5 and 3
    levels = (np.arange(steps) + 0.5) / steps
    key.quantiles = np.quantile(x, levels, method="inverted_cdf").tolist()
    if config.scaling == "bins":
        key.edges = density_edges(x)
        bins = [bin_of(v, key.edges) for v in x]
        key.counts = np.bincount(bins, minlength=len(key.edges) + 1).tolist()
    else:
        # one value only, to rounding: every other value is a deviation of its own size
        key.mean, key.std = mean, std if std > 1e-9 * abs(mean) else 1.0
    return key


def _fit_vector(key: KeyEncoder, config: MetadataKey, present: Mapping[str, Any]) -> KeyEncoder:
    rows = _each(present, key.components, key.name)
    lengths = Counter(map(len, rows))
    usual, count = lengths.most_common(1)[0]
    if len(lengths) > 1:
        raise Problems(
            key.name,
            [
                f"{case}: metadata {key.name!r} has {len(row)} components, {count} other cases have {usual}"
                for case, row in zip(present, rows, strict=True)
                if len(row) != usual
            ],
        )
    try:
        key.vector = VectorEncoder.fit(np.stack(rows), config.projection)
    except ValueError as error:
        raise Problems(key.name, [f"metadata {key.name!r}: {error}"]) from None
    return key


def encode_rows(encoder: MetadataEncoder, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
    """``encoder.encode`` of one or more cases: [N, M]."""
    return np.stack([encoder.encode(r) for r in rows])
