"""What the workers of the step benchmark share: network, weights, inputs, and how they answer the driver."""
from __future__ import annotations

import json
import resource
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

BATCH, TEXT, SIDE = 2, 128, 16  # samples, text tokens, and rows and columns of image tokens


@dataclass(frozen=True)
class Workload:
    """What is measured: a network, how it is trained, and how often one call computes it."""

    network: str
    config: dict
    trains: str  # "all", "lora" (rank 16 on ``targets``) or "" for forward only
    targets: tuple[str, ...] = ()
    repeats: int = 1


FLUX = {  # FLUX.1 with 49M parameters instead of 12B
    "patch_size": 1, "in_channels": 64, "num_layers": 4, "num_single_layers": 12, "attention_head_dim": 64,
    "num_attention_heads": 6, "joint_attention_dim": 512, "pooled_projection_dim": 256,
    "axes_dims_rope": (16, 24, 24), "guidance_embeds": True,
}
FLUX2 = {  # FLUX.2 klein with 26M
    "patch_size": 1, "in_channels": 128, "num_layers": 2, "num_single_layers": 8, "attention_head_dim": 64,
    "num_attention_heads": 6, "joint_attention_dim": 512, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": (16, 16, 16, 16), "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": False,
}
QWEN = {  # Qwen-Image with 43M instead of 20B
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 8, "attention_head_dim": 64,
    "num_attention_heads": 6, "joint_attention_dim": 512, "guidance_embeds": False, "axes_dims_rope": (16, 24, 24),
}
SD3 = {  # Stable Diffusion 3.5 with 44M
    "sample_size": 2 * SIDE, "patch_size": 2, "in_channels": 16, "num_layers": 8, "attention_head_dim": 64,
    "num_attention_heads": 6, "joint_attention_dim": 512, "caption_projection_dim": 384, "pooled_projection_dim": 256,
    "out_channels": 16, "pos_embed_max_size": 24, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}
SDXL = {  # Stable Diffusion XL with 42M instead of 2.6B
    "sample_size": 2 * SIDE, "in_channels": 4, "out_channels": 4, "block_out_channels": (64, 128, 256),
    "layers_per_block": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 4), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 512,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 64, "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 256 + 6 * 64,
}
Z_IMAGE = {  # Z-Image with 27M instead of 6.2B
    "in_channels": 16, "dim": 384, "n_layers": 8, "n_refiner_layers": 1, "n_heads": 6, "n_kv_heads": 6,
    "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 512, "rope_theta": 256.0, "t_scale": 1000.0,
    "axes_dims": (16, 24, 24), "axes_lens": (512, 64, 64), "all_patch_size": (2,), "all_f_patch_size": (1,),
}
WAN = {  # Wan 2.1 T2V with 24M instead of 1.4B
    "patch_size": (1, 2, 2), "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
    "text_dim": 512, "freq_dim": 256, "ffn_dim": 1536, "num_layers": 8, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}
UNET = {  # of examples/unconditional, twice as wide: 1.1M parameters
    "sample_size": 32, "layers_per_block": 1, "block_out_channels": (32, 64, 64), "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}
VAE = {  # the autoencoder of FLUX.1, a quarter as wide: 5M parameters
    "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (32, 64, 128, 128), "layers_per_block": 2,
    "latent_channels": 16, "norm_num_groups": 32, "use_quant_conv": False, "use_post_quant_conv": False,
}
JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
WORKLOADS = {
    "flux": Workload("flux", FLUX, "all"),
    "flux_lora": Workload("flux", FLUX, "lora", JOINT),
    "qwen_image_lora": Workload("qwen_image", QWEN, "lora", JOINT),
    "flux2_lora": Workload("flux2", FLUX2, "lora", (*JOINT, "to_qkv_mlp_proj")),
    "sd3": Workload("sd3", SD3, "all"),
    "sdxl_lora": Workload("sdxl", SDXL, "lora", JOINT[:4]),
    "z_image_lora": Workload("z_image", Z_IMAGE, "lora", JOINT[:4]),
    "wan_lora": Workload("wan", WAN, "lora", JOINT[:4]),
    "ddpm": Workload("ddpm", UNET, "all"),
    "vae_encode": Workload("vae", VAE, ""),
    "sampling": Workload("flux", FLUX, "", repeats=20),
}
RANK = 16
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, (0.9, 0.999), 1e-8, 1e-2, 1.0


def random_weight(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a network in the middle of training: no zeros that would hide half of the gradients."""
    values = generator.standard_normal(shape)
    if len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.02 * values
    return values.astype(np.float32)


def lora(layer: str, out_features: int, in_features: int) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r] of a layer, the same for every contender: no zeros, as in the middle of training."""
    generator = np.random.default_rng(zlib.crc32(layer.encode()))
    a = generator.standard_normal((RANK, in_features)) * in_features**-0.5
    return a.astype(np.float32), (generator.standard_normal((out_features, RANK)) * 0.01).astype(np.float32)


def inputs(network: str) -> dict[str, np.ndarray]:
    """The batch, by the names of the arguments of diffusers' network, and last ``target``."""
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    if network == "ddpm":
        return {"sample": normal(16, 3, 32, 32), "timestep": generator.integers(0, 1000, 16),
                "target": normal(16, 3, 32, 32)}
    if network == "vae":
        return {"x": normal(BATCH, 3, 256, 256)}
    text, sigma, tokens = normal(BATCH, TEXT, 512), np.array([0.5, 0.3], np.float32), SIDE * SIDE
    if network == "sd3":
        return {"hidden_states": normal(BATCH, 16, 2 * SIDE, 2 * SIDE), "encoder_hidden_states": text,
                "pooled_projections": normal(BATCH, 256), "timestep": 1000 * sigma,
                "target": normal(BATCH, 16, 2 * SIDE, 2 * SIDE)}
    if network == "sdxl":
        sizes = np.tile(np.array([512, 512, 0, 64, 256, 256], np.float32), (BATCH, 1))
        return {"sample": normal(BATCH, 4, 2 * SIDE, 2 * SIDE), "timestep": np.array([500, 300]),
                "encoder_hidden_states": text, "text_embeds": normal(BATCH, 256), "time_ids": sizes,
                "target": normal(BATCH, 4, 2 * SIDE, 2 * SIDE)}
    if network == "z_image":
        return {"x": normal(BATCH, 16, 2 * SIDE, 2 * SIDE), "t": sigma, "cap_feats": text,
                "target": normal(BATCH, 16, 2 * SIDE, 2 * SIDE)}
    if network == "wan":  # a film of 5 frames, 2 of latents
        return {"hidden_states": normal(BATCH, 16, 2, 2 * SIDE, 2 * SIDE), "timestep": sigma,
                "encoder_hidden_states": text, "target": normal(BATCH, 16, 2, 2 * SIDE, 2 * SIDE)}
    if network == "qwen_image":
        return {"hidden_states": normal(BATCH, tokens, 64), "timestep": sigma, "encoder_hidden_states": text,
                "target": normal(BATCH, tokens, 64)}
    if network == "flux2":
        return {"hidden_states": normal(BATCH, tokens, 128), "timestep": sigma, "encoder_hidden_states": text,
                "target": normal(BATCH, tokens, 128)}
    image_ids = np.zeros((SIDE, SIDE, 3), np.float32)
    image_ids[..., 1], image_ids[..., 2] = np.mgrid[:SIDE, :SIDE]
    return {
        "hidden_states": normal(BATCH, tokens, FLUX["in_channels"]), "timestep": sigma,
        "guidance": np.ones(BATCH, np.float32), "pooled_projections": normal(BATCH, FLUX["pooled_projection_dim"]),
        "encoder_hidden_states": text,
        "txt_ids": np.zeros((TEXT, 3), np.float32), "img_ids": image_ids.reshape(tokens, 3),
        "target": normal(BATCH, tokens, FLUX["in_channels"]),
    }


def forward(predict: Callable[..., Any], batch: tuple[Any, ...], tensor: Callable[[np.ndarray], Any],
            repeats: int) -> float:
    """One call of ``predict``, or a sample by that many Euler steps from the first of ``batch`` at sigma 1; the mean
    square of what comes out. The second of ``batch`` is sigma; ``tensor`` makes a Tensor of an array."""
    if repeats == 1:
        return float((predict(*batch) ** 2).mean())
    x, sigmas = batch[0], np.linspace(1, 0, repeats + 1, dtype=np.float32)
    for sigma, following in pairwise(sigmas):
        velocity = predict(x, tensor(np.full(BATCH, sigma, np.float32)), *batch[2:-1])
        x = x + velocity * float(following - sigma)
    return float((x**2).mean())


def serve(build: Callable[[Workload, Path], Callable[[], float]]) -> None:
    """Build a step of the workload and the weights file in ``sys.argv[1:3]``; then make one for every line that comes.

    Answers each step, the first included, with one line of JSON: loss, seconds, seconds of CPU time,
    peak resident gigabytes.
    """
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries say does not get between the answers
    step = build(WORKLOADS[sys.argv[1]], Path(sys.argv[2]))
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        loss = step()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answer.write(json.dumps({"loss": loss, "seconds": seconds, "cpu_seconds": cpu, "peak_gb": peak}) + "\n")
        answer.flush()
