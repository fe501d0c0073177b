"""What every video pipeline shares: sampling of a film, its size and its pixels."""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth.data.video import to_frames, to_pixels
from ms_diffsynth.errors import ConfigError, DataError
from ms_diffsynth.pipelines.shared.image import ImagePipeline, those_given
from ms_diffsynth.units import PipelineUnit

logger = logging.getLogger(__name__)


class LoadPixels(PipelineUnit):
    """A film as pixels. Its sides must be multiples of the pipeline's division factor.

    Shapes: video uint8 [F, H, W, 3] -> pixels float32 [1, 3, F, H, W] in [-1, 1].
    """

    input_params = ("video",)
    output_params = ("pixels",)

    def process(self, pipe, video):
        frames, height, width = video.shape[:3]
        factor, times = pipe.division_factor, pipe.frame_factor
        if height % factor or width % factor or frames % times != 1 % times:
            raise DataError(f"a video of {frames} frames of {width} x {height} pixels cannot be encoded: expected one "
                            f"frame more than a multiple of {times}, and sides that are multiples of {factor}. Set "
                            "num_frames, height and width.")
        return {"pixels": Tensor(to_pixels(video)[None])}


class VideoPipeline(ImagePipeline):
    """A pipeline whose latents [C, f, h, w] decode to films: uint8 [F, H, W, 3] at ``frame_rate``."""

    medium = "video"
    inputs = ("prompt", "video", "num_frames", "height", "width")
    start_input = "video"
    options = ("cfg_scale", "num_frames", "height", "width", "seed", "num_inference_steps", "sampler", "on_step",
               "video", "denoising_strength", "tiled", "tile_size", "tile_stride")
    absent_inputs = ("input_image", "end_image")

    def __call__(self, prompt: str, negative_prompt: str = "", cfg_scale: float | None = None,
                 num_frames: int | None = None, height: int | None = None, width: int | None = None,
                 seed: int | None = None, num_inference_steps: int | None = None, sampler: str | None = None,
                 on_step: Callable[[int, int], None] | None = None, video: np.ndarray | None = None,
                 denoising_strength: float = 1.0, tiled: bool = False, tile_size: int | None = None,
                 tile_stride: int | None = None, embedded_guidance: float | None = None,
                 **inputs: Any) -> np.ndarray:
        """Generate one film: uint8 [F, H, W, 3]. What is None is as in ``sampling``.

        Args:
            num_frames: rounded up to one more than a multiple of ``frame_factor``.
            height, width: pixels, rounded up to ``division_factor``. With ``input_image`` and without either of them,
                the film has its proportions and as many pixels as by default.
            video: uint8 [F, H, W, 3], from which sampling starts instead of from noise alone; it has the size that is
                sampled.
            inputs: of the family: ``input_image``, the first frame of the film, and ``end_image``, the last one,
                images of Pillow, for models that take them.

        The others as `ImagePipeline.__call__`. Raises: ConfigError likewise.
        """
        inputs, own = those_given(inputs), self.sampling
        for name in ("input_image", "end_image"):
            if name in inputs and not isinstance(inputs[name], Image.Image):
                raise ConfigError(f"{name}={inputs[name]!r:.80}: expected an image of Pillow. Open the file: "
                                  "Image.open(path).")
        if video is not None:
            default = video.shape[:3]
        elif "input_image" in inputs and height is None and width is None:
            default = (own.num_frames, *self.size_of_image(inputs["input_image"]))
        else:
            default = self.usual_size
        size = self.check_size(*(side or usual for side, usual in zip((num_frames, height, width), default)))
        if video is not None and tuple(video.shape[:3]) != size:
            raise ConfigError(f"video has the size {tuple(video.shape[:3])}, and {size} is sampled: expected one size "
                              "(frames, height, width). Give none of num_frames, height and width, or cut the video.")
        tiling = {"tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        latents = self.sample(size, prompt, negative_prompt, cfg_scale, embedded_guidance, seed, num_inference_steps,
                              sampler, on_step, video, denoising_strength, tiling, inputs)
        return self.decode(latents, **tiling)[0]

    @property
    def usual_size(self) -> tuple[int, ...]:
        return self.sampling.num_frames, *super().usual_size

    def size_of_image(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of a film that begins with an image: its proportions, and the usual number of pixels."""
        own, factor = self.sampling, self.division_factor
        scale = (own.height * own.width / (image.width * image.height)) ** 0.5
        return tuple(max(1, round(side * scale / factor)) * factor for side in (image.height, image.width))

    def check_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(frames, height, width), rounded up to what the family makes; logged when they change."""
        times = self.frame_factor
        frames = -(-(num_frames - 1) // times) * times + 1
        if frames != num_frames:
            logger.warning("%d frames: a film has one more than a multiple of %d, so %d are made.", num_frames, times,
                           frames)
        return frames, *self.check_resize_height_width(height, width)

    def size_inputs(self, size: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(("num_frames", "height", "width"), size))

    def decode(self, latents: Tensor, tiled: bool = False, tile_size: int | None = None,
               tile_stride: int | None = None) -> list[np.ndarray]:
        """Films from latents, uint8 [F, H, W, 3] each; in tiles as `__call__`."""
        return [to_frames(pixels) for pixels in self.pixels(latents, tiled, tile_size, tile_stride)]
