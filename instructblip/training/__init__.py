"""Training: the loop, optimisation, checkpoints, and what a run shows of itself."""
