"""nnU-Net's networks (dynamic-network-architectures)."""

from .family import Family, Layout

# the decoder holds the encoder once more
_LAYOUT = Layout(r"decoder\.(?!encoder\.)")

FAMILY = Family(
    name="nnU-Net",
    modules=("dynamic_network_architectures",),
    layouts={
        name: _LAYOUT
        for name in ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet", "UNetDecoder")
    },
)
