"""FLUX.2: Qwen3 (klein) or Mistral (dev) as text encoder, a VAE with 32 channels in 2x2 patches, and a transformer."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindspore import Tensor
from PIL import Image

from ms_diffsynth.diffusion.schedule import FLUX_DEV, FlowMatchSettings, Grid, TorchExponentialShift, to_one_nth
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.interchange import read_table
from ms_diffsynth.models import (
    COUNT,
    FLAG,
    SCALE,
    SIZE,
    SIZES,
    Component,
    arguments,
    blocks,
    columns,
    has,
    optional,
    rows,
)
from ms_diffsynth.pipeline import SamplingDefaults
from ms_diffsynth.pipelines.flux2 import units
from ms_diffsynth.pipelines.flux2.denoise import Denoise
from ms_diffsynth.pipelines.flux2.published import PUBLISHED
from ms_diffsynth.pipelines.shared.autoencoder_kl import scale_factor
from ms_diffsynth.pipelines.shared.edit import LoadEditImage
from ms_diffsynth.pipelines.shared.image import ImagePipeline
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.text import QWEN3, QWEN3_TOLD_BY, QWEN_TOKENIZER, build_qwen3_tokenizer
from ms_diffsynth.pipelines.shared.vae_units import LoadPixels, with_latents

UNUSED_LAYERS = tuple(f"model.layers.{k}." for k in range(27, 36))  # of Qwen3's 36: klein stops at three quarters
# how the names of a Mistral3 begin: in FLUX.2-dev's files, inside transformers since 4.52, and in ComfyUI's file
DEV_BEGINS = ("language_model.model", "model.language_model", "model")
UNUSED_OF_DEV = (
    *(f"{model}.{part}." for model in DEV_BEGINS
      for part in ("norm", *(f"layers.{k}" for k in range(30, 40)))),  # of Mistral's 40 layers
    "language_model.lm_head.", "vision_tower.", "multi_modal_projector.",
    "lm_head.", "model.vision_tower.", "model.multi_modal_projector.",
    "tekken_model",  # the tokenizer
)


def _of_dev(name: str) -> tuple[str, ...]:
    """A tensor of dev's text encoder under each of its names."""
    return tuple(f"{begin}.{name}" for begin in DEV_BEGINS)


def _build_dit(config: dict[str, Any]):
    from ms_diffsynth.pipelines.flux2.transformer import build_transformer  # imports mindone's networks

    return build_transformer(config)


def _build_vae(config: dict[str, Any]):
    with quiet_imports():
        from mindone.diffusers import AutoencoderKLFlux2

    vae = with_latents(AutoencoderKLFlux2, units.EncodeImage, units.Decode, **units.FIXED)(
        **arguments(AutoencoderKLFlux2, config, {"decoder_block_out_channels": None}))
    del vae.bn.num_batches_tracked  # a count of training steps, which nothing reads
    return vae


def _build_text_encoder(config: dict[str, Any]):
    from ms_diffsynth.pipelines.shared.language_model import quarters  # imports mindone's networks
    from ms_diffsynth.pipelines.shared.qwen3 import Qwen3TextEncoder

    return Qwen3TextEncoder(config, quarters)


def _build_dev_text_encoder(config: dict[str, Any], names: Iterable[str] = ()):
    """``names`` are those of the tensors in its files."""
    from ms_diffsynth.pipelines.flux2 import text_encoder  # imports mindone's networks

    of_begin = dict(zip(DEV_BEGINS, (text_encoder.MistralTextEncoder, text_encoder.RenamedMistralTextEncoder,
                                     text_encoder.ComfyMistralTextEncoder)))
    names = set(names)
    found = next((b for b in DEV_BEGINS if f"{b}.embed_tokens.weight" in names), DEV_BEGINS[0])
    return of_begin[found](config)


def _build_dev_tokenizer(folder: Path):
    with quiet_imports():
        from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise WeightError(f"{folder} has no tokenizer.json: expected the whole tokenizer/ folder of FLUX.2-dev. "
                          "Download it again, or name it as tokenizer_config.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise WeightError(f"{folder} has no chat template: expected FLUX.2-dev's chat_template.jinja beside "
                          "tokenizer.json. Download the whole tokenizer/ folder.")
    return tokenizer


COMPONENTS = (
    Component(name="tokenizer", folder="tokenizer", build=build_qwen3_tokenizer, default_folder=QWEN_TOKENIZER,
              libraries=("transformers",)),
    Component(name="text_encoder", folder="text_encoder", class_name="Qwen3ForCausalLM", build=_build_text_encoder,
              ignored=("lm_head.", "model.norm.", *UNUSED_LAYERS), known=QWEN3,
              told_by=QWEN3_TOLD_BY),
    Component(name="vae", folder="vae", class_name="AutoencoderKLFlux2", build=_build_vae,
              ignored=("bn.num_batches_tracked",),
              reads={"latent_channels": SIZE, "block_out_channels": SIZES, "batch_norm_eps": SCALE},
              known={name: configs["vae"] for name, configs in PUBLISHED.items()},
              told_by={"latent_channels": columns("decoder.conv_in.weight")},
              encoder=("encoder", "quant_conv")),
    Component(name="dit", folder="transformer", class_name="Flux2Transformer2DModel", build=_build_dit,
              reads={"axes_dims_rope": SIZES, "rope_theta": SCALE, "num_attention_heads": SIZE,
                     "attention_head_dim": SIZE, "num_layers": COUNT, "num_single_layers": COUNT,
                     "guidance_embeds": optional(FLAG)},
              known={name: configs["dit"] for name, configs in PUBLISHED.items()},
              told_by={"num_layers": blocks("transformer_blocks."), "in_channels": columns("x_embedder.weight"),
                       "num_single_layers": blocks("single_transformer_blocks."),
                       "joint_attention_dim": columns("context_embedder.weight"),
                       "guidance_embeds": has("time_guidance_embed.guidance_embedder.linear_1.weight")}),
)

# FLUX.2-dev's: its tokenizer does not ship with the package
DEV_TEXT_ENCODER = Component(name="text_encoder", folder="text_encoder", class_name="Mistral3ForConditionalGeneration",
                             build=_build_dev_text_encoder, build_for=_build_dev_text_encoder,
                             ignored=UNUSED_OF_DEV, known={"FLUX.2-dev": PUBLISHED["FLUX.2-dev"]["text_encoder"]},
                             told_by={"text_config.vocab_size": rows(*_of_dev("embed_tokens.weight")),
                                      "text_config.hidden_size": columns(*_of_dev("embed_tokens.weight")),
                                      "text_config.intermediate_size": rows(*_of_dev("layers.0.mlp.up_proj.weight"))},
                             unlike=("model.embed_tokens.weight", "ComfyUI's file of it ends at layer 30 of 40, and "
                                                                  "has the tokenizer in it"))
DEV_COMPONENTS = (Component(name="tokenizer", folder="tokenizer", build=_build_dev_tokenizer,
                            libraries=("transformers", "tokenizers")), DEV_TEXT_ENCODER,
                  *COMPONENTS[2:])

# What DiffSynth-Studio's FLUX.2 klein LoRA script adapts; attn.to_out is that of the single blocks
LORA_TARGET_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out",
)


def empirical_mu(seq_len: int, steps: int) -> float:
    """mu of dynamic shifting, fitted to the image's size in tokens and to the number of sampling steps.

    Source: diffusers 0.36, pipelines/flux2/pipeline_flux2.py, compute_empirical_mu.
    """
    many = 0.00016927 * seq_len + 0.45666666  # mu at 200 steps
    few = 8.73809524e-05 * seq_len + 1.89833333  # mu at 10 steps
    return many if seq_len > 4300 else many + (few - many) * (200 - steps) / 190


class Flux2ImagePipeline(ImagePipeline):
    """Text to image and image editing with FLUX.2, and the units its training reuses.

    Attributes:
        max_sequence_length: tokens a prompt in its template is padded or cut to (512).
    """

    components = COMPONENTS
    variants = (DEV_COMPONENTS,)
    lora_target_modules = LORA_TARGET_MODULES
    interchange = read_table(Path(__file__).with_name("interchange.yaml"))
    widths = {"latents": ("in_channels", -3, 1), "prompt_embeds": ("joint_attention_dim", -1, 1)}
    fusible = ("encode_image",)
    prepare_settings = ("max_sequence_length", "edit_max_pixels")
    max_sequence_length = 512
    sft_grid = Grid(to_one_nth, (TorchExponentialShift(0.8),))  # DiffSynth-Studio 2.1.12, FlowMatchScheduler("FLUX.2")
    dynamic_mu = staticmethod(empirical_mu)
    latent_patch = 1
    sampling = SamplingDefaults(embedded_guidance=4.0)

    def __call__(self, prompt: str, **options: Any) -> Image.Image:
        """Generate one image; arguments as `ImagePipeline.__call__`, and ``template_cache``, what templates say; see
        `TemplatePipeline`.
        """
        return super().__call__(prompt, **options)

    @property
    def diffusers_class(self) -> str:
        """Its name there: klein's or dev's."""
        return "Flux2Pipeline" if DEV_TEXT_ENCODER in self.store.components else "Flux2KleinPipeline"

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), LoadPixels(), units.EncodeImage(self.dtype)]

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def build_decode(self) -> units.Decode:
        return units.Decode(self.dtype)

    def build_optional_units(self) -> dict[str, list]:
        return {"edit_image": [LoadEditImage(), units.EncodeEditImage()]}

    def encode_prompt(self, prompt: str) -> Tensor:
        """``prompt_embeds`` of a text, float32 [1, L, 3 D]: for templates that read text."""
        return self.run(self.build_units()[:2], {"prompt": prompt})["prompt_embeds"]

    def config(self, name: str) -> dict[str, Any]:
        """As `Pipeline.config`; the VAE's unit normalises by itself, so that nothing is left to scale."""
        config = super().config(name)
        return config | units.FIXED if name == "vae" else config

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config = self.config("vae")
        factor = 2 * scale_factor(config)  # 2x2 patches of the VAE's latents
        return (4 * config["latent_channels"], height // factor, width // factor)

    @property
    def takes_guidance(self) -> bool:
        """True for dev, False for klein; True where only prompts are encoded and the transformer is not given."""
        return not self.store.has_config("dit") or bool(self.config("dit").get("guidance_embeds", True))

    def published_scheduler(self) -> FlowMatchSettings:
        return FLUX_DEV  # FLUX.2's is the same, and takes another mu
