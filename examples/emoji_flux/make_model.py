"""Write the models that training starts from: an untrained VAE, and FLUX.1's other networks around a trained one.

    python examples/emoji_flux/make_model.py vae models/emoji-vae
    ms-diffsynth train examples/emoji_flux/vae_crops.yaml      # and vae.yaml
    python examples/emoji_flux/make_model.py base models/emoji-flux --images data/emoji --vae runs/emoji-vae/vae
    ms-diffsynth train examples/emoji_flux/base.yaml

The architecture is that of FLUX.1, each network made small: a VAE of 8 x 8 pixels and 16 channels, CLIP and T5 with cut
tokenizers, and a transformer of one joint and five single blocks. Latents are shifted and scaled to mean 0 and standard
deviation 1 over the training images; the VAE's config.json says by how much.
"""
from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import cut_tokenizers
import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import Draws, runtime
from ms_diffsynth.data.images import to_pixels
from ms_diffsynth.diffusion.schedule import FLUX_SCHNELL
from ms_diffsynth.formats.weights import open_checkpoint, save_sharded
from ms_diffsynth.models import SAMPLING_FILE, SCHEDULER_FILE
from ms_diffsynth.nn.names import assign, torch_shapes
from ms_diffsynth.pipelines.flux.pipeline import COMPONENTS
from ms_diffsynth.pipelines.shared.autoencoder_kl import build_autoencoder_kl
from ms_diffsynth.pipelines.shared.text import build_clip_tokenizer, build_t5_tokenizer
from ms_diffsynth.pipelines.shared.tiny import random_weights

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 96], "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 8,
    "sample_size": 64, "scaling_factor": 1.0, "shift_factor": 0.0, "use_quant_conv": False,
    "use_post_quant_conv": False}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": 64}
T5: dict[str, Any] = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2,
    "num_heads": 4, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": None,
    "num_layers": 1, "num_single_layers": 5, "attention_head_dim": 64, "num_attention_heads": 3,
    "joint_attention_dim": T5["d_model"], "pooled_projection_dim": CLIP["hidden_size"], "guidance_embeds": False,
    "axes_dims_rope": [16, 24, 24]}
SAMPLING = {"height": 64, "width": 64, "max_sequence_length": 16, "cfg_scale": 2.0, "num_inference_steps": 20}


def vae_weights(shapes: dict[str, tuple[int, ...]], draws: Draws) -> dict[str, np.ndarray]:
    """As PyTorch's layers begin: uniform within 1 / sqrt(fan-in), biases too; norms are one and zero."""
    weights = {}
    for k, (name, shape) in enumerate(shapes.items()):
        matrix = shapes[name.rpartition(".")[0] + ".weight"]
        if len(matrix) == 1:
            weights[name] = np.full(shape, name.endswith("weight"), np.float32)
        else:
            bound = 1 / math.sqrt(math.prod(matrix[1:]))
            weights[name] = np.float32((2 * draws.uniform("vae", np.array([k]), shape)[0] - 1) * bound)
    return weights


def t5_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From variance 1 / fan-in: queries small, for T5's scores are not divided; embeddings, and what is added to them,
    small too. An optimizer that moves every weight by about as much then teaches a word that comes in two captions of
    2,000: with T5's own embeddings of variance 1 it had moved by 3 % after 4,000 steps.
    """
    def factor(name: str) -> float:
        if name.endswith(("shared.weight", "embed_tokens.weight")):
            return 0.05 * math.sqrt(T5["d_model"])
        if name.endswith("relative_attention_bias.weight"):
            return math.sqrt(T5["num_heads"] / T5["d_model"])
        if name.endswith((".o.weight", ".wo.weight")):
            return 0.1
        return 1 / math.sqrt(T5["d_kv"]) if name.endswith(".q.weight") else 1.0

    return {name: np.float32(array * factor(name)) for name, array in weights.items()}


def clip_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same of CLIP: embeddings of standard deviation 0.02, as its authors began."""
    def factor(name: str) -> float:
        if name.endswith("embedding.weight"):
            return 0.02 * math.sqrt(CLIP["hidden_size"])
        return 0.2 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0

    return {name: np.float32(array * factor(name)) for name, array in weights.items()}


def transformer_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Linear layers as Xavier and Bengio 2010; nothing is modulated at the beginning, half of every branch is added,
    and the velocity is zero.
    """
    changed, width = {}, TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    for name, array in weights.items():
        is_modulation = name.split(".")[-2] == "linear" and "norm" in name
        if name.startswith("proj_out.") or is_modulation:
            array = np.zeros_like(array)
        elif array.ndim == 2:
            array = np.float32(array * math.sqrt(2 * array.shape[1] / sum(array.shape)))
        if is_modulation and name.endswith("bias") and not name.startswith("norm_out"):
            parts = array.reshape(-1, width)  # shift, scale, gate; in a joint block once for each of its two branches
            parts[2::3] = 0.5
            array = parts.reshape(-1)
        changed[name] = array
    return changed


def measure(vae: Any, images: Path) -> tuple[float, float]:
    """Mean and standard deviation of the latents of the training images."""
    with (images / "train.csv").open(encoding="utf-8", newline="") as file:
        names = [row["image"] for row in csv.DictReader(file)]
    latents = []
    for start in range(0, len(names), 32):
        batch = np.stack([to_pixels(Image.open(images / name)) for name in names[start : start + 32]])
        latents.append(np.split(vae.encode(Tensor(batch))[0].asnumpy(), 2, 1)[0])
    values = np.concatenate(latents).astype(np.float64)
    print(f"latents {values.shape}: mean {values.mean():.4f}, standard deviation {values.std():.4f}; of the channels "
          f"{values.std((0, 2, 3)).min():.3f} to {values.std((0, 2, 3)).max():.3f}")
    return float(values.mean()), float(values.std())


def write_base(folder: Path, images: Path, trained: Path, seed: int) -> None:
    cut_tokenizers.main(folder, images)
    vae = build_autoencoder_kl(VAE)
    file = open_checkpoint(trained / "diffusion_pytorch_model.safetensors")
    weights = {name: file[name] for name in torch_shapes(vae)}
    assign(vae, weights.items())
    mean, deviation = measure(vae, images)
    save_sharded(folder / "vae", weights, config={**VAE, "shift_factor": mean, "scaling_factor": 1 / deviation},
                 replace=True)
    made = {"text_encoder_1": ({**CLIP, "vocab_size": len(build_clip_tokenizer(folder / "tokenizer"))}, clip_weights),
            "text_encoder_2": ({**T5, "vocab_size": len(build_t5_tokenizer(folder / "tokenizer_2"))}, t5_weights),
            "dit": (TRANSFORMER, transformer_weights)}
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": "0.35.2",
                             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                             "tokenizer": ["transformers", "CLIPTokenizer"],
                             "tokenizer_2": ["transformers", "T5Tokenizer"], "vae": ["diffusers", "AutoencoderKL"]}
    for component in (c for c in COMPONENTS if c.name in made):
        config, scaled = made[component.name]
        weights = scaled(random_weights(component.build(config), Draws(seed), component.name))
        is_encoder = "architectures" in config
        save_sharded(folder / component.folder, weights, stem="model" if is_encoder else "diffusion_pytorch_model",
                     config=config, replace=True)
        index[component.folder] = ["transformers" if is_encoder else "diffusers", component.class_name]
        print(f"{component.folder}: {sum(w.size for w in weights.values()):,} weights")
    (folder / "scheduler").mkdir(exist_ok=True)
    for name, content in ((f"scheduler/{SCHEDULER_FILE}", FLUX_SCHNELL.to_config()), ("model_index.json", index),
                          (SAMPLING_FILE, SAMPLING)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("vae", "base"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, help="base: the folder that make_images.py wrote")
    parser.add_argument("--vae", type=Path, help="base: the folder of the trained VAE")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    runtime.configure("graph")
    if arguments.what == "vae":
        save_sharded(arguments.folder / "vae", vae_weights(torch_shapes(build_autoencoder_kl(VAE)),
                                                           Draws(arguments.seed)), config=VAE)
    else:
        write_base(arguments.folder, arguments.images, arguments.vae, arguments.seed)
