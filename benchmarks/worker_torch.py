"""One training step of diffusers' FLUX or UNet in PyTorch, eager, with its own AdamW. Needs its own environment."""
from __future__ import annotations

import os
from pathlib import Path

import common
import torch
from diffusers import FluxTransformer2DModel, UNet2DModel
from safetensors.torch import load_file


def build(name: str, weights: Path):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = UNet2DModel(**common.UNET) if name == "ddpm" else FluxTransformer2DModel(**common.FLUX)
    model.load_state_dict(load_file(weights))
    model.train()
    batch = {key: torch.from_numpy(array) for key, array in common.inputs(name).items()}
    target = batch.pop("target")
    optimizer = torch.optim.AdamW(model.parameters(), lr=common.LEARNING_RATE, betas=common.BETAS, eps=common.EPS,
                                  weight_decay=common.WEIGHT_DECAY)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = ((model(**batch, return_dict=False)[0] - target) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), common.MAX_GRAD_NORM)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    common.serve(build)
