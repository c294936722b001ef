"""Data sets: their cases, their faults, their splits, and the plan and cache that a training starts from."""
