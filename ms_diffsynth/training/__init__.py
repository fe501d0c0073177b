"""Training: the step, what compiles it, the draws, the optimizer, the loop."""
