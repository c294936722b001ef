"""Training of one fold of a plan: samples, losses, the loop, and checkpoints."""
