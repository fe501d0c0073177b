"""Writes samplers.npz: diffusers' schedulers driven by a network that is a formula. Needs torch and diffusers 0.39.

    python tests/diffusion/make_samplers.py
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

STEPS = 7


def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    return (latents - 0.7 * torch.tanh(2 * latents) - 0.1 * sigma) / sigma


def integrate(scheduler, latents: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        index = scheduler.step_index if scheduler.step_index is not None else 0
        latents = scheduler.step(velocity(latents, float(scheduler.sigmas[index])), t, latents).prev_sample
    return latents


def main() -> None:
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32))
    found = {"start": start.numpy()}
    for name, scheduler in {
            "euler": FlowMatchEulerDiscreteScheduler(shift=3.0), "heun": FlowMatchHeunDiscreteScheduler(shift=3.0),
            "dpmpp_2m": DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction",
                                                    flow_shift=3.0)}.items():
        scheduler.set_timesteps(STEPS)
        if name == "dpmpp_2m":
            scheduler.sigmas[0] = 1.0  # pure noise, where the logarithm is infinite
        sigmas = scheduler.sigmas.numpy()
        found[f"{name} sigmas"] = np.concatenate([sigmas[:-1:2], sigmas[-1:]]) if name == "heun" else sigmas
        found[name] = integrate(scheduler, start.clone()).numpy()
    np.savez_compressed(Path(__file__).with_name("samplers.npz"), **found)
    for name, value in found.items():
        print(name, value.shape, value.ravel()[:5])


if __name__ == "__main__":
    main()
