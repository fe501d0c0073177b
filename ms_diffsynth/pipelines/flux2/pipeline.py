"""FLUX.2: Qwen3 as text encoder (klein), a VAE with 32 channels in 2x2 patches, and a transformer."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth.components import class_name_of, read_config
from ms_diffsynth.diffusion.schedule import ExponentialShift, Grid, Schedule, flow_match_euler, to_one_nth
from ms_diffsynth.errors import WeightError
from ms_diffsynth.io.hub import ModelConfig
from ms_diffsynth.pipeline import Component
from ms_diffsynth.pipelines.flux.units import LoadPixels
from ms_diffsynth.pipelines.flux2 import units
from ms_diffsynth.pipelines.flux2.denoise import Denoise
from ms_diffsynth.pipelines.image import ImagePipeline
from ms_diffsynth.pipelines.quiet import quiet_imports
from ms_diffsynth.program import Program

# Qwen2.5's vocabulary is Qwen3's without these four, which come right behind it
QWEN_TOKENIZER = Path(__file__).parents[1] / "qwen_image" / "tokenizer"
LATER_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")
UNUSED_LAYERS = tuple(f"model.layers.{k}." for k in range(27, 36))  # of Qwen3's 36: klein stops at three quarters


def _build_dit(config: dict[str, Any]):
    from ms_diffsynth.pipelines.flux2.transformer import build_transformer  # imports mindone's networks

    return build_transformer(_arguments(config))


def _build_vae(config: dict[str, Any]):
    with quiet_imports():
        from mindone.diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(**_arguments(config))
    del vae.bn.num_batches_tracked  # a count of training steps, which nothing reads
    return vae


def _build_text_encoder(config: dict[str, Any]):
    from ms_diffsynth.pipelines.flux2.text_encoder import Qwen3TextEncoder  # imports mindone's networks

    return Qwen3TextEncoder(config)


def _build_tokenizer(folder: Path):
    with quiet_imports():
        from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token for token in LATER_TOKENS if token not in tokenizer.get_vocab()])
    return tokenizer


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments from a diffusers config.json. A later setting that is on reaches mindone, which refuses."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
            if not k.startswith("_") and (k, v) != ("decoder_block_out_channels", None)}


COMPONENTS = (
    Component(name="tokenizer", folder="tokenizer", build=_build_tokenizer, default_folder=QWEN_TOKENIZER),
    Component(name="text_encoder", folder="text_encoder", class_name="Qwen3ForCausalLM", build=_build_text_encoder,
              ignored=("lm_head.", "model.norm.", *UNUSED_LAYERS)),
    Component(name="vae", folder="vae", class_name="AutoencoderKLFlux2", build=_build_vae,
              ignored=("bn.num_batches_tracked",)),
    Component(name="dit", folder="transformer", class_name="Flux2Transformer2DModel", build=_build_dit),
)

# What DiffSynth-Studio's FLUX.2 klein LoRA script adapts; attn.to_out is that of the single blocks
LORA_TARGET_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out",
)


def empirical_shift(sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
    """`ExponentialShift` with a mu fitted to the picture's size in tokens and to the number of steps.

    Source: diffusers 0.36, pipelines/flux2/pipeline_flux2.py, compute_empirical_mu.
    """
    many = 0.00016927 * seq_len + 0.45666666  # mu at 200 steps
    few = 8.73809524e-05 * seq_len + 1.89833333  # mu at 10 steps
    mu = many if seq_len > 4300 else many + (few - many) * (200 - len(sigmas)) / 190
    return ExponentialShift(mu)(sigmas)


# Source: DiffSynth-Studio 2.1.12, FlowMatchScheduler(template="FLUX.2")
SCHEDULE = Schedule(training=Grid(to_one_nth, (ExponentialShift(0.8),)), inference=Grid(to_one_nth, (empirical_shift,)))


class Flux2ImagePipeline(ImagePipeline):
    """Text to image and image editing with FLUX.2, and the units its training reuses.

    Attributes:
        max_sequence_length: tokens a prompt in its template is padded or cut to (512).
    """

    components = COMPONENTS
    lora_target_modules = LORA_TARGET_MODULES
    lora_prefixes = {"dit": "transformer", "text_encoder": "text_encoder"}
    fusible = ("encode_image",)
    prepare_settings = ("max_sequence_length",)
    max_sequence_length = 512

    @classmethod
    def from_pretrained(cls, model_configs: Sequence[ModelConfig] | ModelConfig | str, *,
                        tokenizer_config: ModelConfig | None = None, mindspore_dtype: ms.Type | None = None,
                        device: str | None = None) -> Flux2ImagePipeline:
        """A pipeline whose models are loaded at first use.

        Args:
            model_configs: a diffusers-format folder, or a ModelConfig for each component.
            tokenizer_config: Qwen3's tokenizer; None uses the one shipped with the package.
            mindspore_dtype: compute dtype; None means bfloat16 on Ascend, float32 on the CPU.
        """
        return cls._from_configs(model_configs, {"tokenizer": tokenizer_config}, mindspore_dtype, device)

    def __init__(self, models: dict[str, Any] | None = None, dtype: ms.Type | None = None):
        super().__init__(models, dtype)
        self.is_editing = False  # whether sampling reads edit_image

    def __call__(self, prompt: str, *, embedded_guidance: float = 4.0,
                 edit_image: Image.Image | Sequence[Image.Image] | None = None, **options: Any) -> Image.Image:
        """Generate one picture; arguments as `ImagePipeline.__call__`, and:

        Args:
            edit_image: a picture, or several, that the prompt speaks of; their sizes are free.
        """
        if self.is_editing != (edit_image is not None):
            self.is_editing = edit_image is not None
            self.denoise.read_edit_images()
            self.forget_compiled()
        return super().__call__(prompt, embedded_guidance=embedded_guidance, edit_image=edit_image, **options)

    def use_edit_image(self) -> None:
        """Train on pictures to be edited: ``edit_image`` becomes an input beside ``input_image``.

        Sampling reads it whenever it is given, trained or not.
        """
        self.denoise.read_edit_images()
        if "edit_image" not in self.inputs:
            self.inputs = (*self.inputs, "edit_image")
            self.units.insert(-1, units.EncodeEditImage())  # before the latents are sampled

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), LoadPixels(), units.EncodeImage(self.dtype)]

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def build_decode(self) -> units.Decode:
        return units.Decode(self.dtype)

    def sampling_program(self) -> Program:
        edit = [units.EncodeEditImage()] if self.is_editing else []
        others = [u for u in self.units if not isinstance(u, units.EncodeEditImage)]
        inputs = dict.fromkeys((*self.inputs, "edit_image", "guidance"))
        return Program([*others, *edit, self.denoise], inputs, ("latents", "sigma"))

    def model_fn(self, **slots: Any) -> Tensor:
        if "edit_latents" in slots:
            self.denoise.read_edit_images()
        return super().model_fn(**slots)

    def config(self, name: str) -> dict[str, Any]:
        """As `Pipeline.config`; the VAE's unit normalises by itself, so that nothing is left to scale."""
        config = super().config(name)
        return config | {"scaling_factor": 1.0} if name == "vae" else config

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config = self.config("vae")
        factor = 2 * 2 ** (len(config["block_out_channels"]) - 1)  # 2x2 patches of the VAE's latents
        return (4 * config["latent_channels"], height // factor, width // factor)

    def training_schedule(self, objective: str) -> Schedule:
        # diffusers' DreamBooth script takes the scheduler's grid, which dynamic shifting leaves unshifted
        return SCHEDULE if objective == "sft" else flow_match_euler(1.0)

    def sampling_sigmas(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> np.ndarray:
        return SCHEDULE.sampling(num_inference_steps, latent_shape[1] * latent_shape[2])

    def _load(self, name: str) -> Any:
        if name in ("tokenizer", "text_encoder") and "text_encoder" in self.sources:
            folder = self.sources["text_encoder"].folder
            class_name = class_name_of(read_config(folder))
            if class_name.startswith("Mistral3"):
                raise WeightError(f"{folder / 'config.json'} describes a {class_name}, the text encoder of FLUX.2-dev, "
                                  "which is not implemented: expected klein's Qwen3ForCausalLM. Use FLUX.2-klein, or "
                                  "encode the prompts elsewhere and give prompt_embeds to model_fn.")
        return super()._load(name)
