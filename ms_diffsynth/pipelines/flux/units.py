"""What FLUX.1 encodes: the prompt, by CLIP and T5; and the references of FLUX.1-Kontext, by the VAE."""
from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np

from ms_diffsynth.pipelines.flux.denoise import places
from ms_diffsynth.pipelines.shared import edit
from ms_diffsynth.pipelines.shared.autoencoder_kl import EncodeImage
from ms_diffsynth.pipelines.shared.text import CLIP_TOKENS, padded_ids
from ms_diffsynth.units import PipelineUnit, TensorUnit


class TokenizePrompt(PipelineUnit):
    """The prompt as token ids, padded to a fixed length; what is cut off is logged.

    Shapes: prompt str -> clip_ids int32 [1, 77], t5_ids int32 [1, pipe.max_sequence_length].
    """

    input_params = ("prompt",)
    output_params = ("clip_ids", "t5_ids")
    onload_model_names = ("tokenizer_1", "tokenizer_2")

    def process(self, pipe, prompt):
        return {"clip_ids": padded_ids(pipe.tokenizer_1, prompt, CLIP_TOKENS, "CLIP"),
                "t5_ids": padded_ids(pipe.tokenizer_2, prompt, pipe.max_sequence_length, "T5")}


class EncodePrompt(TensorUnit):
    """Conditions from token ids: T5's hidden states and CLIP's pooled output.

    Shapes: clip_ids int32 [B, 77], t5_ids int32 [B, L] -> prompt_embeds float32 [B, L, D],
    pooled_prompt_embeds float32 [B, P].
    """

    input_params = ("clip_ids", "t5_ids")
    output_params = ("prompt_embeds", "pooled_prompt_embeds")
    onload_model_names = ("text_encoder_1", "text_encoder_2")
    has_few_shapes = True  # prompts are padded to one length

    def construct(self, clip_ids, t5_ids):
        pooled_prompt_embeds = self.text_encoder_1(clip_ids, return_dict=False)[1]
        prompt_embeds = self.text_encoder_2(t5_ids, return_dict=False)[0]
        return prompt_embeds.astype(ms.float32), pooled_prompt_embeds.astype(ms.float32)


class EncodeEditImage(edit.EncodeEditImage):
    """References of FLUX.1-Kontext. All have 1 on the first axis, and rows and columns from 0.

    Shapes: edit_pixels, a list of float32 [B, 3, h, w] -> edit_latents float32 [B, M, C], edit_places int32 [B, M, 3].

    Source: diffusers 0.42, FluxKontextPipeline; for several references DiffSynth-Studio 2.1.12, FluxImageUnit_Kontext.
    """

    encode, axes = EncodeImage, 3

    def places(self, sides: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([places(*side, first=1) for side in sides]).astype(np.int32)
