"""ivadomed's networks, recognised by class name and parts wherever they are defined."""

from .family import Family, Layout

UNET = Layout(r"decoder\.", r"encoder\.")

MODIFIED = Layout(
    r"(conv3d|conv_norm_lrelu|norm_lrelu_upscale_conv_norm_lrelu)_l\d|upscale_conv_norm_lrelu_|ds\d_|norm_lrelu_0",
    r"conv3d_c\d|(norm_)?lrelu_conv_c\d|gating|attentionblock",
)

FAMILY = Family(
    name="ivadomed",
    modules=("ivadomed",),
    layouts={"Unet": UNET, "FiLMedUnet": UNET, "Modified3DUNet": MODIFIED},
)
