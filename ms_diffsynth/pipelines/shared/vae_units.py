"""From an image to pixels, the two units of a VAE without what a family's VAE does, and a VAE that is called directly.

The units compute whole images in a compiled step; eagerly they take ``tiled``, ``tile_size`` and ``tile_stride``, and
compute tiles one after the other (`shared.tiles`).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn

from ms_diffsynth.diffusion.units import SampleLatents
from ms_diffsynth.errors import DataError
from ms_diffsynth.pipelines.shared.tiles import Tiles, in_tiles
from ms_diffsynth.units import PipelineUnit, TensorUnit, run_unit, run_units

TILING = ("tiled", "tile_size", "tile_stride")


class LoadPixels(PipelineUnit):
    """An image as pixels. Its sides must be multiples of the pipeline's division factor.

    Shapes: input_image PIL -> pixels float32 [1, 3, H, W] in [-1, 1].
    """

    input_params = ("input_image",)
    output_params = ("pixels",)

    def process(self, pipe, input_image):
        width, height = input_image.size
        factor = pipe.division_factor
        if height % factor or width % factor:
            raise DataError(f"an image of {width} x {height} pixels cannot be encoded: expected sides that are "
                            f"multiples of {factor}. Use UnifiedDataset.default_image_operator, or set height "
                            "and width.")
        return {"pixels": pipe.preprocess_image(input_image)}


class _VaeUnit(TensorUnit):
    """A unit of the VAE with one input and one output.

    Attributes:
        scale_factor: from the VAE's config to the pixels on a side of one of its latent pixels; read for tiles only.
        patch: sides of the square of latent pixels that is kept as one.
    """

    onload_model_names = ("vae",)
    options = TILING
    patch = 1

    def scale_factor(self, config: dict[str, Any]) -> int:
        raise TypeError(f"{type(self).__name__} has no scale_factor: set it to let the VAE work in tiles.")

    def tiles(self, tiled: bool | None, tile_size: int | None = None, tile_stride: int | None = None) -> Tiles | None:
        """As `Tiles.of`, in kept latents."""
        tiles = Tiles.of(tiled, tile_size, tile_stride, self.patch)
        return tiles and Tiles(tiles.size // self.patch, tiles.stride // self.patch)

    def cells(self, config: dict[str, Any]) -> tuple[int, int]:
        """The pixels on a side of a cell, and in the result: (pixels, 1) to encode, (1, pixels) to decode."""
        raise TypeError(f"{type(self).__name__} has no cells: implement it.")

    def process(self, pipe, tiled=None, tile_size=None, tile_stride=None, **inputs):
        tiles = self.tiles(tiled, tile_size, tile_stride)
        if tiles is None:
            return super().process(pipe, **inputs)
        self.attach(pipe)
        compute, (image,) = pipe.function_of(self), inputs.values()
        return {self.output_params[0]: in_tiles(lambda x: compute(x)[0], image, tiles,
                                                *self.cells(pipe.config("vae")))}


class EncodeImage(_VaeUnit):
    """The VAE's posterior: mean and log-variance, not a sample, so that it can be cached.

    A family's subclass has the ``construct``. Shapes: pixels float32 [B, 3, H, W] in [-1, 1] -> moments float32
    [B, 2C, h, w].
    """

    input_params = ("pixels",)
    output_params = ("moments",)
    has_few_shapes = True

    def cells(self, config):
        return self.patch * self.scale_factor(config), 1


class Decode(_VaeUnit):
    """Pixels from latents. A family's subclass has the ``construct``.

    Shapes: latents float32 [B, C, h, w] -> pixels float32 [B, 3, H, W], about [-1, 1].
    """

    input_params = ("latents",)
    output_params = ("pixels",)

    def cells(self, config):
        return 1, self.patch * self.scale_factor(config)


def mean_latents(encode_image: type[EncodeImage], pipe: Any, tiled: bool | None = None, tile_size: int | None = None,
                 tile_stride: int | None = None) -> Callable[[Tensor], Tensor]:
    """What makes latents of pixels, the posterior's mean as the network takes it, outside of a step: float32
    [B, 3, H, W] in [-1, 1] -> float32 [B, C, h, w]; in tiles as `_VaeUnit`."""
    encode, mean = encode_image(pipe.dtype), SampleLatents("mean")
    encode.attach(pipe)
    mean.attach(pipe)
    tiles, cells = encode.tiles(tiled, tile_size, tile_stride), encode.cells(pipe.config("vae"))

    def encoded(pixels: Tensor) -> Tensor:
        return encode(pixels)[0]

    return lambda x: mean(encoded(x) if tiles is None else in_tiles(encoded, x, tiles, *cells))[0]


class LatentsOfVae:
    """Of a VAE, mixed into its class: ``encode`` and ``decode`` as DiffSynth-Studio's units call them, with ``tiled``.

    Without ``tiled`` both are the network's own methods, as mindone's scripts and compiled steps call them.

    Attributes:
        encode_image, decode_latents: the units that do it.
        fixed_config: settings of the VAE that are others than those in its config.json.
    """

    encode_image: type[EncodeImage]
    decode_latents: type[Decode]
    fixed_config: dict[str, Any] = {}

    def encode(self, x, return_dict=None, tiled=None, tile_size=None, tile_stride=None):
        """With ``tiled``, true or false: the latents that training and sampling work with, the posterior's mean.

        Shapes: x float [B, 3, H, W] in [-1, 1] -> float32 [B, C, h, w]. Raises: ConfigError as `Tiles.of`.
        """
        if tiled is None:
            return self.own_encode(x) if return_dict is None else self.own_encode(x, return_dict)
        given = {"pixels": x, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        units = (self.encode_image(weight_dtype(self)), SampleLatents("mean"))
        return run_units(units, _Alone(self), given)["input_latents"]

    def decode(self, z, return_dict=None, tiled=None, tile_size=None, tile_stride=None, device=None):
        """With ``tiled``, true or false: pixels from such latents. ``device`` is where they are anyway.

        Shapes: z float [B, C, h, w] -> float32 [B, 3, H, W]. Raises: ConfigError as `Tiles.of`.
        """
        if tiled is None:
            return self.own_decode(z) if return_dict is None else self.own_decode(z, return_dict)
        given = {"latents": z, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        return run_unit(self.decode_latents(weight_dtype(self)), _Alone(self), given)["pixels"]


class _Alone:
    """What the units of a VAE ask of a pipeline, from the VAE alone."""

    model_names = ("vae",)

    def __init__(self, vae: nn.Cell):
        self.vae = vae

    def config(self, name: str) -> dict[str, Any]:
        return {**self.vae.config, **self.vae.fixed_config}

    def function_of(self, unit: TensorUnit) -> TensorUnit:
        return unit


def with_latents(network: type[nn.Cell], encode_image: type[EncodeImage], decode_latents: type[Decode],
                 **fixed_config: Any) -> type[nn.Cell]:
    """The class of a VAE with `LatentsOfVae`."""
    return type(network.__name__, (LatentsOfVae, network), {
        "own_encode": network.encode, "own_decode": network.decode, "encode_image": encode_image,
        "decode_latents": decode_latents, "fixed_config": fixed_config, "__module__": network.__module__})


def weight_dtype(cell: nn.Cell) -> Any:
    """The dtype of a cell's weights."""
    return next(iter(cell.get_parameters())).dtype
