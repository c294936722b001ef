"""Data sets: their cases, checks and splits, and the plan and cache for training."""
