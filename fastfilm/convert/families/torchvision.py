"""torchvision's networks."""

from .family import Family, Layout

_HEADS = Layout(r"(aux_)?classifier\.", r"backbone\.")

FAMILY = Family(
    name="torchvision",
    modules=("torchvision",),
    layouts={name: _HEADS for name in ("FCN", "DeepLabV3", "LRASPP")},
)
