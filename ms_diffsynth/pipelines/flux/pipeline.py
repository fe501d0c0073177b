"""FLUX.1: CLIP and T5 text encoders, a VAE with 16 channels, and a transformer of joint and single blocks."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ms_diffsynth.diffusion.schedule import FLUX_DEV, FLUX_SCHNELL, FlowMatchSettings, diffsynth_flux
from ms_diffsynth.formats.interchange import read_table
from ms_diffsynth.models import FLAG, Component, blocks, columns, has
from ms_diffsynth.pipelines.flux import units
from ms_diffsynth.pipelines.flux.denoise import Denoise
from ms_diffsynth.pipelines.flux.published import PUBLISHED
from ms_diffsynth.pipelines.shared import autoencoder_kl
from ms_diffsynth.pipelines.shared.autoencoder_kl import AUTOENCODER_KL, Decode, EncodeImage
from ms_diffsynth.pipelines.shared.control import TakesControl
from ms_diffsynth.pipelines.shared.edit import LoadEditImage
from ms_diffsynth.pipelines.shared.image import ImagePipeline
from ms_diffsynth.pipelines.shared.t5 import weight_dtype
from ms_diffsynth.pipelines.shared.text import (
    CLIP_L,
    CLIP_TOKENIZER,
    CLIP_TOLD_BY,
    T5_TOKENIZER,
    T5_TOLD_BY,
    T5_XXL,
    build_clip,
    build_clip_tokenizer,
    build_t5,
    build_t5_tokenizer,
)
from ms_diffsynth.pipelines.shared.vae_units import LoadPixels


def _build_dit(config: dict[str, Any]):
    from ms_diffsynth.pipelines.flux.transformer import build_transformer  # imports mindone's networks

    return build_transformer(config)


def _build_controlnet(config: dict[str, Any]):
    from ms_diffsynth.pipelines.flux.controlnet import build_controlnet  # imports mindone's networks

    return build_controlnet(config)


COMPONENTS = (
    Component(name="tokenizer_1", folder="tokenizer", build=build_clip_tokenizer, default_folder=CLIP_TOKENIZER,
              libraries=("transformers", "ftfy")),
    Component(name="tokenizer_2", folder="tokenizer_2", build=build_t5_tokenizer, default_folder=T5_TOKENIZER,
              libraries=("transformers", "sentencepiece")),
    Component(name="text_encoder_1", folder="text_encoder", class_name="CLIPTextModel", build=build_clip,
              ignored=("text_model.embeddings.position_ids", "text_projection.", "logit_scale"),
              known={"CLIP-L": CLIP_L}, told_by=CLIP_TOLD_BY),
    Component(name="text_encoder_2", folder="text_encoder_2", class_name="T5EncoderModel", build=build_t5,
              ignored=("encoder.embed_tokens.weight",), weight_dtype=weight_dtype, known={"T5 v1.1 XXL": T5_XXL},
              told_by=T5_TOLD_BY),
    replace(AUTOENCODER_KL, known={name: configs["vae"] for name, configs in PUBLISHED.items()}),
    Component(name="dit", folder="transformer", class_name="FluxTransformer2DModel", build=_build_dit,
              reads={"guidance_embeds": FLAG}, known={name: configs["dit"] for name, configs in PUBLISHED.items()},
              told_by={"num_layers": blocks("transformer_blocks."), "in_channels": columns("x_embedder.weight"),
                       "num_single_layers": blocks("single_transformer_blocks."),
                       "joint_attention_dim": columns("context_embedder.weight"),
                       "guidance_embeds": has("time_text_embed.guidance_embedder.linear_1.weight")}),
)

CONTROLNET = Component(name="controlnet", folder="controlnet", class_name="FluxControlNetModel",
                       build=_build_controlnet)

# The linear layers diffusers' FLUX.1 DreamBooth trainer adapts: attention and feed-forward of both block kinds.
LORA_TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)


class FluxImagePipeline(TakesControl, ImagePipeline):
    """Text to image with FLUX.1, editing with FLUX.1-Kontext, control images by a ControlNet or FLUX.1-Fill, -Canny and
    -Depth, and the units their training reuses.

    Attributes:
        max_sequence_length: T5 tokens a prompt is padded or cut to (512 for dev, 256 for schnell).
    """

    components, further = COMPONENTS, (CONTROLNET,)
    lora_target_modules = LORA_TARGET_MODULES
    diffusers_class = "FluxPipeline"
    interchange = read_table(Path(__file__).with_name("interchange.yaml"))
    fusible = ("encode_image",)
    widths = {"latents": ("in_channels", -3, 4), "prompt_embeds": ("joint_attention_dim", -1, 1),
              "pooled_prompt_embeds": ("pooled_projection_dim", -1, 1)}
    prepare_settings = ("max_sequence_length", "edit_max_pixels", "control_mode", "control_form")
    controlnet_lists = {"num_layers": ("transformer_blocks", "controlnet_blocks", 4),
                        "num_single_layers": ("single_transformer_blocks", "controlnet_single_blocks", 10)}
    controlnet_settings = ("patch_size", "in_channels", "attention_head_dim", "num_attention_heads",
                           "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope")
    max_sequence_length = 512
    sft_grid = diffsynth_flux(3.0).training

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), LoadPixels(), EncodeImage(self.dtype)]

    def build_optional_units(self) -> dict[str, list]:
        return {"edit_image": [LoadEditImage(), units.EncodeEditImage()], **self.control_units(EncodeImage)}

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype, self.store)

    def build_decode(self) -> Decode:
        return Decode(self.dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return autoencoder_kl.latent_shape(self.config("vae"), (height, width))

    def published_scheduler(self) -> FlowMatchSettings:
        return FLUX_DEV if self.takes_guidance else FLUX_SCHNELL

    @property
    def control_channels(self) -> int:
        config = self.config("dit")
        return config["in_channels"] - (config.get("out_channels") or config["in_channels"])

    @property
    def reads_mask(self) -> bool:
        latents = self.config("dit").get("out_channels")
        return super().reads_mask or self.control_channels > (latents or 0)

    @property
    def takes_guidance(self) -> bool:
        """True for dev, False for schnell; True where only prompts are encoded and the transformer is not given."""
        return not self.store.has_config("dit") or bool(self.config("dit")["guidance_embeds"])
