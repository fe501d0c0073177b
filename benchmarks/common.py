"""What the workers of the step benchmark share: network, weights, inputs, and how they answer the driver."""
from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

FLUX = {  # FLUX.1 with 49M parameters instead of 12B
    "patch_size": 1, "in_channels": 64, "num_layers": 4, "num_single_layers": 12, "attention_head_dim": 64,
    "num_attention_heads": 6, "joint_attention_dim": 512, "pooled_projection_dim": 256,
    "axes_dims_rope": (16, 24, 24), "guidance_embeds": True,
}
UNET = {  # of examples/unconditional, twice as wide: 1.1M parameters
    "sample_size": 32, "layers_per_block": 1, "block_out_channels": (32, 64, 64), "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, (0.9, 0.999), 1e-8, 1e-2, 1.0


def random_weight(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a network in the middle of training: no zeros that would hide half of the gradients."""
    values = generator.standard_normal(shape)
    if len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.02 * values
    return values.astype(np.float32)


def inputs(model: str) -> dict[str, np.ndarray]:
    """The batch, by the names of the network's arguments, and ``target``."""
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    if model == "ddpm":
        return {"sample": normal(16, 3, 32, 32), "timestep": generator.integers(0, 1000, 16),
                "target": normal(16, 3, 32, 32)}
    batch, side, text_tokens = 2, 16, 128
    image_ids = np.zeros((side, side, 3), np.float32)
    image_ids[..., 1], image_ids[..., 2] = np.mgrid[:side, :side]
    tokens = side * side
    return {
        "hidden_states": normal(batch, tokens, FLUX["in_channels"]), "timestep": np.array([0.5, 0.3], np.float32),
        "guidance": np.ones(batch, np.float32), "pooled_projections": normal(batch, FLUX["pooled_projection_dim"]),
        "encoder_hidden_states": normal(batch, text_tokens, FLUX["joint_attention_dim"]),
        "txt_ids": np.zeros((text_tokens, 3), np.float32), "img_ids": image_ids.reshape(tokens, 3),
        "target": normal(batch, tokens, FLUX["in_channels"]),
    }


def serve(build: Callable[[str, Path], Callable[[], float]]) -> None:
    """Build a step of the model and the weights file in ``sys.argv[1:3]``; then make one for every line that comes in.

    Answers each step, the first included, with one line of JSON: loss, seconds, seconds of CPU time,
    peak resident gigabytes.
    """
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries say does not get between the answers
    step = build(sys.argv[1], Path(sys.argv[2]))
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        loss = step()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answer.write(json.dumps({"loss": loss, "seconds": seconds, "cpu_seconds": cpu, "peak_gb": peak}) + "\n")
        answer.flush()
