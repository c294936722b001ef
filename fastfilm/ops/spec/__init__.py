"""The vocabulary of all other rooms: names, checks, layouts, and the small structs of a call."""

from .checks import (
    as_tuple,
    check_channel_vector,
    check_feature_map,
    check_film,
    check_number,
    check_same_device,
    check_slope,
    choice,
)
from .eager import direct
from .geometry import GEOMETRY, Geometry, NormInput, Pending, Plan
from .kind import Behind, Kind, Options, TailTensors
from .layout import (
    FORMATS,
    absent,
    accumulate_dtype,
    channels_last,
    channels_last_format,
    conv_output_size,
    has_idle_taps,
    laid_out_like,
    layout_of,
    raw_like,
    stats_like,
    transformed,
)
from .names import (
    ACTIVATION_CODES,
    ACTIVATIONS,
    COEF_ROWS,
    DEFAULT_SLOPE,
    DROPOUT_POSITIONS,
    DTYPE_CODES,
    FLOAT_DTYPES,
    NORMS,
    ORDERS,
    SAMPLE_NORMS,
    SLOPE,
    A,
    B,
    G,
    Keep,
    P,
    Q,
    S,
    constant_when_compiled,
)
from .operands import Addends, Gradient, Output, Source, SourceGradient, Wanted
