"""Predictions against the truth: metrics, intervals, metadata groups, and comparisons of runs."""
