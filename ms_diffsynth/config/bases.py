"""The models that `ms-diffsynth init` writes configurations for, and how each job fits a device.

Peaks are GiB of one step at 1024 x 1024 pixels, by MindSpore's own allocator on the stand-in for CANN:
``python benchmarks/memory.py``, the table of docs/reference/memory.md. None was measured on an NPU.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DEVICES = {64: 59.6, 32: 29.8}  # GB an Ascend 910B is sold with -> GiB; CANN and MindSpore take some of it


class Fit(NamedTuple):
    """How a job is made to fit a device: by recompute, by storing the network in 8 bits; and its peak, GiB."""

    recompute: bool
    is_8bit: bool
    peak: float

    @property
    def settings(self) -> dict[str, tuple[Any, str]]:
        """The settings for it, each with a comment."""
        found: dict[str, tuple[Any, str]] = {}
        if self.is_8bit:
            found["fp8_models"] = "dit", "the network's weights in 8 bits; the LoRA stays float32"
        if self.recompute:
            found["use_gradient_checkpointing"] = True, "less memory, more time"
        return found


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model to train on.

    Attributes:
        title: its name.
        family: of its pipeline.
        model_paths: of a model that the package brings.
        files: repository of the hub -> patterns of files, one for each component.
        download: bytes of these, in words.
        is_gated: whether the repository asks for a licence to be accepted.
        side: pixels of the square images that it was made for. division_factor: sides of images are multiples of it.
        tokenizer: that counts the tokens of a caption: "clip", "t5" or "qwen2" of the package, "own" of a bundled
            model; None where none is here.
        tokens: of a caption that are read.
        around: tokens of them that a template takes.
        prompt: of images without a caption.
        encoders: GiB of the text encoders.
        is_cached: whether images and prompts are encoded first and the encoders unloaded, by ``cache_dir``.
        settings: further ones.
        batch_size: images a step.
        steps: the fewest and the most; between them every image is shown a hundred times.
        fits: job -> GB of a device -> how it fits. Empty for a model that fits every device.
    """

    title: str
    family: str
    model_paths: str | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    download: str = ""
    is_gated: bool = False
    side: int = 1024
    division_factor: int = 16
    tokenizer: str | None
    tokens: int
    around: int = 0
    prompt: str = "a photo of {trigger}"
    encoders: float = 0.0
    is_cached: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    steps: tuple[int, int] = (800, 3000)
    fits: Mapping[str, Mapping[int, Fit]] = field(default_factory=dict)

    @property
    def file_names(self) -> str:
        """Its files, as ``model_id_with_origin_paths`` names them."""
        return ",".join(f"{name}:{pattern}" for name, patterns in self.files.items() for pattern in patterns)


_RATE = {"learning_rate": "1e-4", "lr_scheduler": "cosine"}
_KLEIN = "black-forest-labs/FLUX.2-klein"

BASES = {
    "emoji-flux": Base(
        title="emoji-flux", family="flux", model_paths="emoji-flux", side=64, tokenizer="own", tokens=16,
        prompt="a 3d render of {trigger}", is_cached=False,
        settings={
            # those of the family, and the two of the single blocks beside attention
            "lora_target_modules": "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,"
                                   "net.0.proj,net.2,proj_mlp,proj_out",
            "caption_dropout": 0.1, "task": "dreambooth", "weighting_scheme": "logit_normal",
            "learning_rate": "2e-3", "lr_scheduler": "cosine"},
        batch_size=3, steps=(300, 1500)),
    "flux1-dev": Base(
        title="FLUX.1-dev", family="flux", is_gated=True, download="34 GB", tokenizer="t5", tokens=512, encoders=9.3,
        files={"black-forest-labs/FLUX.1-dev": ("transformer/*.safetensors", "text_encoder/*.safetensors",
                                                "text_encoder_2/*.safetensors", "vae/*.safetensors")},
        settings=_RATE,
        fits={"lora": {64: Fit(False, False, 45.03), 32: Fit(True, False, 24.75)},
              "dreambooth": {64: Fit(True, False, 26.74), 32: Fit(True, True, 16.09)}}),
    "qwen-image": Base(
        title="Qwen-Image", family="qwen_image", download="58 GB", tokenizer="qwen2", tokens=1024, around=5,
        encoders=13.2,
        files={"Qwen/Qwen-Image": ("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors")},
        settings=_RATE,
        fits={"lora": {64: Fit(True, False, 42.22), 32: Fit(True, True, 23.37)},
              "dreambooth": {64: Fit(True, True, 26.07), 32: Fit(True, True, 26.07)}}),
    "flux2-klein": Base(
        title="FLUX.2-klein-4B", family="flux2", download="16 GB", tokenizer="qwen2", tokens=512, around=12,
        encoders=5.8, is_cached=False,
        files={f"{_KLEIN}-base-4B": ("transformer/*.safetensors",),
               f"{_KLEIN}-4B": ("text_encoder/*.safetensors", "vae/diffusion_pytorch_model.safetensors")},
        settings=_RATE,
        fits={"lora": {64: Fit(False, False, 20.15), 32: Fit(True, False, 9.12)},
              "dreambooth": {64: Fit(False, False, 32.75), 32: Fit(True, False, 10.70)},
              "edit": {64: Fit(False, False, 31.34), 32: Fit(True, False, 10.51)},
              "template": {64: Fit(False, False, 16.82), 32: Fit(True, False, 8.91)}}),
    "flux1-kontext": Base(
        title="FLUX.1-Kontext-dev", family="flux", is_gated=True, download="34 GB", tokenizer="t5", tokens=512,
        encoders=9.3,
        files={"black-forest-labs/FLUX.1-Kontext-dev": ("transformer/*.safetensors", "text_encoder/*.safetensors",
                                                        "text_encoder_2/*.safetensors", "vae/*.safetensors")},
        settings=_RATE,
        fits={"edit": {64: Fit(True, False, 26.51), 32: Fit(True, False, 26.51)}}),
    "qwen-image-edit": Base(
        title="Qwen-Image-Edit-2511", family="qwen_image", download="58 GB", tokenizer="qwen2", tokens=1024, around=5,
        encoders=14.5,
        files={"Qwen/Qwen-Image-Edit-2511": ("transformer/*.safetensors", "text_encoder/*.safetensors",
                                             "vae/*.safetensors")},
        settings=_RATE,
        fits={"edit": {64: Fit(True, False, 44.63)}}),
    "flux2-dev": Base(
        title="FLUX.2-dev", family="flux2", is_gated=True, download="113 GB", tokenizer=None, tokens=512,
        encoders=32.3,
        files={"black-forest-labs/FLUX.2-dev": ("transformer/*.safetensors", "text_encoder/*.safetensors",
                                                "vae/diffusion_pytorch_model.safetensors")},
        settings={"tokenizer_path": "black-forest-labs/FLUX.2-dev:tokenizer/", **_RATE},
        fits={"lora": {64: Fit(True, True, 36.97)}}),
    "sd3.5-medium": Base(
        title="SD3.5-medium", family="sd3", is_gated=True, download="16 GB", tokenizer="t5", tokens=256, encoders=10.0,
        # whole names, because the folders of the text encoders hold the same weights in float16 too
        files={"stabilityai/stable-diffusion-3.5-medium": (
            "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors", "text_encoder_3/model-*.safetensors",
            "vae/diffusion_pytorch_model.safetensors")},
        # the noise levels of diffusers' script: shift 3
        settings={"task": "dreambooth", "weighting_scheme": "logit_normal", **_RATE},
        fits={"lora": {64: Fit(False, False, 10.17), 32: Fit(False, False, 10.17)},
              "dreambooth": {64: Fit(False, False, 15.62), 32: Fit(False, False, 15.62)}}),
    "sdxl": Base(
        title="SDXL-base", family="sdxl", download="14 GB", tokenizer="clip", tokens=77, encoders=1.5,
        division_factor=32,
        # whole names, because the folders hold the same weights in float16 too
        files={"stabilityai/stable-diffusion-xl-base-1.0": (
            "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors", "vae/diffusion_pytorch_model.safetensors")},
        settings={"lora_base_model": "unet", **_RATE},
        fits={"lora": {64: Fit(True, False, 5.80), 32: Fit(True, False, 5.80)}}),
    "z-image": Base(
        title="Z-Image", family="z_image", download="21 GB", tokenizer="qwen2", tokens=512, around=8, encoders=7.3,
        files={"Tongyi-MAI/Z-Image": ("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors")},
        settings=_RATE,
        fits={"lora": {64: Fit(False, False, 36.41), 32: Fit(True, False, 13.99)},
              "dreambooth": {64: Fit(True, False, 16.00), 32: Fit(True, False, 16.00)}}),
}
