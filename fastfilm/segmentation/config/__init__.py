"""The configuration of a segmentation project: its sections, and reading them from YAML."""
