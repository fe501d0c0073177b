"""What Wan encodes: the prompt by UMT5, a film by its VAE, given frames, and the tokens of an image by CLIP."""
from __future__ import annotations

import html
import re

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from PIL import Image

from ms_diffsynth.data.images import to_rgb
from ms_diffsynth.data.operators import crop_and_resize
from ms_diffsynth.data.video import to_pixels
from ms_diffsynth.errors import ConfigError, DataError, WeightError
from ms_diffsynth.pipelines.shared import causal_vae
from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.units import PipelineUnit, TensorUnit

try:
    import ftfy
except ImportError:  # as in diffusers, what it would mend stays
    ftfy = None

TEXT_TOKENS = 512  # that the transformer sees of every prompt
CLIP_SIDE = 224  # pixels
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VOCABULARY_SLACK = 256  # entries of UMT5's embedding that are no token


def cleaned(prompt: str) -> str:
    """A prompt without broken encodings, HTML and runs of white space; the case stays.

    Source: diffusers 0.39, pipelines/wan, prompt_clean.
    """
    text = ftfy.fix_text(prompt) if ftfy else prompt
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip()


class TokenizePrompt(PipelineUnit):
    """The prompt as token ids, in their real length, the end mark included; what is cut off is logged.

    Shapes: prompt str -> prompt_ids int32 [1, L], L at most pipe.max_sequence_length.
    """

    input_params = ("prompt",)
    output_params = ("prompt_ids",)
    onload_model_names = ("tokenizer",)

    def process(self, pipe, prompt):
        text, most = cleaned(prompt), pipe.max_sequence_length
        known, entries = len(pipe.tokenizer), pipe.config("text_encoder")["vocab_size"]
        if not entries - VOCABULARY_SLACK <= known <= entries:
            raise WeightError(f"the tokenizer knows {known} tokens and the text encoder {entries}: they are of two "
                              "models. Give the tokenizer/ folder of the Wan model.")
        ids = pipe.tokenizer(text).input_ids
        if len(ids) > most:
            tell_cut(len(ids), "UMT5 tokens", most, prompt)
            ids = pipe.tokenizer(text, max_length=most, truncation=True).input_ids
        return {"prompt_ids": Tensor(np.array([ids], np.int32))}


class EncodePrompt(TensorUnit):
    """Hidden states of a prompt, and rows of zeros up to 512, which the transformer attends to.

    Padding (0), which ids have where prompts are a batch, is not attended to here; its rows are zeros too.

    Shapes: prompt_ids int32 [B, L] -> prompt_embeds float32 [B, 512, D].
    """

    input_params = ("prompt_ids",)
    output_params = ("prompt_embeds",)
    onload_model_names = ("text_encoder",)
    has_few_shapes = True

    def process(self, pipe, prompt_ids):
        """Compiled, ids are padded to one length."""
        if self.name in pipe.units_to_compile:
            prompt_ids = mint.nn.functional.pad(prompt_ids, (0, TEXT_TOKENS - prompt_ids.shape[1]))
        return super().process(pipe, prompt_ids=prompt_ids)

    def construct(self, prompt_ids):
        batch, tokens = prompt_ids.shape
        is_text = (prompt_ids != 0).astype(ms.float32)
        hidden = self.text_encoder(prompt_ids, is_text, return_dict=False)[0].astype(ms.float32)
        hidden = hidden * is_text.expand_dims(2)
        if tokens < TEXT_TOKENS:
            rest = ops.zeros((batch, TEXT_TOKENS - tokens, hidden.shape[2]), ms.float32)
            hidden = ops.cat((hidden, rest), 1)
        return (hidden,)


class EncodeImage(causal_vae.EncodeImage):
    """The VAE's posterior of a film, in float32. An image is a film of one frame.

    Shapes: pixels float32 [B, 3, 4 n + 1, H, W] in [-1, 1] -> moments float32 [B, 2 C, n + 1, h, w].
    """


class LoadGiven(PipelineUnit):
    """The frames that are given, as pixels: the first frame, the last one too if it is asked for.

    In training they are those of the film itself; in sampling ``input_image`` and ``end_image``, scaled and cropped as
    a film is. Others are gray, 0. A network that completes a film is given the first frame alone.

    Shapes: input_image, end_image PIL, video uint8 [F, H, W, 3] -> given_pixels float32 [1, 3, F, H, W] in [-1, 1], or
    [1, 3, 1, H, W]; first_pixels float32 [1, 3, K, H, W], the K = 1 or 2 of them that are given.
    """

    input_params = ("input_image?", "end_image?", "video?", "num_frames", "height", "width")
    output_params = ("given_pixels", "first_pixels")

    def process(self, pipe, input_image, end_image, video, num_frames, height, width):
        if num_frames == 1 and video is not None:
            raise DataError(f"{pipe.film_problem(num_frames, pipe.inputs)}.")
        if num_frames == 1:
            other = "" if pipe.has_condition else ", or leave input_image out"
            raise ConfigError("num_frames=1: a film of one frame whose first frame is given leaves nothing to make. "
                              f"Expected 5 or more. Raise num_frames{other}.")
        first = _pixels_of(input_image, video, 0, height, width, "input_image")
        has_end = "end_image" in pipe.inputs if video is not None else end_image is not None
        given = [first] + ([_pixels_of(end_image, video, -1, height, width, "end_image")] if has_end else [])
        if pipe.completes:
            if has_end:
                raise ConfigError("end_image: this model is given the first frame alone. Remove it.")
            return {"given_pixels": Tensor(first[None]), "first_pixels": Tensor(first[None])}
        film = np.zeros((3, num_frames, height, width), np.float32)
        film[:, :1] = first
        if has_end:
            film[:, -1:] = given[1]
        return {"given_pixels": Tensor(film[None]), "first_pixels": Tensor(np.concatenate(given, 1)[None])}


def _pixels_of(image: Image.Image | None, video: np.ndarray | None, frame: int, height: int, width: int,
               name: str) -> np.ndarray:
    """A given image, or a frame of the film: float32 [3, 1, H, W] in [-1, 1]."""
    if image is not None:
        return to_pixels(np.asarray(crop_and_resize(to_rgb(image, name), height, width))[None])
    if video is None:
        end = "begin" if frame == 0 else "end"
        raise ConfigError(f"{name} is missing: expected the image that the film is to {end} with. Give {name}.")
    return to_pixels(video[frame:][:1])


class EncodeGiven(TensorUnit):
    """What a network is told of given frames in further channels: which they are, and latents of the film of them.

    Four channels say which of the four frames of a latent one are given; the first frame stands for all four of its
    own. Then come the normalised latents of the film whose other frames are gray.

    Shapes: given_pixels float32 [B, 3, F, H, W], first_pixels [B, 3, K, H, W] -> condition float32
    [B, 4 + C, f, h, w]. Source: diffusers 0.39, WanImageToVideoPipeline.prepare_latents.
    """

    input_params = ("given_pixels", "first_pixels")
    output_params = ("condition",)
    onload_model_names = ("vae",)

    def attach(self, pipe):
        super().attach(pipe)
        self.mean, self.std = causal_vae.statistics(pipe.config("vae"))

    def construct(self, given_pixels, first_pixels):
        latents = (causal_vae.means(self.vae, given_pixels) - self.mean) / self.std
        mask = given_mask(latents.shape[2], first_pixels.shape[2] > 1)
        batch, _, frames, height, width = latents.shape
        return (ops.cat((ops.broadcast_to(mask, (batch, 4, frames, height, width)), latents), 1),)


@ops.constexpr
def given_mask(frames: int, has_end: bool) -> Tensor:
    """Which frames are given, by latent frame: float32 [1, 4, frames, 1, 1]."""
    given = np.zeros((frames, 4), np.float32)
    given[0] = 1
    if has_end:
        given[-1, -1] = 1
    return Tensor(given.T.reshape(1, 4, frames, 1, 1))


class EncodeFirst(TensorUnit):
    """Latents of the first frame, for a network that completes a film.

    Shapes: given_pixels float32 [B, 3, 1, H, W] -> given_latents float32 [B, C, 1, h, w].
    """

    input_params = ("given_pixels",)
    output_params = ("given_latents",)
    onload_model_names = ("vae",)

    def attach(self, pipe):
        super().attach(pipe)
        self.mean, self.std = causal_vae.statistics(pipe.config("vae"))

    def construct(self, given_pixels):
        return ((causal_vae.means(self.vae, given_pixels) - self.mean) / self.std,)


class EncodeImageTokens(PipelineUnit):
    """Tokens of the given frames by CLIP's image encoder, before its last layer.

    A frame is squashed to 224 x 224 pixels, as Wan's own code and DiffSynth-Studio do it; diffusers crops it to a
    square instead.

    Shapes: first_pixels float32 [1, 3, K, H, W] in [-1, 1] -> image_embeds float32 [1, 257 K, D].
    """

    input_params = ("first_pixels",)
    output_params = ("image_embeds",)
    onload_model_names = ("image_encoder",)

    def process(self, pipe, first_pixels):
        frames = first_pixels.asnumpy()[0].swapaxes(0, 1)  # [K, 3, H, W]
        small = [squashed(frame, CLIP_SIDE) for frame in frames]
        mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
        pixels = np.stack([(frame / 2 + np.float32(0.5) - mean) / std for frame in small]).astype(np.float32)
        hidden = pipe.image_encoder(Tensor(pixels))
        return {"image_embeds": hidden.reshape(1, -1, hidden.shape[-1]).astype(ms.float32)}


def squashed(image: np.ndarray, side: int) -> np.ndarray:
    """An image [C, H, W] at side x side, by cubic interpolation between four pixels, as PyTorch's: float32."""
    down, across = (_cubic(size, side) for size in image.shape[1:])
    return np.einsum("yh,chw,xw->cyx", down, image.astype(np.float64), across, optimize=True).astype(np.float32)


def _cubic(size: int, wanted: int) -> np.ndarray:
    """The weights of ``size`` pixels in each of ``wanted``, float64 [wanted, size]; the edge's go on beyond the edge.

    Source: Keys 1981 with a = -3/4; torch.nn.functional.interpolate(mode="bicubic", align_corners=False).
    """
    a, weights = -0.75, np.zeros((wanted, size))
    place = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    for k in range(-1, 3):
        pixel = np.floor(place) + k
        d = np.abs(place - pixel)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        np.add.at(weights, (np.arange(wanted), np.clip(pixel, 0, size - 1).astype(int)), np.where(d <= 1, near, far))
    return weights
