"""The networks of pytorch-3dunet, whose blocks put norm, convolution and activation in any order."""

from .family import Family, Layout

FAMILY = Family(
    name="pytorch-3dunet",
    modules=("pytorch3dunet",),
    layouts={"AbstractUNet": Layout(r"decoders\.|final_conv", r"encoders\.")},
)
