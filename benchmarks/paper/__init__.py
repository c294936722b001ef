"""The experiments of Lemay et al. (MIDL 2021) on open data: ``python benchmarks/paper/run.py``."""
