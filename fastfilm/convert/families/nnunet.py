"""nnU-Net's networks (dynamic-network-architectures)."""

from .family import Family

FAMILY = Family(
    name="nnU-Net", modules=("dynamic_network_architectures",), decoders=(r"^decoder\.",)
)
