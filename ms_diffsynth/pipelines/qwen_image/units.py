"""What Qwen-Image encodes: the prompt by Qwen2.5-VL, the image as a video of one frame by the VAE; and decoding."""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from ms_diffsynth.errors import WeightError
from ms_diffsynth.pipelines.shared import vae_units
from ms_diffsynth.pipelines.shared.causal_vae import scale_factor
from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.pipelines.shared.text import EncodeTokens
from ms_diffsynth.units import PipelineUnit

# Source: diffusers 0.35 and DiffSynth-Studio 2.1.12; both drop the template's first 34 tokens from the hidden states
TEMPLATE = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
            "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
            "<|im_start|>assistant\n")
PREFIX = (151644, 8948, 198, 74785, 279, 2168, 553, 44193, 279, 1894, 11, 6083, 11, 1379, 11, 10434, 11, 12194, 11,
          1467, 11, 27979, 11871, 315, 279, 6171, 323, 4004, 25, 151645, 198, 151644, 872, 198)  # up to "user\n"


class TokenizePrompt(PipelineUnit):
    """The prompt in its template as token ids, without the template's prefix, which never changes.

    Line breaks at the beginning of a prompt go with the prefix, as in both references.

    Shapes: prompt str -> prompt_ids int32 [1, L], prompt_mask float32 [1, L], all ones; L is at most
    pipe.max_sequence_length, and what is cut off is logged.
    """

    input_params = ("prompt",)
    output_params = ("prompt_ids", "prompt_mask")
    onload_model_names = ("tokenizer",)

    def process(self, pipe, prompt):
        ids = pipe.tokenizer(TEMPLATE.format(prompt)).input_ids
        # without its last token: line breaks that a prompt begins with become one token with the template's
        if tuple(ids[:len(PREFIX) - 1]) != PREFIX[:-1]:
            raise WeightError(f"the tokenizer turns Qwen-Image's template into {ids[:4]}..., expected "
                              f"{list(PREFIX[:4])}...: another model's. Give the tokenizer/ folder of Qwen-Image.")
        ids, most = ids[len(PREFIX):], pipe.max_sequence_length
        if len(ids) > most:
            tell_cut(len(ids), "tokens", most, prompt)
        ids = np.array([ids[:most]], np.int32)
        return {"prompt_ids": Tensor(ids), "prompt_mask": Tensor(np.ones(ids.shape, np.float32))}


class EncodePrompt(EncodeTokens):
    """Hidden states of the prompt. Padding at its end changes none of them: attention is causal.

    Shapes: prompt_ids int32 [B, L] -> prompt_embeds float32 [B, L, D].
    """

    def construct(self, prompt_ids):
        prefix = ops.broadcast_to(Tensor([PREFIX], ms.int32), (prompt_ids.shape[0], len(PREFIX)))
        hidden = self.text_encoder(ops.cat((prefix, prompt_ids), 1))
        return (hidden[:, len(PREFIX):].astype(ms.float32),)


class EncodeImage(vae_units.EncodeImage):
    """The VAE's posterior: mean and log-variance, not a sample, so that it can be cached. An image is a film of one
    frame.

    Shapes: pixels float32 [B, 3, H, W] in [-1, 1] -> moments float32 [B, 2C, H/8, W/8].
    """

    scale_factor = staticmethod(scale_factor)

    def construct(self, pixels):
        moments = self.vae.encode(pixels.astype(self.dtype).expand_dims(2))[0]
        return (moments.squeeze(2).astype(ms.float32),)


class Decode(vae_units.Decode):
    """Pixels from latents.

    Shapes: latents float32 [B, C, H/8, W/8] -> pixels float32 [B, 3, H, W] in [-1, 1].
    """

    scale_factor = staticmethod(scale_factor)

    def attach(self, pipe):
        super().attach(pipe)
        config = pipe.config("vae")
        self.mean, self.std = (Tensor(np.array(config[name], np.float32).reshape(1, -1, 1, 1))
                               for name in ("latents_mean", "latents_std"))

    def construct(self, latents):
        latents = (latents * self.std + self.mean).astype(self.dtype)
        return (self.vae.decode(latents.expand_dims(2))[0].squeeze(2).astype(ms.float32),)
