"""What Qwen-Image-Edit encodes besides: references by the VAE, and by the vision tower of its text encoder.

The first model shows its text encoder the reference as the VAE sees it. -2509 and -2511 ("plus") take several, show
each at 384 x 384 pixels, and number them: "Picture 1: ". A row without a reference has Qwen-Image's own template.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from PIL import Image

from ms_diffsynth.errors import DataError, WeightError
from ms_diffsynth.pipelines.qwen_image import units
from ms_diffsynth.pipelines.qwen_image.rotary import reference_places
from ms_diffsynth.pipelines.shared import edit
from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.units import PipelineUnit, TensorUnit

# Source: diffusers 0.42, QwenImageEditPipeline and QwenImageEditPlusPipeline; DiffSynth-Studio 2.1.12
TEMPLATE = ("<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
            "background), then explain how the user's text instruction should alter or modify the image. Generate a "
            "new image that meets the user's requirements while maintaining consistency with the original input where "
            "appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
PREFIX = (151644, 8948, 198, 74785, 279, 1376, 4419, 315, 279, 1946, 2168, 320, 3423, 11, 6083, 11, 1379, 11, 10434, 11,
          6171, 11, 4004, 701, 1221, 10339, 1246, 279, 1196, 594, 1467, 7600, 1265, 11596, 476, 5602, 279, 2168, 13,
          19813, 264, 501, 2168, 429, 20027, 279, 1196, 594, 8502, 1393, 20337, 28137, 448, 279, 4024, 1946, 1380, 8311,
          13, 151645, 198, 151644, 872, 198)  # up to "user\n"
BEGIN, PICTURE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
PLUS_AREA, PLUS_FACTOR = 384 * 384, 32  # pixels of a picture of the plus models, and what its sides are multiples of
STYLES = ("first", "plus")


def plus_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of a picture for the vision tower of the plus models. Source: diffusers, calculate_dimensions."""
    across = math.sqrt(PLUS_AREA * width / height)
    return tuple(max(1, round(side / PLUS_FACTOR)) * PLUS_FACTOR for side in (across, across * height / width))


class EncodeEditImage(edit.EncodeEditImage):
    """References by Qwen-Image's VAE: the k-th is frame k.

    Shapes: edit_pixels, a list of float32 [B, 3, h, w] -> edit_latents float32 [B, M, C], edit_places int32 [B, M, 4].
    """

    encode, places, axes = units.EncodeImage, staticmethod(reference_places), 4


class EncodePictures(PipelineUnit):
    """References as the text encoder sees them, and the sides of each in tokens.

    Shapes: edit_image PIL, a list of them, or None -> vision_embeds float32 [1, V, W], picture_sides, a list of (rows,
    columns).
    """

    input_params = ("edit_image",)
    output_params = ("vision_embeds", "picture_sides")
    onload_model_names = ("vision_tower",)

    def process(self, pipe, edit_image):
        from ms_diffsynth.pipelines.qwen_image.vision import MERGE, patches_of  # imports mindone's networks

        images = edit.references(edit_image)
        if not images:
            width = pipe.config("text_encoder")["vision_config"]["out_hidden_size"]
            return {"vision_embeds": Tensor(np.zeros((1, 0, width), np.float32)), "picture_sides": []}
        pipe.check_editing()
        embeds, sides = [], []
        for image in images:
            patches, (rows, columns) = patches_of(self.picture(pipe, image))
            embeds.append(pipe.vision_tower(Tensor(patches), rows, columns).astype(ms.float32))
            sides.append((rows // MERGE, columns // MERGE))
        return {"vision_embeds": ops.cat(embeds, 0).expand_dims(0), "picture_sides": sides}

    @staticmethod
    def picture(pipe, image: Image.Image) -> Image.Image:
        """A reference as the processor is given it."""
        if pipe.edit_style == "first":
            return edit.within(image, pipe.edit_max_pixels, pipe.division_factor)
        return image.resize(plus_size(*image.size), Image.Resampling.LANCZOS)

    @staticmethod
    def sides(pipe, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """``picture_sides`` of references of these (height, width)."""
        from ms_diffsynth.pipelines.qwen_image.vision import MERGE, PATCH, fitting

        side, found = MERGE * PATCH, []
        for height, width in sizes:
            if pipe.edit_style == "first":
                down, across = fitting(*pipe.reference_size(height, width))
            else:
                down, across = fitting(*plus_size(width, height)[::-1])
            found.append((down // side, across // side))
        return found


class TokenizeEditPrompt(PipelineUnit):
    """The prompt with its pictures in the template of editing, as token ids without the template's prefix, and where
    each token lies for the language model. Without pictures as `units.TokenizePrompt`.

    Shapes: prompt str, picture_sides, a list of (rows, columns) -> prompt_ids int32 [1, L], prompt_mask float32 [1, L],
    prompt_places int32 [1, L, 4]: three positions, and which token of a picture it is, counted from 1; 0 for text.
    pipe.max_sequence_length is of the text alone.
    """

    input_params = ("prompt", "picture_sides")
    output_params = ("prompt_ids", "prompt_mask", "prompt_places")
    onload_model_names = ("tokenizer",)

    def process(self, pipe, prompt, picture_sides):
        if not picture_sides:
            found = units.TokenizePrompt.process(self, pipe, prompt)
            places = np.repeat(np.arange(found["prompt_ids"].shape[1])[None, :, None] + len(units.PREFIX), 4, 2)
            places[..., 3] = 0
            return found | {"prompt_places": Tensor(places.astype(np.int32))}
        counts = [rows * columns for rows, columns in picture_sides]
        named = [f"Picture {k}: " if pipe.edit_style == "plus" else "" for k in range(1, len(counts) + 1)]
        pictures = "".join(f"{name}{BEGIN}{PICTURE * count}{END}" for name, count in zip(named, counts))
        ids = pipe.tokenizer(TEMPLATE.format(pictures + prompt)).input_ids
        if tuple(ids[:len(PREFIX)]) != PREFIX:
            raise WeightError(f"the tokenizer turns Qwen-Image-Edit's template into {ids[:4]}..., expected "
                              f"{list(PREFIX[:4])}...: another model's. Give the tokenizer/ folder of Qwen-Image.")
        ids = np.array(ids[len(PREFIX):], np.int32)
        is_picture = ids == pipe.tokenizer.convert_tokens_to_ids(PICTURE)
        if is_picture.sum() != sum(counts):
            raise DataError(f"a prompt has {PICTURE} in it, which stands for the tokens of a picture. Remove it.")
        begin, most = int(np.flatnonzero(is_picture)[-1]) + 2, pipe.max_sequence_length  # text follows END
        if len(ids) - begin > most:
            tell_cut(len(ids) - begin, "tokens", most, prompt)
        ids, is_picture = ids[:begin + most], is_picture[:begin + most]
        return {"prompt_ids": Tensor(ids[None]), "prompt_mask": Tensor(np.ones((1, len(ids)), np.float32)),
                "prompt_places": Tensor(text_places(is_picture, picture_sides, len(PREFIX))[None])}


def text_places(is_picture: np.ndarray, sides: Sequence[tuple[int, int]], begin: int = 0) -> np.ndarray:
    """Where tokens lie for Qwen2.5-VL's language model: int32 [T, 4].

    Text goes on by one on all three axes; a picture of (rows, columns) tokens, the next run of True in ``is_picture``,
    has its first position on the first axis, and counts rows and columns on from it on the others; text goes on behind
    the larger of its sides. The last number counts the tokens of pictures from 1. Source: transformers 4.57,
    get_rope_index.
    """
    places, place, token, seen = np.zeros((len(is_picture), 4), np.int32), begin, 0, 0
    sides = iter(sides)
    while token < len(is_picture):
        if not is_picture[token]:
            places[token, :3] = place
            place, token = place + 1, token + 1
            continue
        rows, columns = next(sides)
        count = rows * columns
        places[token:token + count] = np.stack([np.full(count, place), place + np.arange(count) // columns,
                                                place + np.arange(count) % columns, seen + 1 + np.arange(count)], 1)
        place, token, seen = place + max(rows, columns), token + count, seen + count
    return places


class EncodeEditPrompt(units.EncodePrompt):
    """Hidden states of the prompt and its pictures. Padding at its end changes none of them: attention is causal.

    Shapes: prompt_ids int32 [B, L], vision_embeds [B, V, W], prompt_places int32 [B, L, 4] -> prompt_embeds float32
    [B, L, D].
    """

    input_params = ("prompt_ids", "vision_embeds", "prompt_places")
    has_few_shapes = False

    def process(self, pipe, **inputs):
        return TensorUnit.process(self, pipe, **inputs)

    def construct(self, prompt_ids, vision_embeds, prompt_places):
        if vision_embeds.shape[1] == 0:
            return super().construct(prompt_ids)
        prefix = ops.broadcast_to(Tensor([PREFIX], ms.int32), (prompt_ids.shape[0], len(PREFIX)))
        places = ops.broadcast_to(prefix_places(), (prompt_ids.shape[0], len(PREFIX), 4))
        hidden = self.text_encoder(ops.cat((prefix, prompt_ids), 1), vision_embeds, ops.cat((places, prompt_places), 1))
        return (hidden[:, len(PREFIX):].astype(ms.float32),)


@ops.constexpr
def prefix_places() -> Tensor:
    """Of the template's prefix: int32 [1, 64, 4]."""
    return Tensor(text_places(np.zeros(len(PREFIX), bool), ())[None])
