"""MONAI's networks."""

from fastfilm.convert.layers import Activation

from .family import Family

FAMILY = Family(
    name="MONAI",
    modules=("monai",),
    activations={"MemoryEfficientSwish": Activation("silu"), "Swish": Activation("silu")},
)
