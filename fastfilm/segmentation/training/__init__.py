"""Training one fold of a plan: samples, losses, the loop, checkpoints."""
