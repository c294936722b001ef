"""Evaluation of predictions: metrics, confidence intervals, metadata groups, and comparisons of runs."""
