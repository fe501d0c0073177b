"""What Stable Diffusion 3 encodes: the prompt by two CLIPs and T5. Images go through the units of
AutoencoderKL (`shared.autoencoder_kl`)."""
from __future__ import annotations

import mindspore as ms
from mindspore import mint

from ms_diffsynth.pipelines.shared.text import CLIP_TOKENS, padded_ids
from ms_diffsynth.units import PipelineUnit, TensorUnit


class TokenizePrompt(PipelineUnit):
    """The prompt as token ids of three tokenizers, padded to fixed lengths; what is cut off is logged.

    Shapes: prompt str -> clip_l_ids and clip_g_ids int32 [1, 77], t5_ids int32 [1, pipe.max_sequence_length].
    """

    input_params = ("prompt",)
    output_params = ("clip_l_ids", "clip_g_ids", "t5_ids")
    onload_model_names = ("tokenizer_1", "tokenizer_2", "tokenizer_3")

    def process(self, pipe, prompt):
        return {"clip_l_ids": padded_ids(pipe.tokenizer_1, prompt, CLIP_TOKENS, "CLIP-L"),
                "clip_g_ids": padded_ids(pipe.tokenizer_2, prompt, CLIP_TOKENS, "CLIP-G"),
                "t5_ids": padded_ids(pipe.tokenizer_3, prompt, pipe.max_sequence_length, "T5")}


class EncodePrompt(TensorUnit):
    """Conditions from token ids.

    The CLIPs' hidden states before their last layer lie side by side in the channels, then zeros up to T5's width;
    T5's hidden states follow as further tokens, zeros for a model without T5. The CLIPs' projected outputs lie side by
    side as the pooled condition.

    Shapes: clip_l_ids and clip_g_ids int32 [B, 77], t5_ids int32 [B, L] -> prompt_embeds float32 [B, 77 + L, D],
    pooled_prompt_embeds float32 [B, P]. Source: diffusers 0.39, StableDiffusion3Pipeline.encode_prompt.
    """

    input_params = ("clip_l_ids", "clip_g_ids", "t5_ids")
    output_params = ("prompt_embeds", "pooled_prompt_embeds")
    onload_model_names = ("text_encoder_1", "text_encoder_2", "text_encoder_3")
    has_few_shapes = True  # prompts are padded to one length

    def attach(self, pipe):
        self.has_t5 = pipe.has_t5
        self.text_encoder_1, self.text_encoder_2 = pipe.text_encoder_1, pipe.text_encoder_2
        if self.has_t5:
            self.text_encoder_3 = pipe.text_encoder_3
        else:
            self.t5_width = pipe.config("dit")["joint_attention_dim"]

    def construct(self, clip_l_ids, clip_g_ids, t5_ids):
        pooled_l, _, layers_l = self.text_encoder_1(clip_l_ids, output_hidden_states=True, return_dict=False)
        pooled_g, _, layers_g = self.text_encoder_2(clip_g_ids, output_hidden_states=True, return_dict=False)
        clip = mint.cat((layers_l[-2], layers_g[-2]), dim=-1)
        if self.has_t5:
            t5 = self.text_encoder_3(t5_ids, return_dict=False)[0]
        else:
            t5 = mint.zeros((t5_ids.shape[0], t5_ids.shape[1], self.t5_width), dtype=clip.dtype)
        clip = mint.nn.functional.pad(clip, (0, t5.shape[2] - clip.shape[2]))
        prompt_embeds, pooled = mint.cat((clip, t5), dim=1), mint.cat((pooled_l, pooled_g), dim=-1)
        return prompt_embeds.astype(ms.float32), pooled.astype(ms.float32)
