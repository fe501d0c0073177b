"""Control images: what an image is drawn after, place by place, such as edges, depths, or a picture with a hole.

A network takes them in one of three ways, which its config.json tells:

- a **ControlNet** beside it (`Component` ``controlnet``) reads each control image and adds to the network's blocks;
- a **wide** network has the control image's channels beside those of the noisy latents (FLUX.1-Canny-dev, -Depth-dev);
- FLUX.1-**Fill**-dev is wide too, and reads a picture with a hole in it, and where the hole is.

A ControlNet with ``extra_condition_channels`` reads a picture and its hole too. A control image is brought to the size
of the image; a mask is white where the hole is.

Shape legend: B batch, K control images, N image tokens, C channels of a token.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from PIL import Image

from ms_diffsynth.data.images import to_rgb
from ms_diffsynth.data.operators import crop_and_resize
from ms_diffsynth.diffusion.packing import pack
from ms_diffsynth.errors import ConfigError, DataError
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.pipelines.shared import vae_units
from ms_diffsynth.units import PipelineUnit, TensorUnit

INPUTS = ("control_image", "control_mask")
OPTIONS = ("conditioning_scale", "control_mode")  # of sampling, beside these inputs
SLOTS = ("control_latents?", "control_modes?", "control_scales?")
MASK_CELL = 8  # sides of the square of a mask that becomes channels of FLUX.1-Fill, in pixels


class ControlledDenoise(TensorUnit):
    """A unit that calls a network, and the ControlNet of the pipeline where it has one.

    Args:
        store: the models of the pipeline, which may get a ControlNet later.
    """

    def __init__(self, dtype: ms.Type, store: Any):
        super().__init__(dtype)
        self.store = store

    @property
    def onload_model_names(self) -> tuple[str, ...]:
        return ("dit", "controlnet") if "controlnet" in self.store.names else ("dit",)

    def attach(self, pipe):
        super().attach(pipe)
        self.is_wide = pipe.control_channels > 0

    def each(self, control_latents, control_modes, control_scales):
        """[B, K, N, C], int32 [B, K] and float32 [B, K] -> of each control image [B, N, C], [B, 1] and [B, 1]; for
        compiled code."""
        return (tuple([x.squeeze(1) for x in mint.split(control_latents.astype(self.dtype), 1, 1)]),
                mint.split(control_modes, 1, 1), mint.split(control_scales, 1, 1))


def added(samples, further):
    """Two tuples of Tensors, one by one; the first may be None. For compiled code."""
    if samples is None:
        return further
    return tuple([samples[k] + further[k] for k in range(len(further))])


def with_sample(image, samples, block, blocks):
    """What comes out of a block, of ``blocks``, with its share of a ControlNet's samples: each is for an equal number
    of blocks, the last for what is left. image [B, N, D], samples a tuple of such, or None. For compiled code.

    Source: diffusers 0.42, FluxTransformer2DModel.
    """
    if samples is None or len(samples) == 0:
        return image
    return image + samples[block // -(-blocks // len(samples))]


class LoadControl(PipelineUnit):
    """Control images and the mask as pixels of the image's size, and how each image is used.

    Without ``control_image`` it is the image itself that has the hole: for rows of a data set.

    Shapes: control_image PIL or a list of them, control_mask PIL, input_image PIL, height, width -> control_pixels, a
    list of float32 [1, 3, H, W] in [-1, 1]; control_hole float32 [1, 1, H, W], 1 in the hole, or None; control_modes
    int32 [1, K], which of a union of ControlNets; control_scales float32 [1, K], by which each is multiplied.
    """

    input_params = ("control_image?", "control_mask?", "input_image?", "height?", "width?")
    output_params = ("control_pixels", "control_hole", "control_modes", "control_scales")
    options = OPTIONS

    def process(self, pipe, control_image, control_mask, input_image, height, width, conditioning_scale=None,
                control_mode=None):
        if input_image is not None:
            width, height = input_image.size
        given = input_image if control_image is None else control_image
        images = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise DataError(f"control_image={given!r:.80}: expected an image or a list of images. In a data set name "
                            "the column in extra_inputs, so that it is read.")
        if control_mask is not None and not isinstance(control_mask, Image.Image):
            given = (f"a list of {len(control_mask)}" if isinstance(control_mask, (list, tuple)) else
                     f"{control_mask!r:.80}")
            raise DataError(f"control_mask is {given}: expected one mask, an image that is white where the hole is. "
                            "Give one for all control images.")
        pipe.check_control(len(images), control_mask is not None)
        modes = pipe.control_mode if control_mode is None else control_mode
        return {
            "control_pixels": [pipe.preprocess_image(aligned(to_rgb(x), height, width))
                               for x in images],
            "control_hole": None if control_mask is None else hole(control_mask, height, width),
            "control_modes": Tensor(_for_each(modes or 0, len(images), "control_mode", np.int32)),
            "control_scales": Tensor(_for_each(1.0 if conditioning_scale is None else conditioning_scale, len(images),
                                              "conditioning_scale", np.float32))}


def _for_each(value: Any, count: int, name: str, dtype: type) -> np.ndarray:
    """One value for all images, or one for each: [1, count]. Raises: ConfigError for another number of them."""
    values = np.atleast_1d(np.asarray(value, dtype))
    if values.shape not in ((1,), (count,)):
        raise ConfigError(f"{name}={value}: expected a number, or one for each of {count} control images.")
    return np.broadcast_to(values, (count,))[None].copy()


def aligned(image: Image.Image, height: int, width: int) -> Image.Image:
    """An image at the size of another one, cut as that was."""
    return image if image.size == (width, height) else crop_and_resize(image, height, width)


def hole(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """1 where a mask is white, 0 where it is black, with nothing between: float32 [1, 1, height, width]."""
    grey = aligned(mask.convert("L"), height, width)
    return (np.asarray(grey) > 127).astype(np.float32)[None, None]


class EncodeControl(PipelineUnit):
    """Control images as tokens of latents, the posterior's mean, with the mask behind them where one is read.

    A hole is black in what a ControlNet sees, and grey for FLUX.1-Fill. Of the mask a ControlNet has one channel of the
    latents' size, 1 outside of the hole; FLUX.1-Fill has all its pixels, 1 in the hole.

    Source: diffusers 0.42, QwenImageControlNetInpaintPipeline and FluxFillPipeline; the mean of the posterior is
    DiffSynth-Studio's (diffusers samples it). Shapes: control_pixels, a list of float32 [1, 3, H, W], control_hole
    float32 [1, 1, H, W] or None -> control_latents float32 [1, K, N, C].
    """

    input_params = ("control_pixels", "control_hole")
    output_params = ("control_latents",)
    onload_model_names = ("vae",)
    options = vae_units.TILING

    def __init__(self, encode: type[vae_units.EncodeImage]):
        super().__init__()
        self.encode = encode

    def process(self, pipe, control_pixels, control_hole, tiled=None, tile_size=None, tile_stride=None):
        mean = vae_units.mean_latents(self.encode, pipe, tiled, tile_size, tile_stride)
        is_wide = pipe.control_channels > 0
        if control_hole is not None:
            there = 1 - control_hole
            black = 0.0 if is_wide else -1.0
            control_pixels = [Tensor(x.asnumpy() * there + black * control_hole) for x in control_pixels]
        latents = [mean(x) for x in control_pixels]
        if control_hole is None:
            tokens = [pack(x) for x in latents]
        elif is_wide:
            tokens = [ops.cat((pack(x), pack(Tensor(unshuffled(control_hole)))), 2) for x in latents]
        else:
            factor = control_hole.shape[2] // latents[0].shape[2]
            kept = Tensor(1 - control_hole[:, :, ::factor, ::factor])  # the nearest pixel, as PyTorch takes it
            tokens = [pack(ops.cat((x, kept), 1)) for x in latents]
        return {"control_latents": ops.stack(tokens, 1)}


class TakesControl:
    """Mixed into the class of an image pipeline: control images as further inputs.

    Attributes:
        control_mode: which of a union of ControlNets, a number, or one for each control image; None is 0.
        controlnet_lists: of a ControlNet: setting of its config.json -> its list of blocks, the list of what projects
            their samples, and how many a new one has.
        controlnet_settings: those that a new one has of the network's config.json.
    """

    control_mode: int | Sequence[int] | None = None
    inpaints = ""  # what diffusers puts into the name of a pipeline whose ControlNet fills holes
    aligned_inputs = INPUTS
    input_options = (*OPTIONS, "control_range")
    input_defaults = {**Pipeline.input_defaults, **dict.fromkeys(OPTIONS)}
    controlnet_lists: Mapping[str, tuple[str, str, int]]
    controlnet_settings: tuple[str, ...]

    @property
    def control_channels(self) -> int:
        """Channels of a token that the network itself takes beside those of the noisy latents."""
        return 0

    @property
    def reads_mask(self) -> bool:
        """Whether the network, or its ControlNet, fills a hole."""
        return "controlnet" in self.model_names and bool(self.config("controlnet").get("extra_condition_channels"))

    @property
    def saved_class(self) -> str:
        if "controlnet" not in self.model_names or "ControlNet" in super().saved_class:
            return super().saved_class
        return self.diffusers_class.replace("Pipeline", f"ControlNet{self.inpaints if self.reads_mask else ''}Pipeline")

    @property
    def control_form(self) -> str:
        """What control images are made into, for the fingerprint of a cache; empty where there are none."""
        if not set(INPUTS) & set(self.inputs):
            return ""
        return f"{self.control_channels} channels, {'with' if self.reads_mask else 'without'} a mask"

    def check_control(self, images: int, has_mask: bool) -> None:
        """Raises: ConfigError for control images that nothing reads, and a missing mask or image that is read."""
        is_wide = self.control_channels > 0
        if not is_wide and "controlnet" not in self.model_names:
            raise ConfigError("a control image is given, but nothing reads it: expected a ControlNet (the setting, or "
                              "flag, controlnet), or a network with channels for it, such as FLUX.1-Fill-dev.")
        if is_wide and images > 1:
            raise ConfigError(f"{images} control images: a network that takes them as channels reads one. Give one.")
        if self.reads_mask and not has_mask:
            raise ConfigError("control_mask is missing: this model fills a hole. Give a mask, white where the hole is; "
                              "to train, name its column: extra_inputs=control_mask.")
        if has_mask and not self.reads_mask:
            raise ConfigError("control_mask is given, but this model reads no mask. Remove it, or take a model for "
                              "inpainting.")

    def prepare_training(self, trained: Sequence[str]) -> None:
        super().prepare_training(trained)
        given = set(INPUTS) & set(self.inputs)
        if given:
            self.check_control(1, "control_mask" in given)
            if "control_image" not in given and not self.reads_mask:
                raise ConfigError("extra_inputs names control_mask without control_image. Name both.")
            if "edit_image" in self.inputs:
                raise ConfigError("extra_inputs names edit_image and control images: expected one of the two.")
        elif self.store.has_config("dit") and self.control_channels > 0:
            raise ConfigError("this network reads a control image beside the noisy latents: name its column, "
                              f"extra_inputs={'control_mask' if self.reads_mask else 'control_image'}.")

    def check_sampled(self, inputs: Mapping[str, Any]) -> None:
        super().check_sampled(inputs)
        if "control_image" in inputs and "edit_image" in inputs:
            raise ConfigError("edit_image and control_image are both given: expected one of the two.")
        if "control_image" not in inputs and (odd := [name for name in inputs if name in self.input_options
                                                      or name == "control_mask"]):
            raise ConfigError(f"{odd[0]} without control_image, of which it is: give one.")
        if "control_image" not in inputs and self.store.has_config("dit") and self.control_channels > 0:
            raise ConfigError("this network reads a control image beside the noisy latents: give control_image"
                              f"{', and control_mask' if self.reads_mask else ''}.")

    def check_widths(self, slots: Mapping[str, Any]) -> None:
        is_wide = self.store.has_config("dit") and self.control_channels > 0
        super().check_widths({name: slots[name] for name in slots if not (is_wide and name == "latents")})

    def control_units(self, encode: type[vae_units.EncodeImage]) -> dict[str, list]:
        """The units of the further inputs: the same for both, so that either may be there, or both."""
        units = [LoadControl(), EncodeControl(encode)]
        return {"control_image": units, "control_mask": units}
    def new_controlnet(self, layers: Sequence[int | None] = (), extra_channels: int = 0) -> None:
        """Give the pipeline a ControlNet of its network's first blocks, which changes nothing yet: what projects its
        samples, and what reads the condition, is zero. Source: diffusers 0.42, ``from_transformer``.

        Args:
            layers: how many blocks of each list of ``controlnet_lists``; None is the number there.
            extra_channels: of a condition's tokens, beside the latents': 4 for a mask.

        Raises: ConfigError for more blocks than the network has.
        """
        config = self.config("dit")
        own = {name: config[name] for name in self.controlnet_settings if name in config}
        without, zeros = ["norm_out.", "proj_out."], {}
        width = config["num_attention_heads"] * config["attention_head_dim"]
        shapes = {"controlnet_x_embedder": (width, config["in_channels"] + extra_channels)}
        given = [*layers, *[None] * len(self.controlnet_lists)]
        for (setting, (blocks, projections, usual)), count in zip(self.controlnet_lists.items(), given):
            most = config[setting]
            if count is not None and not 0 <= count <= most:
                raise ConfigError(f"a new ControlNet of {count} {blocks}: they are copies of the first of the network, "
                                  f"which has {most}. Set a number up to that.")
            own[setting] = min(usual, most) if count is None else count
            without += [f"{blocks}.{k}." for k in range(own[setting], most)]
            shapes |= {f"{projections}.{k}": (width, width) for k in range(own[setting])}
        for name, shape in shapes.items():
            zeros |= {f"{name}.weight": partial(_zeros, shape), f"{name}.bias": partial(_zeros, shape[:1])}
        own["_class_name"] = self.store.component("controlnet").class_name
        own |= {"extra_condition_channels": extra_channels} if extra_channels else {}
        if "dit" not in self.sources:  # of a run that is planned
            self.store.know({"controlnet": own})
            return
        self.store.add_component(self.store.component("controlnet"), replace(
            self.sources["dit"], config=own, left_out=zeros, without=tuple(without)))


def _zeros(shape: tuple[int, ...], _: Any) -> np.ndarray:
    return np.zeros(shape, np.float32)


def unshuffled(mask: np.ndarray) -> np.ndarray:
    """Squares of a mask as channels, row by row: [1, 1, H, W] -> [1, 64, H / 8, W / 8]."""
    height, width = (side // MASK_CELL for side in mask.shape[2:])
    squares = mask.reshape(1, height, MASK_CELL, width, MASK_CELL).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(squares.reshape(1, MASK_CELL * MASK_CELL, height, width))
