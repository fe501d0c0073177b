"""Writes ``optimizers_torch.npz`` beside it: what the PyTorch implementations of Prodigy and Adafactor compute.

    python optimizers_torch.py     torch 2.13.0 (CPU), transformers 4.57.1, prodigyopt 1.1.2

A matrix, a vector and a tensor of three dimensions, 60 steps of noisy gradients of |w - goal|^2 / 2, which are recorded
of each case, then clipped to norm 2; a learning rate that begins at 0. Kept are the weights after steps 1, 2, 10 and
60, and Prodigy's d after every step.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from prodigyopt import Prodigy
from transformers.optimization import Adafactor

SHAPES, STEPS, KEPT = [(3, 4), (5,), (2, 3, 4)], 60, (0, 1, 9, 59)
ADAFACTOR = {"relative_step": False, "warmup_init": False}
CASES = {
    "prodigy.default": (Prodigy, {"lr": 1.0}),
    "prodigy.other": (Prodigy, {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.1, "d_coef": 2.0, "d0": 1e-3,
                                "use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.2}),
    "adafactor.default": (Adafactor, {"lr": 1e-2, "scale_parameter": False, **ADAFACTOR}),
    "adafactor.other": (Adafactor, {"lr": 5e-2, "scale_parameter": True, "beta1": 0.9, "weight_decay": 0.1,
                                    "decay_rate": -0.7, "clip_threshold": 0.5, "eps": (1e-20, 1e-2), **ADAFACTOR}),
}


def main() -> None:
    rng = np.random.default_rng(11)
    found = {f"start.{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(SHAPES)}
    goal = [torch.tensor(2 * rng.standard_normal(shape).astype(np.float32)) for shape in SHAPES]
    for case, (kind, settings) in CASES.items():
        weights = [torch.nn.Parameter(torch.tensor(found[f"start.{i}"])) for i in range(len(SHAPES))]
        optimizer, kept, distances = kind(weights, **settings), [], []
        gradients = [[] for _ in SHAPES]
        for k in range(STEPS):
            optimizer.param_groups[0]["lr"] = settings["lr"] * min(k / 4, 1.0)
            for i, weight in enumerate(weights):
                noise = 0.3 * rng.standard_normal(SHAPES[i]).astype(np.float32)
                weight.grad = weight.detach() - goal[i] + torch.tensor(noise)
                gradients[i].append(weight.grad.numpy().copy())
            torch.nn.utils.clip_grad_norm_(weights, 2.0)
            optimizer.step()
            distances.append(optimizer.param_groups[0].get("d", 0.0))
            if k in KEPT:
                kept.append([w.detach().numpy().copy() for w in weights])
        for i in range(len(SHAPES)):
            found[f"{case}.{i}"] = np.stack([w[i] for w in kept])
            found[f"{case}.gradients.{i}"] = np.stack(gradients[i])
        if kind is Prodigy:
            found[f"{case}.d"] = np.array(distances, np.float64)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
