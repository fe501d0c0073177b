"""Qwen-Image: a language model as text encoder, a film VAE used on one frame, and a transformer of two streams."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ms_diffsynth.diffusion.guidance import classifier_free_with_norms
from ms_diffsynth.diffusion.schedule import FlowMatchSettings, Grid, TerminalStretch, TorchExponentialShift, one_to_zero
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.interchange import read_table
from ms_diffsynth.models import LIST, NUMBERS, SIZE, SIZES, Component, arguments, blocks, columns, rows
from ms_diffsynth.pipeline import SamplingDefaults
from ms_diffsynth.pipelines.qwen_image import edit, units
from ms_diffsynth.pipelines.qwen_image.denoise import Denoise
from ms_diffsynth.pipelines.qwen_image.published import PUBLISHED
from ms_diffsynth.pipelines.shared.causal_vae import CausalVAE
from ms_diffsynth.pipelines.shared.control import TakesControl
from ms_diffsynth.pipelines.shared.edit import LoadEditImage
from ms_diffsynth.pipelines.shared.image import ImagePipeline
from ms_diffsynth.pipelines.shared.text import QWEN_TOKENIZER, build_qwen_tokenizer
from ms_diffsynth.pipelines.shared.vae_units import LoadPixels, with_latents

# settings newer diffusers write into config.json; with these values the network is the one mindone 0.5.0 knows
LATER_SETTINGS = {"use_additional_t_cond": False, "use_layer3d_rope": False, "input_channels": 3}


def _build_dit(config: dict[str, Any]):
    from ms_diffsynth.pipelines.qwen_image.transformer import build_transformer  # imports mindone's networks

    return build_transformer(config)


def _build_vae(config: dict[str, Any]):
    return with_latents(CausalVAE, units.EncodeImage, units.Decode)(**arguments(CausalVAE, config, LATER_SETTINGS))


def _build_controlnet(config: dict[str, Any]):
    from ms_diffsynth.pipelines.qwen_image.controlnet import build_controlnet  # imports mindone's networks

    return build_controlnet(config)


def _build_text_encoder(config: dict[str, Any]):
    from ms_diffsynth.pipelines.qwen_image.text_encoder import QwenTextEncoder  # imports mindone's networks

    return QwenTextEncoder(config)


def _build_vision_tower(config: dict[str, Any]):
    from ms_diffsynth.pipelines.qwen_image.vision import VisionTower  # imports mindone's networks

    return VisionTower(config)


COMPONENTS = (
    Component(name="tokenizer", folder="tokenizer", build=build_qwen_tokenizer, default_folder=QWEN_TOKENIZER,
              libraries=("transformers",)),
    Component(name="text_encoder", folder="text_encoder", class_name="Qwen2_5_VLForConditionalGeneration",
              build=_build_text_encoder, ignored=("visual.", "lm_head."),
              known={"Qwen2.5-VL-7B": PUBLISHED["Qwen-Image"]["text_encoder"]},
              told_by={"text_config.vocab_size": rows("model.embed_tokens.weight"),
                       "text_config.hidden_size": columns("model.embed_tokens.weight"),
                       "text_config.num_hidden_layers": blocks("model.layers.")}),
    Component(name="vae", folder="vae", class_name="AutoencoderKLQwenImage", build=_build_vae,
              reads={"z_dim": SIZE, "temperal_downsample": LIST, "latents_mean": NUMBERS, "latents_std": NUMBERS},
              encoder=("encoder", "quant_conv"), known={"Qwen-Image": PUBLISHED["Qwen-Image"]["vae"]},
              told_by={"base_dim": rows("encoder.conv_in.weight"), "z_dim": columns("decoder.conv_in.weight")}),
    Component(name="dit", folder="transformer", class_name="QwenImageTransformer2DModel", build=_build_dit,
              reads={"axes_dims_rope": SIZES}, marks={"zero_cond_t": "__index_timestep_zero__"},
              known={"Qwen-Image": PUBLISHED["Qwen-Image"]["dit"],
                     "Qwen-Image-Edit-2511": PUBLISHED["Qwen-Image"]["dit"] | {"zero_cond_t": True}},
              told_by={"num_layers": blocks("transformer_blocks."), "in_channels": columns("img_in.weight"),
                       "joint_attention_dim": columns("txt_in.weight")}),
)

# what text to image leaves out of the text encoder, and editing needs
VISION_TOWER = Component(name="vision_tower", folder="text_encoder", class_name="Qwen2_5_VLForConditionalGeneration",
                         build=_build_vision_tower, ignored=("model.", "lm_head."), part_of="text_encoder")

CONTROLNET = Component(name="controlnet", folder="controlnet", class_name="QwenImageControlNetModel",
                       build=_build_controlnet)

# What DiffSynth-Studio's Qwen-Image LoRA script adapts
LORA_TARGET_MODULES = (
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
    "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
)


# as published with Qwen-Image
SCHEDULER = FlowMatchSettings(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)


class QwenImagePipeline(TakesControl, ImagePipeline):
    """Text to image with Qwen-Image, editing with Qwen-Image-Edit, and the units their training reuses.

    Attributes:
        max_sequence_length: tokens of a prompt and of the template's end (5) that are kept; at most 1024.
            The tokens of pictures come on top.
        edit_template: "first", how Qwen-Image-Edit is shown references, or "plus", how -2509 and -2511 are; None goes
            by the model, see `edit_style`.
    """

    components, parts, further = COMPONENTS, (VISION_TOWER,), (CONTROLNET,)
    lora_target_modules = LORA_TARGET_MODULES
    diffusers_class = "QwenImagePipeline"
    interchange = read_table(Path(__file__).with_name("interchange.yaml"))
    fusible = ("encode_image",)
    widths = {"latents": ("in_channels", -3, 4), "prompt_embeds": ("joint_attention_dim", -1, 1)}
    prepare_settings = ("max_sequence_length", "edit_max_pixels", "edit_style", "control_form")
    inpaints = "Inpaint"
    controlnet_lists = {"num_layers": ("transformer_blocks", "controlnet_blocks", 5)}
    controlnet_settings = ("patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
                           "joint_attention_dim", "axes_dims_rope")
    padded_slots = ("prompt_ids", "prompt_embeds", "prompt_mask", "prompt_places")
    prompt_lengths = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)  # beyond 1024 only with pictures
    max_sequence_length = 1024
    edit_template: str | None = None
    sampling = SamplingDefaults(cfg_scale=4.0)
    # Source: DiffSynth-Studio 2.1.12, FlowMatchScheduler(template="Qwen-Image")
    sft_grid = Grid(one_to_zero, (TorchExponentialShift(0.8), TerminalStretch(0.02)))
    guidance_rule = staticmethod(classifier_free_with_norms)

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), LoadPixels(), units.EncodeImage(self.dtype)]

    def build_optional_units(self) -> dict[str, list]:
        return {"edit_image": [
            LoadEditImage(), edit.EncodeEditImage(), edit.EncodePictures(),
            edit.TokenizeEditPrompt().with_slots(name="tokenize_prompt"),
            edit.EncodeEditPrompt().with_slots(name="encode_prompt")],
            **self.control_units(units.EncodeImage)}

    @property
    def edit_style(self) -> str:
        """How references are shown to the text encoder: as ``edit_template`` says; without it "first" for a model whose
        model_index.json says QwenImageEditPipeline, or whose files lie in a folder called Qwen-Image-Edit; else "plus".
        """
        if self.edit_template:
            return self.edit_template
        known = self.store.index.get("_class_name", "")
        if known.startswith("QwenImageEdit"):
            return "plus" if known == "QwenImageEditPlusPipeline" else "first"
        places = [part for source in self.sources.values() for part in source.folder.parts]
        places += [name.partition(":")[0].rpartition("/")[2] for name in self.given_as]  # planned, and not here yet
        return "first" if "Qwen-Image-Edit" in places else "plus"

    def edited_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """As `ImagePipeline.edited_size`; of several references the last, as diffusers does."""
        return super().edited_size(images[-1:])

    def picture_sides(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return edit.EncodePictures.sides(self, sizes)

    def use_input(self, name: str) -> None:
        super().use_input(name)
        if name == "edit_image":
            self.check_editing()

    def check_editing(self) -> None:
        """Raises: WeightError when the text encoder has no vision tower, or the transformer came without config.json,
        which alone says whether it is -2511."""
        config = self.sources["dit"].config if "dit" in self.sources else None
        if config is not None and not config.get("zero_cond_t"):
            raise WeightError(f"{self.sources['dit'].folder / 'config.json'} is missing: it says how references are "
                              "modulated (zero_cond_t, of Qwen-Image-Edit-2511), which no tensor does. Put the "
                              "config.json of the model's transformer/ beside its weights.")
        if "text_encoder" in self.sources and "vision_tower" not in self.model_names:
            place = self.sources["text_encoder"].folder
            raise WeightError(f"{place} has no vision tower (no tensors visual.*), by which references are read: "
                              "expected the text_encoder/ of Qwen-Image or Qwen-Image-Edit. Give the whole folder.")

    text_places = staticmethod(edit.text_places)

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype, self.store)

    def build_decode(self) -> units.Decode:
        return units.Decode(self.dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config = self.config("vae")
        factor = units.scale_factor(config)
        return (config["z_dim"], height // factor, width // factor)

    def published_scheduler(self) -> FlowMatchSettings:
        return SCHEDULER
