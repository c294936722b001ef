"""The sections of the configuration: pydantic models that refuse unknown keys and values of another kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
LabelValue = Annotated[int, Field(ge=1, le=65535)]
"""0 is the background; larger ones cannot be written."""

PatchSide = Annotated[int, Field(ge=1, le=4096)]

MISSING = {"bids": ("n/a",), "csv": ("n/a", "na", "nan", "none", "null")}
"""Spellings of a missing value, beside an empty cell, by ``data.source``; upper and lower case do not matter."""


class Section(BaseModel):
    """A part of the configuration; a key that it does not know is an error, and so is a number that is none."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Without this True would pass as 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        wrong = _truth_value(value)
        if wrong is not None and kinds & {int, float} and bool not in kinds:
            raise ValueError(
                f"must be a number, got {wrong!r} (YAML reads yes, no, on and off as True and False)"
            )
        return value


def _kinds(annotation: Any) -> set[type]:
    """The types in an annotation, those of literals too."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(p) for p in parts}
    if not parts:
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*map(_kinds, parts))


def _truth_value(value: Any) -> bool | None:
    """True or False where ``value`` is that, or a list with it."""
    if isinstance(value, list | tuple):
        return next((v for v in map(_truth_value, value) if v is not None), None)
    return value if isinstance(value, bool) else None


class Label(Section):
    """What is to be segmented.

    Where the labels are exclusive values of one file, ``values`` says which; where each has a mask of its own,
    ``suffix`` (BIDS) or ``column`` (CSV) says which file, and every voxel that is not 0 belongs to it.
    """

    values: list[LabelValue] | None = Field(
        None, min_length=1, description="values in the label file that make up this label"
    )
    suffix: str | None = Field(None, description="BIDS: suffix of the label's own mask file")
    column: str | None = Field(None, description="CSV: column with the label's own mask file")

    @model_validator(mode="after")
    def _one_origin(self) -> Label:
        given = [n for n in ("values", "suffix", "column") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"a label needs one of values, suffix, column, got {given or 'none'}")
        return self


class Data(Section):
    """Where images, labels and metadata are."""

    source: Literal["bids", "csv"] = Field("bids", description="layout of the data")
    root: Path = Field(description="BIDS folder, or the CSV file (its paths are relative to it)")
    contrasts: list[str] = Field(
        min_length=1,
        description="BIDS: what stands between subject and .nii.gz, e.g. T1w or acq-fat_T2w"
        " (further entities such as ses- or run- make cases of their own); CSV: image columns",
    )
    combine: Literal["channels", "samples"] = Field(
        "channels", description="several contrasts: channels of one case, or each a case"
    )
    missing_contrast: Literal["error", "zeros", "skip"] = Field(
        "error",
        description="a case without one of the channels: refuse, a channel of zeros, or leave out",
    )
    labels: dict[str, Label] = Field(min_length=1, description="name: values, suffix or column")
    label_suffix: str = Field("dseg", description="BIDS: suffix of files that hold several labels")
    label_contrast: str | None = Field(
        None, description="BIDS: contrast in the label's name; none: any of the case's"
    )
    label_column: str = Field("label", description="CSV: column of files that hold several labels")
    ignore_values: list[Positive] = Field(
        default_factory=list, description="further values in label files: background"
    )
    derivatives: str = Field("derivatives/labels", description="BIDS: folder of the labels")
    table: str = Field("participants.tsv", description="BIDS: table of metadata, by participant_id")
    dicom_column: str = Field(
        "dicom", description="CSV: column of DICOM files or folders, for metadata with source dicom"
    )
    missing_labels: Literal["error", "mask", "skip"] = Field(
        "error",
        description="a label file that is not there: refuse, leave the label out of the case's loss,"
        " or leave the case out",
    )
    annotated_column: str | None = Field(
        None,
        description="column with the names of the labels that were annotated in the case (separated by ;)",
    )
    grid_tolerance: float = Field(
        0.1, ge=0, description="voxels that channels and labels of one shape may lie apart"
    )
    empty_cases: Literal["error", "allow"] = Field(
        "error", description="a case in which no annotated label has a voxel"
    )
    exclude: list[str] = Field(default_factory=list, description="subjects or cases to leave out")

    @field_validator("contrasts")
    @classmethod
    def _differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"contrasts must differ, got {value}")
        return value

    @model_validator(mode="after")
    def _ignored(self) -> Data:
        for name, label in self.labels.items():
            both = sorted({*(label.values or [])} & {*self.ignore_values})
            if both:
                raise ValueError(f"ignore_values: {both[0]} is a value of the label {name!r}")
        return self

    @field_validator("labels", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``anterior: 1`` and ``liver: [1, 2]`` stand for ``{values: …}``."""
        if isinstance(value, Mapping):
            return {
                k: {"values": [v] if isinstance(v, int) else v} if isinstance(v, int | list) else v
                for k, v in value.items()
            }
        return value


class MetadataKey(Section):
    """One metadata key and how its values become numbers."""

    kind: Literal["category", "continuous", "ordered", "multilabel", "vector"] = Field(
        "category",
        description="one of several values, a number, ranked values, several at once, a row of numbers",
    )
    source: Literal["auto", "table", "entity", "sidecar", "dicom"] = Field(
        "auto",
        description="table column, entity in the file name, JSON sidecar; auto: the first of these that has it;"
        " dicom: header of the files that the image was made from",
    )
    tag: str | None = Field(
        None,
        pattern=r"^([A-Za-z][A-Za-z0-9]*|[0-9A-Fa-f]{4},[0-9A-Fa-f]{4})$",
        description="dicom: keyword or number, EchoTime or 0018,0081; none: the key's name",
    )
    scaling: Literal["standardise", "log", "bins"] = Field(
        "standardise",
        description="continuous: zero mean and unit deviation, the same of the logarithm,"
        " or bins between the minima of a kernel density",
    )
    values: list[str] | None = Field(
        None,
        description="the values there are (ordered: lowest first); none: those of the training cases",
    )
    separator: str = Field(";", min_length=1, description="multilabel: between the values")
    columns: list[str] | None = Field(
        None,
        min_length=1,
        description="vector: the table's columns with its components, in this order (radiomics_*: those that"
        " fit, in the table's); none: one cell or entry, a .npy file or a list of numbers",
    )
    projection: Positive | None = Field(
        None,
        description="vector: number of principal components; none: every component, standardised",
    )
    unseen: Literal["error", "unknown"] = Field(
        "error", description="a value not seen in training: refuse, or treat as missing"
    )
    dropout: Fraction = Field(
        0.1, description="share of training samples whose value is hidden, which trains 'unknown'"
    )
    missing: list[str] | None = Field(
        None,
        description="spellings of a missing value, beside an empty cell (a text in values is none of them);"
        " none: bids n/a; csv n/a, na, nan, none, null",
    )
    input: bool = Field(
        True,
        description="the network gets it; false: it is read for splits, groups, sampling and the audit only",
    )

    @field_validator("values", "missing", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for v in value:
            if v is None or isinstance(v, bool):
                raise ValueError(
                    f"YAML reads yes, no, on, off and null as {v!r}: put such values in quotes"
                )
        return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in value]

    @model_validator(mode="after")
    def _fits_kind(self) -> MetadataKey:
        if self.kind == "ordered" and (self.values is None or len(self.values) < 2):
            raise ValueError("kind 'ordered' needs values: two or more, lowest first")
        if self.kind == "continuous" and self.values is not None:
            raise ValueError("kind 'continuous' takes no values")
        if self.kind == "vector" and self.values is not None:
            raise ValueError("kind 'vector' takes no values")
        for name in ("columns", "projection"):
            if self.kind != "vector" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for kind 'vector', not for {self.kind!r}")
        if self.tag is not None and self.source != "dicom":
            raise ValueError(f"tag is for source 'dicom', not for {self.source!r}")
        if self.kind == "vector" and self.source == "dicom":
            raise ValueError("kind 'vector' has no source 'dicom'")
        if self.columns is not None and self.source not in ("auto", "table"):
            raise ValueError(f"columns are those of the table, and source is {self.source!r}")
        if self.values is not None and len(set(self.values)) < len(self.values):
            raise ValueError(f"values must differ, got {self.values}")
        return self


class Output(Section):
    """What the network's channels mean."""

    mode: Literal["channels", "classes", "task"] = Field(
        "channels",
        description="channels: a sigmoid for each label (labels may overlap or be missing); classes:"
        " softmax over background and labels; task: one sigmoid channel, the label's name is metadata",
    )
    task_key: str = Field("task", description="mode task: name of that metadata key")
    tasks_per_case: Literal["sampled", "all"] = Field(
        "sampled",
        description="mode task: a patch is drawn for one label, or stands in the batch once for each",
    )


class PreprocessingConfig(Section):
    """What ``plan`` should decide by itself where nothing is said."""

    dimensions: Literal["auto", "2d", "3d"] = Field("auto", description="slices or volumes")
    slice_axis: Literal["auto", "sagittal", "coronal", "axial"] = Field(
        "auto", description="2D: the plane of a slice; auto: across the largest spacing, else axial"
    )
    spacing: Literal["auto", "keep", "median"] | list[Annotated[float, Field(gt=0)] | None] = Field(
        "auto",
        description="mm along right, anterior, superior (null: as it is), 'keep', or the median;"
        " auto: the median along axes on which the cases differ by more than a tenth",
    )
    normalisation: Literal["auto", "zscore", "percentile", "minmax", "ct", "none"] = Field(
        "auto",
        description="zscore; percentile: clipped at 0.5 and 99.5 % first; minmax; ct: with constants of"
        " the training labels' intensities; auto: zscore, with Hounsfield units ct",
    )
    nonzero: bool = Field(False, description="statistics of voxels that are not 0 only")
    crop: Literal["none", "nonzero"] = Field("nonzero", description="cut zero borders off")
    patch_size: list[PatchSide] | None = Field(
        None, description="in network order (3D: slices first); none: chosen by plan"
    )

    @field_validator("spacing")
    @classmethod
    def _three(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) != 3:
            raise ValueError(f"spacing needs three values, got {len(value)}")
        return value


class NetworkConfig(Section):
    """The network; channels and metadata size follow from data and metadata."""

    name: Literal["FiLMedUNet", "Modified3DUNet", "condition"] = Field(
        "FiLMedUNet", description="a network of fastfilm, or 'condition' for one of another library"
    )
    depth: Annotated[int, Field(ge=1, le=12)] | None = Field(
        None, description="FiLMedUNet: poolings; none: by patch size"
    )
    base_filters: Positive = Field(16, description="channels of the first level")
    norm: Literal["batch", "instance", "layer", "none"] = Field(
        "instance", description="FiLMedUNet"
    )
    order: Literal["conv-act-norm-film", "conv-norm-film-act", "conv-norm-act-film"] = Field(
        "conv-norm-film-act", description="where FiLM stands (FiLMedUNet, condition)"
    )
    activation: str = Field("leaky_relu", description="FiLMedUNet")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="of channels")
    generator: Literal["paper", "identity"] = Field(
        "identity", description="sigmoids as in the paper, or a start at γ = 1, β = 0"
    )
    conditioning: Literal["film", "channels"] = Field(
        "film", description="FiLM, or each column of the metadata as a constant image channel"
    )
    film_layers: list[Literal[0, 1]] | None = Field(
        None, description="switches of the FiLM layers; none: all on"
    )
    deep_supervision: bool = Field(False, description="FiLMedUNet: losses at every decoder level")
    target: str | None = Field(
        None, description="condition: class, e.g. monai.networks.nets.DynUNet"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="condition: of the class; {in}, {out} stand for channels"
    )
    where: str | list[str] | None = Field(
        None, description="condition: decoder, encoder, all, or names of layers; none: decoder"
    )

    @model_validator(mode="after")
    def _target(self) -> NetworkConfig:
        if (self.name == "condition") != (self.target is not None):
            raise ValueError("target is needed with name 'condition', and only there")
        if self.conditioning == "channels" and (self.film_layers or self.where):
            raise ValueError("film_layers and where are for conditioning 'film'")
        return self


class Augmentation(Section):
    """Random changes of training samples; each the probability that it happens."""

    flip: list[Literal["sagittal", "coronal", "axial"]] = Field(
        default_factory=list, description="mirror across these planes, each with probability 1/2"
    )
    affine: Fraction = Field(0.3, description="rotation and scaling")
    rotation: float = Field(15.0, description="degrees at most", ge=0, le=180)
    scaling: float = Field(0.15, description="1 ± this at most", ge=0, lt=1)
    elastic: Fraction = Field(0.0, description="smooth deformation")
    noise: Fraction = Field(0.15, description="Gaussian noise of up to 0.1 σ")
    blur: Fraction = Field(0.1, description="Gaussian smoothing")
    brightness: Fraction = Field(0.2, description="scaled and shifted intensities")
    gamma: Fraction = Field(0.2, description="contrast")
    low_resolution: Fraction = Field(0.0, description="down- and upsampled")
    drop_channel: Fraction = Field(0.0, description="a channel set to zero (never all)")


class Training(Section):
    """The training loop."""

    epochs: Positive = 100
    steps_per_epoch: Positive | None = Field(None, description="none: the training cases once")
    batch_size: Positive | None = Field(
        None, description="over all processes; none: chosen by plan for the memory at hand"
    )
    accumulate: Positive = Field(1, description="parts that a batch is worked through in")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    generator_weight_decay: float = Field(0.0, ge=0, description="of the FiLM generators' weights")
    momentum: float = Field(0.99, ge=0, lt=1, description="sgd (Nesterov)")
    schedule: Literal["cosine", "poly", "plateau", "constant"] = "cosine"
    warmup_steps: int = Field(50, ge=0)
    poly_power: float = Field(0.9, gt=0)
    plateau_patience: Positive = Field(10, description="epochs without a better Dice")
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    early_stopping: Positive | None = Field(
        None, description="stop after so many epochs without a Dice better by min_delta"
    )
    min_delta: float = Field(1e-3, ge=0)
    clip_gradient: float | None = Field(12.0, gt=0, description="norm; none: not clipped")
    loss: list[Literal["dice", "ce", "focal", "tversky", "generalised_dice"]] = Field(
        ["dice", "ce"], min_length=1, description="added up"
    )
    tversky_alpha: Fraction = Field(0.3, description="weight of false positives")
    focal_gamma: float = Field(2.0, ge=0)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="autocast's type; auto: bfloat16 on a GPU that has it, else float32"
    )
    channels_last: bool = True
    ema: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="decay of the weights' moving average, which is what is saved"
    )
    balance: str | None = Field(
        None, description="metadata key whose values are drawn equally often ('label': tasks too)"
    )
    foreground: Fraction = Field(
        0.5, description="share of patches (slices) with a label in them; labels in turn"
    )
    workers: int = Field(2, ge=0, description="processes that load")
    validate_every: Positive = Field(1, description="epochs")
    validation_overlap: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5,
        description="of the windows, as in predict: the log's Dice is that of evaluate; less is faster",
    )
    checkpoint_minutes: float = Field(5.0, ge=0, description="between checkpoints inside an epoch")
    checkpoint_steps: Positive | None = Field(None, description="the same in steps")
    seed: int = Field(0, ge=0, lt=2**32)
    freeze: Literal["none", "all_but_generator"] = Field(
        "none", description="fine-tuning: what stays as it is"
    )


class Splits(Section):
    """Who is trained on, who is validated on."""

    folds: Annotated[int, Field(ge=2)] | None = Field(
        None, description="none: 5, or with leave_out one a value"
    )
    stratify: list[str] = Field(
        default_factory=list, description="metadata keys spread evenly over the folds"
    )
    group: str | None = Field(
        None,
        description="metadata key, such as a family: subjects with the same value stay together;"
        " without one, alone",
    )
    leave_out: str | None = Field(
        None,
        description="metadata key, such as a site: each fold holds the subjects of a value out",
    )
    nested: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="one part in so many of a fold's training subjects becomes val, which chooses the weights,"
        " and the held-out subjects become test, which choose nothing",
    )
    column: str | None = Field(
        None, description="column with train, val, test: one fixed split instead of folds"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_design(self) -> Splits:
        if self.column is not None:
            for name in ("group", "leave_out", "nested"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"column and {name} exclude each other: column says the part of every subject"
                    )
        if self.leave_out is not None:
            if self.folds is not None:
                raise ValueError(
                    "leave_out and folds exclude each other: leave_out makes one fold for each value"
                )
            if self.stratify and self.nested is None:
                raise ValueError(
                    "leave_out and stratify need nested: without it there is no part whose subjects are chosen"
                )
        return self


Arm = Literal[
    "conditioned",
    "unconditioned",
    "shuffled",
    "channels",
    "encoder",
    "nnunet",
    "nnunet_conditioned",
]


class Trial(Section):
    """The design of ``fastfilm trial``; fixed before its first step."""

    arms: list[Arm] = Field(
        ["conditioned", "unconditioned", "shuffled"],
        description="conditioned: as configured; unconditioned: the same network without metadata; shuffled:"
        " trained with the metadata of other training cases; channels: metadata as constant image"
        " channels; encoder: FiLM in the encoder alone; nnunet: nnU-Net (installed apart);"
        " nnunet_conditioned: nnU-Net with FiLM on the metadata",
    )
    seeds: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="networks trained for each arm and fold"
    )
    margin: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="smallest difference of the mean Dice that is worth having"
    )
    cluster: str | None = Field(
        None,
        description="metadata key of what subjects come from, such as a site: drawn as a whole",
    )

    @field_validator("arms")
    @classmethod
    def _complete(cls, value: list[str]) -> list[str]:
        needed = ["conditioned", "unconditioned"]
        if not {*needed} <= {*value} or len({*value}) < len(value):
            raise ValueError(f"arms must differ and have {' and '.join(needed)}, got {value}")
        return value
