"""The networks, layers and blocks that are measured, and the time that they are expected to take."""
