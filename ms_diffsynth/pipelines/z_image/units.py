"""What Z-Image encodes: the prompt by Qwen3. Images go through the units of AutoencoderKL (`shared.autoencoder_kl`)."""
from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.pipelines.shared.text import EncodeTokens, check_template
from ms_diffsynth.units import PipelineUnit

# Qwen3's chat template with enable_thinking=True, which adds nothing: FLUX.2-klein's has an empty thought behind it.
# Source: diffusers 0.36, ZImagePipeline.encode_prompt
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
BEFORE, BEHIND = (151644, 872, 198), (151645, 198, 151644, 77091, 198)


class TokenizePrompt(PipelineUnit):
    """The prompt in its template as token ids, in their real length.

    Shapes: prompt str -> prompt_ids int32 [1, L], prompt_mask float32 [1, L], all ones; L is at most
    pipe.max_sequence_length. What is cut off, at the end and so of the template first, is logged.
    """

    input_params = ("prompt",)
    output_params = ("prompt_ids", "prompt_mask")
    onload_model_names = ("tokenizer",)

    def process(self, pipe, prompt):
        # without the last of BEFORE: line breaks that a prompt begins with become one token with the template's
        ids = check_template(pipe.tokenizer(TEMPLATE.format(prompt)).input_ids, BEFORE[:-1], BEHIND, "Qwen3", "Z-Image")
        most = pipe.max_sequence_length
        if len(ids) > most:
            tell_cut(len(ids), "tokens, template included,", most, prompt)
        ids = np.array([ids[:most]], np.int32)
        return {"prompt_ids": Tensor(ids), "prompt_mask": Tensor(np.ones(ids.shape, np.float32))}


class EncodePrompt(EncodeTokens):
    """Hidden states of the prompt before the last layer of the language model.

    Shapes: prompt_ids int32 [B, L] -> prompt_embeds float32 [B, L, D].
    """
