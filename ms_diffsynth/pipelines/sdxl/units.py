"""What SDXL encodes: the prompt by two CLIPs, and how the image was cut out of its file. Images go through the units of
AutoencoderKL (`shared.autoencoder_kl`), in float32."""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from ms_diffsynth.data.operators import Framing, framing
from ms_diffsynth.pipelines.shared.text import CLIP_TOKENS, padded_ids
from ms_diffsynth.units import PipelineUnit, TensorUnit


class TokenizePrompt(PipelineUnit):
    """The prompt as token ids of two tokenizers, padded to 77 tokens; what is cut off is logged.

    Shapes: prompt str -> clip_l_ids and clip_g_ids int32 [1, 77].
    """

    input_params = ("prompt",)
    output_params = ("clip_l_ids", "clip_g_ids")
    onload_model_names = ("tokenizer_1", "tokenizer_2")

    def process(self, pipe, prompt):
        return {"clip_l_ids": padded_ids(pipe.tokenizer_1, prompt, CLIP_TOKENS, "CLIP-L"),
                "clip_g_ids": padded_ids(pipe.tokenizer_2, prompt, CLIP_TOKENS, "CLIP-G")}


class EncodePrompt(TensorUnit):
    """Conditions from token ids: both CLIPs' hidden states before their last layer, side by side in the channels, and
    the projected output of the second.

    Shapes: clip_l_ids and clip_g_ids int32 [B, 77] -> prompt_embeds float32 [B, 77, D], pooled_prompt_embeds float32
    [B, P]. Source: diffusers 0.39, StableDiffusionXLPipeline.encode_prompt.
    """

    input_params = ("clip_l_ids", "clip_g_ids")
    output_params = ("prompt_embeds", "pooled_prompt_embeds")
    onload_model_names = ("text_encoder_1", "text_encoder_2")
    has_few_shapes = True  # prompts are padded to one length

    def construct(self, clip_l_ids, clip_g_ids):
        _, _, layers_l = self.text_encoder_1(clip_l_ids, output_hidden_states=True, return_dict=False)
        pooled, _, layers_g = self.text_encoder_2(clip_g_ids, output_hidden_states=True, return_dict=False)
        prompt_embeds = mint.cat((layers_l[-2], layers_g[-2]), dim=-1)
        return prompt_embeds.astype(ms.float32), pooled.astype(ms.float32)


class SizeConditions(PipelineUnit):
    """Which part of which image is seen: its own size, the top left corner of the part, and the size that it has here.

    Of an image that a data set made, as it was made; without an image, or of one that sampling starts from, all of an
    image of height x width, by default of the pipeline's usual size. Pixels; the corner counts in the image as it was
    scaled.

    Shapes: height, width, and maybe input_image PIL -> time_ids float32 [1, 6]: original height and width, top, left,
    height, width.
    """

    input_params = ("height?", "width?", "input_image?")
    output_params = ("time_ids",)

    def process(self, pipe, height=None, width=None, input_image=None):
        height, width = height or pipe.sampling.height, width or pipe.sampling.width
        seen = Framing(height, width, 0, 0) if input_image is None else framing(input_image)
        return {"time_ids": Tensor(np.array([[*seen, height, width]], np.float32))}
