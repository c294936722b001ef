"""Measurements of fastfilm against its peers; ``python benchmarks/run.py`` is the way in."""
