"""A family of videos from the networks of the toy family: four frames of pixels behind the first are one of latents."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.data.video import to_frames, to_pixels
from ms_diffsynth.draws import Draws
from ms_diffsynth.pipeline import Family, SamplingDefaults
from ms_diffsynth.pipelines.shared.tiny import write_model
from ms_diffsynth.pipelines.toy.networks import PATCH
from ms_diffsynth.pipelines.toy.pipeline import COMPONENTS, CONFIGS, EncodePrompt, TokenizePrompt, ToyImagePipeline
from ms_diffsynth.units import PipelineUnit, TensorUnit, run_unit


def apart(x):
    """Frames as a batch: [B, C, F, h, w] -> [B F, C, h, w]."""
    return ops.transpose(x, (0, 2, 1, 3, 4)).reshape(-1, x.shape[1], x.shape[3], x.shape[4])


def together(x, frames):
    return ops.transpose(x.reshape(-1, frames, *x.shape[1:]), (0, 2, 1, 3, 4))


class LoadVideo(PipelineUnit):
    """uint8 [F, H, W, 3] -> float32 [1, 3, F, H, W]."""

    input_params, output_params = ("video",), ("pixels",)

    def process(self, pipe, video):
        return {"pixels": Tensor(to_pixels(video)[None])}


class EncodeVideo(TensorUnit):
    """pixels [B, 3, F, H, W] -> moments [B, 2C, 1 + (F - 1) / 4, H/4, W/4]: every fourth frame."""

    input_params, output_params, onload_model_names = ("pixels",), ("moments",), ("vae",)

    def construct(self, pixels):
        kept = pixels[:, :, ::4]
        return (together(self.vae.encode(apart(kept).astype(self.dtype)).astype(ms.float32), kept.shape[2]),)


class Denoise(TensorUnit):
    """Every frame by itself."""

    input_params = ("latents", "sigma", "prompt_embeds")
    output_params, onload_model_names = ("velocity",), ("dit",)

    def construct(self, latents, sigma, prompt_embeds):
        frames = latents.shape[2]
        velocity = self.dit(apart(latents), ops.repeat_interleave(sigma, frames, 0),
                            ops.repeat_interleave(prompt_embeds, frames, 0))
        return (together(velocity, frames).astype(ms.float32),)


class Decode(TensorUnit):
    """latents [B, C, f, h, w] -> pixels [B, 3, 4f - 3, 4h, 4w]."""

    input_params, output_params, onload_model_names = ("latents",), ("pixels",), ("vae",)
    options = ("tiled", "tile_size", "tile_stride")

    def process(self, pipe, tiled=None, tile_size=None, tile_stride=None, **inputs):
        return super().process(pipe, **inputs)

    def construct(self, latents):
        pixels = together(self.vae.decode(apart(latents)), latents.shape[2])
        return (ops.repeat_interleave(pixels, 4, 2)[:, :, 3:],)


class ToyVideoPipeline(ToyImagePipeline):
    medium = "video"
    inputs = ("prompt", "video", "num_frames", "height", "width")
    frame_factor, frame_rate = 4, 16.0
    absent_inputs, fusible = (), ("encode_video",)
    sampling = SamplingDefaults(height=48, width=64, num_frames=5, num_inference_steps=2)

    def build_units(self):
        return [TokenizePrompt(), EncodePrompt(), LoadVideo(), EncodeVideo(self.dtype)]

    def build_denoise(self):
        return Denoise(self.dtype)

    def build_decode(self):
        return Decode(self.dtype)

    def latent_shape(self, frames, height, width):
        return self.config("vae")["latent_channels"], 1 + (frames - 1) // 4, height // PATCH, width // PATCH

    def __call__(self, prompt, negative_prompt="", cfg_scale=None, embedded_guidance=None, num_frames=None, height=None,
                 width=None, seed=None, num_inference_steps=None, sampler=None, on_step=None, **tiling):
        own = self.sampling
        shape = self.latent_shape(num_frames or own.num_frames, height or own.height, width or own.width)
        latents = self.integrate(self.condition(prompt), None, Draws(seed).normal("latents", np.array([0]), shape),
                                 self.sampling_sigmas(num_inference_steps or own.num_inference_steps, shape), 1.0,
                                 on_step, self.check_sampler(sampler))
        return to_frames(run_unit(self.build_decode(), self, {"latents": latents})["pixels"].asnumpy()[0])


def write_tiny(folder: Path, seed: int = 0) -> None:
    write_model(folder, "ToyVideoPipeline", COMPONENTS, CONFIGS, seed)


FAMILY = Family(name="toy_video", pipeline=ToyVideoPipeline, write_tiny=write_tiny)
