"""Stable Diffusion 3 and 3.5: text encoders CLIP-L, CLIP-G and T5, a VAE with 16 channels, joint attention."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from ms_diffsynth.diffusion.schedule import FlowMatchSettings, Grid, diffsynth_flux, sampling_sigmas
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.formats.interchange import read_table
from ms_diffsynth.models import SIZE, Component, Shapes, arguments, blocks, columns, read_config, rows
from ms_diffsynth.pipeline import SamplingDefaults
from ms_diffsynth.pipelines.sd3 import units
from ms_diffsynth.pipelines.sd3.denoise import Denoise
from ms_diffsynth.pipelines.sd3.published import PUBLISHED
from ms_diffsynth.pipelines.shared import autoencoder_kl
from ms_diffsynth.pipelines.shared.autoencoder_kl import AUTOENCODER_KL, Decode, EncodeImage
from ms_diffsynth.pipelines.shared.image import ImagePipeline
from ms_diffsynth.pipelines.shared.t5 import weight_dtype
from ms_diffsynth.pipelines.shared.text import (
    CLIP_G,
    CLIP_G_TOKENIZER,
    CLIP_L,
    CLIP_TOKENIZER,
    CLIP_TOLD_BY,
    T5_TOKENIZER,
    T5_TOLD_BY,
    T5_XXL,
    build_clip_g,
    build_clip_tokenizer,
    build_clip_with_projection,
    build_t5,
    build_t5_tokenizer,
)
from ms_diffsynth.pipelines.shared.vae_units import LoadPixels


def _build_dit(config: dict[str, Any]):
    from ms_diffsynth.pipelines.sd3.transformer import SD3Transformer  # imports mindone's networks

    return SD3Transformer(**arguments(SD3Transformer, config))


def _dual_blocks(shapes: Shapes) -> list[int] | None:
    found = sorted(int(name.split(".")[1]) for name in shapes if name.endswith(".attn2.to_q.weight"))
    return found or None


def _identity(shapes: Shapes) -> np.ndarray:
    """CLIP-L's projection, which Stable Diffusion 3's files are without. Source: diffusers 0.39, loaders."""
    return np.eye(shapes["text_model.final_layer_norm.weight"][0], dtype=np.float32)


_CLIP = {"class_name": "CLIPTextModelWithProjection", "ignored": ("text_model.embeddings.position_ids",),
         "told_by": CLIP_TOLD_BY}
_NORM = "transformer_blocks.0.attn.norm_q.weight"
COMPONENTS = (
    Component(name="tokenizer_1", folder="tokenizer", build=build_clip_tokenizer, default_folder=CLIP_TOKENIZER,
              libraries=("transformers", "ftfy")),
    Component(name="tokenizer_2", folder="tokenizer_2", build=build_clip_tokenizer,
              default_folder=CLIP_G_TOKENIZER, libraries=("transformers", "ftfy")),
    Component(name="tokenizer_3", folder="tokenizer_3", build=build_t5_tokenizer, default_folder=T5_TOKENIZER,
              libraries=("transformers", "sentencepiece")),
    Component(name="text_encoder_1", folder="text_encoder", build=build_clip_with_projection,
              known={"CLIP-L": CLIP_L | {"architectures": ["CLIPTextModelWithProjection"]}},
              left_out={"text_projection.weight": _identity}, **_CLIP),
    Component(name="text_encoder_2", folder="text_encoder_2", build=build_clip_g,
              known={"CLIP-G": CLIP_G | {"architectures": ["CLIPTextModelWithProjection"]}}, **_CLIP),
    Component(name="text_encoder_3", folder="text_encoder_3", class_name="T5EncoderModel", build=build_t5,
              ignored=("encoder.embed_tokens.weight",), weight_dtype=weight_dtype, known={"T5 v1.1 XXL": T5_XXL},
              told_by=T5_TOLD_BY),
    replace(AUTOENCODER_KL, known={name: configs["vae"] for name, configs in PUBLISHED.items()}),
    Component(name="dit", folder="transformer", class_name="SD3Transformer2DModel", build=_build_dit,
              reads={"pos_embed_max_size": SIZE, "patch_size": SIZE, "joint_attention_dim": SIZE},
              known={name: configs["dit"] for name, configs in PUBLISHED.items()},
              told_by={"num_layers": blocks("transformer_blocks."), "dual_attention_layers": _dual_blocks,
                       "caption_projection_dim": rows("context_embedder.weight"),
                       "joint_attention_dim": columns("context_embedder.weight"),
                       "qk_norm": lambda shapes: "rms_norm" if _NORM in shapes else None,
                       "pos_embed_max_size": lambda shapes: isqrt(columns("pos_embed.pos_embed")(shapes) or 0)}),
)

# What diffusers' train_dreambooth_lora_sd3.py adapts
LORA_TARGET_MODULES = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                       "attn.add_v_proj", "attn.to_add_out")

SCHEDULER = FlowMatchSettings(shift=3.0)  # as published with Stable Diffusion 3 and 3.5


class SD3ImagePipeline(ImagePipeline):
    """Text to image with Stable Diffusion 3 and 3.5, and the units its training reuses.

    Attributes:
        max_sequence_length: T5 tokens a prompt is padded or cut to; the 77 of CLIP come on top.
    """

    components = COMPONENTS
    lora_target_modules = LORA_TARGET_MODULES
    diffusers_class = "StableDiffusion3Pipeline"
    interchange = read_table(Path(__file__).with_name("interchange.yaml"))
    fusible = ("encode_image",)
    widths = {"latents": ("in_channels", -3, 1), "prompt_embeds": ("joint_attention_dim", -1, 1),
              "pooled_prompt_embeds": ("pooled_projection_dim", -1, 1)}
    prepare_settings = ("max_sequence_length",)
    max_sequence_length = 256
    sampling = SamplingDefaults(cfg_scale=7.0)
    sft_grid = diffsynth_flux(3.0).training

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), LoadPixels(), EncodeImage(self.dtype)]

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def build_decode(self) -> Decode:
        return Decode(self.dtype)

    @property
    def has_t5(self) -> bool:
        """False where the model is without T5: ``models["text_encoder_3"]`` is None, or its model_index.json says so.

        A model whose T5 is only not given has one: it is missed when a prompt is encoded.
        """
        if "text_encoder_3" in self.models:
            return self.models["text_encoder_3"] is not None
        if "text_encoder_3" in self.sources or "text_encoder_1" not in self.sources:
            return True
        folder = self.sources["text_encoder_1"].folder.parent
        is_listed = (folder / "model_index.json").is_file()
        return not is_listed or read_config(folder, "model_index.json").get("text_encoder_3") != [None, None]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of one sample's latents.

        Raises: ConfigError for sides that the transformer, where it is here, has no positions for.
        """
        vae = self.config("vae")
        if "dit" in self.models or "dit" in self.sources:
            dit = self.config("dit")
            most = dit["pos_embed_max_size"] * dit["patch_size"] * autoencoder_kl.scale_factor(vae)
            if max(height, width) > most:
                raise ConfigError(f"height={height}, width={width}: this transformer has positions for sides of at "
                                  f"most {most} pixels (pos_embed_max_size={dit['pos_embed_max_size']}). Make the "
                                  "image smaller.")
        return autoencoder_kl.latent_shape(vae, (height, width))

    def published_scheduler(self) -> FlowMatchSettings:
        return SCHEDULER

    def sampling_sigmas(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> np.ndarray:
        """Noise levels to integrate over: float32 [num_inference_steps + 1], decreasing, ends with 0.

        Even steps from 1 to the least sigma of training, which is shifted already, and then shifted: with shift 3 the
        28th of 28 steps is at 0.0089, where FLUX.1's would be at 0.1.

        Source: diffusers 0.39, StableDiffusion3Pipeline.__call__, which gives its scheduler no sigmas.
        """
        schedule = self.scheduler_settings.schedule(self.dynamic_mu)
        steps = partial(np.linspace, 1000.0, 1000.0 * float(schedule.sigmas[-1]))  # in float64, as diffusers'
        grid = Grid(lambda n: steps(n) / 1000, schedule.inference.warps)
        return sampling_sigmas(num_inference_steps, grid, self.image_tokens(latent_shape))
