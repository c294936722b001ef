"""segmentation_models_pytorch's networks."""

from .family import Family, Layout

FAMILY = Family(
    name="segmentation_models_pytorch",
    modules=("segmentation_models_pytorch",),
    padded={"Conv2dStaticSamePadding": "static_padding"},
    methods=(("SegmentationModel", "check_input_shape"),),
    functions=(("segmentation_models_pytorch.encoders._efficientnet", "drop_connect"),),
    layouts={"SegmentationModel": Layout(r"decoder\.|segmentation_head\.", r"encoder\.")},
)
