"""U-Nets of the form that people write themselves, recognised by the names of their parts."""

from .family import Layout

LAYOUTS: tuple[tuple[tuple[str, ...], Layout], ...] = (
    # inc, down1…4, up1…4, outc
    (
        ("inc", "down1", "up1", "outc"),
        Layout(r"up\d|outc\b", r"inc\b|down\d"),
    ),
    # encoder1…4, bottleneck, upconv4…1 and decoder4…1, conv
    (
        ("encoder1", "bottleneck", "decoder1"),
        Layout(r"(upconv|decoder)\d|(out|final)?_?conv\b", r"encoder\d|bottleneck\b"),
    ),
)
"""Names of children that a network of this form has, and its layout."""
