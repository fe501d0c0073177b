"""Reference images: what an edit model sees beside the prompt, as clean tokens behind those of the image.

Each reference keeps its own size within a limit of pixels. A row may have none, one or several; without any its slots
are there and have no tokens, so that such rows are trained in the same run, compiled for what they are.

Shape legend: B batch, M tokens of all references, C channels of a token, A axes of a position.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor, ops
from PIL import Image

from ms_diffsynth.data.images import to_rgb
from ms_diffsynth.data.operators import ImageCropAndResize
from ms_diffsynth.diffusion.packing import pack
from ms_diffsynth.errors import DataError
from ms_diffsynth.pipelines.shared import vae_units
from ms_diffsynth.units import PipelineUnit


def references(edit_image: Any) -> list[Image.Image]:
    """The images of the input ``edit_image``, in order: one, several or None. Raises: DataError for anything else."""
    images = list(edit_image) if isinstance(edit_image, (list, tuple)) else [] if edit_image is None else [edit_image]
    if not all(isinstance(image, Image.Image) for image in images):
        raise DataError(f"edit_image={edit_image!r}: expected an image or a list of images. In a data set name "
                        "the column in extra_inputs, so that it is read.")
    return [to_rgb(image) for image in images]


def within(image: Image.Image, max_pixels: int, factor: int) -> Image.Image:
    """An image made smaller until it has at most ``max_pixels``, and cut around its middle to multiples of ``factor``.

    Raises: DataError for an image with a side of less than ``factor``.
    """
    return ImageCropAndResize(None, None, max_pixels, factor, factor)(image)


def size_within(height: int, width: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """(height, width) of the image that `within` makes of one of this size. Raises: as `within`."""
    return ImageCropAndResize(None, None, max_pixels, factor, factor).target_size(width, height)


class LoadEditImage(PipelineUnit):
    """References as pixels, each of its own size, with at most ``pipe.edit_max_pixels``.

    Shapes: edit_image PIL, a list of them, or None -> edit_pixels, a list of float32 [1, 3, h, w] in [-1, 1].
    """

    input_params = ("edit_image",)
    output_params = ("edit_pixels",)

    def process(self, pipe, edit_image):
        images = [within(image, pipe.edit_max_pixels, pipe.division_factor) for image in references(edit_image)]
        return {"edit_pixels": [pipe.preprocess_image(image) for image in images]}


class EncodeEditImage(PipelineUnit):
    """Latents of references as tokens, the posterior's mean, and where they lie.

    A family's subclass has the unit of its VAE and its positions.

    Shapes: edit_pixels, a list of float32 [B, 3, h, w] -> edit_latents float32 [B, M, C], edit_places int32 [B, M, A].

    Attributes:
        encode: the class of the VAE's unit.
        tokens: latents [B, c, h, w] as tokens [B, m, C].
        axes: of a position.
    """

    input_params = ("edit_pixels",)
    output_params = ("edit_latents", "edit_places")
    onload_model_names = ("vae",)
    options = vae_units.TILING
    encode: type[vae_units.EncodeImage]
    tokens = staticmethod(pack)
    axes: int

    def places(self, sides: Sequence[tuple[int, int]]) -> np.ndarray:
        """The positions of references, one after the other, their sides (height, width) in tokens: int32 [M, A]."""
        raise TypeError(f"{type(self).__name__} has no places(self, sides): implement it.")

    def process(self, pipe, edit_pixels, tiled=None, tile_size=None, tile_stride=None):
        patch = pipe.latent_patch
        if not edit_pixels:
            channels = patch * patch * pipe.latent_shape(pipe.division_factor, pipe.division_factor)[0]
            return {"edit_latents": Tensor(np.zeros((1, 0, channels), np.float32)),
                    "edit_places": Tensor(np.zeros((1, 0, self.axes), np.int32))}
        mean = vae_units.mean_latents(self.encode, pipe, tiled, tile_size, tile_stride)
        latents = [mean(x) for x in edit_pixels]
        places = self.places([(x.shape[2] // patch, x.shape[3] // patch) for x in latents])
        return {"edit_latents": ops.cat([self.tokens(x) for x in latents], 1),
                "edit_places": Tensor(np.repeat(places[None], latents[0].shape[0], 0))}
