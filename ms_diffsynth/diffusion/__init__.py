"""The mathematics of diffusion: paths, schedules, densities, weights, losses, samplers. No models, no files."""
