"""From a folder of NIfTI files and a table of metadata to trained networks and predictions."""
