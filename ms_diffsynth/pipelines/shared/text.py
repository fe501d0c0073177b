"""The text encoders CLIP and T5 of mindone, tokenizers, a prompt as token ids, and the unit of a language model.

Networks are imported in the functions, so that a family can be described without them.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from ms_diffsynth.errors import DeviceError, WeightError
from ms_diffsynth.models import arguments, blocks, columns
from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.t5 import with_exact_buckets
from ms_diffsynth.units import TensorUnit

CLIP_TOKENS = 77
# the tokenizers of CLIP-L and T5 v1.1, as published with FLUX.1, of CLIP-G, which pads with "!", and of Qwen2.5
CLIP_TOKENIZER, CLIP_G_TOKENIZER, T5_TOKENIZER, QWEN_TOKENIZER = (
    Path(__file__).parent / "tokenizers" / name for name in ("clip", "clip_g", "t5", "qwen2"))


# config.json of text encoders that ComfyUI's single files come without
CLIP_L = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768,
          "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
          "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 768, "bos_token_id": 0,
          "eos_token_id": 2, "pad_token_id": 1}
T5_XXL = {"architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64,
          "d_ff": 10240, "num_layers": 24, "num_heads": 64, "relative_attention_num_buckets": 32,
          "relative_attention_max_distance": 128, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu",
          "is_gated_act": True, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False}
CLIP_G = CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                   "hidden_act": "gelu", "projection_dim": 1280}
CLIP_TOLD_BY = {"hidden_size": columns("text_model.embeddings.token_embedding.weight"),
                "num_hidden_layers": blocks("text_model.encoder.layers.")}
T5_TOLD_BY = {"d_model": columns("shared.weight"), "num_layers": blocks("encoder.block.")}

# of Qwen/Qwen3-4B and Qwen/Qwen3-8B
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 40960, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "vocab_size": 151936, "use_sliding_window": False}
QWEN3: dict[str, dict[str, Any]] = {
    "Qwen3-4B": _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "Qwen3-8B": _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
QWEN3_TOLD_BY = {"hidden_size": columns("model.embed_tokens.weight"),
                 "intermediate_size": columns("model.layers.0.mlp.down_proj.weight")}
# Qwen2.5's vocabulary is Qwen3's without these four, which come right behind it
_LATER_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")


def build_clip(config: dict[str, Any], class_name: str = "CLIPTextModel"):
    with quiet_imports():
        from mindone import transformers as networks
        from transformers import CLIPTextConfig

    return getattr(networks, class_name)(CLIPTextConfig(**arguments(CLIPTextConfig, config)))


def build_clip_with_projection(config: dict[str, Any]):
    return build_clip(config, "CLIPTextModelWithProjection")


def build_clip_g(config: dict[str, Any]):
    cell = build_clip_with_projection(config)
    cell.update_parameters_name("text_encoder_2.")  # in compiled code CLIP-L's Parameters have the same names
    return cell


def build_t5(config: dict[str, Any]):
    with quiet_imports():
        from mindone.transformers import T5EncoderModel
        from transformers import T5Config

    return with_exact_buckets(T5EncoderModel(T5Config(**arguments(T5Config, config))))


def build_clip_tokenizer(folder: Path):
    with quiet_imports():
        from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if tokenizer.fix_text is None:  # transformers would continue with another reading of quotes, Chinese and emoji
        raise DeviceError("the package ftfy is not installed: CLIP's tokenizer needs it, and without it gives other "
                          "tokens for curly quotes, Chinese and emoji. Install it: pip install ftfy.")
    return tokenizer


def build_t5_tokenizer(folder: Path):
    with quiet_imports():
        from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder)


def build_qwen_tokenizer(folder: Path):
    with quiet_imports():
        from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(folder)


def build_qwen3_tokenizer(folder: Path):
    tokenizer = build_qwen_tokenizer(folder)
    tokenizer.add_tokens([token for token in _LATER_TOKENS if token not in tokenizer.get_vocab()])
    return tokenizer


def check_template(ids: list[int], before: Sequence[int], behind: Sequence[int], language_model: str,
                   model: str) -> list[int]:
    """``ids``, a prompt in the template of its language model. Raises: WeightError for another model's tokenizer, which
    gives other tokens before and behind the prompt."""
    if tuple(ids[:len(before)]) != before or tuple(ids[-len(behind):]) != behind:
        raise WeightError(f"the tokenizer turns {language_model}'s chat template into {ids[:len(before)]} ... "
                          f"{ids[-len(behind):]}, expected {list(before)} ... {list(behind)}: another model's. "
                          f"Give the tokenizer/ folder of {model}.")
    return ids


def padded_ids(tokenizer: Any, prompt: str, length: int, name: str) -> Tensor:
    """The ids of a prompt, padded or cut to ``length``: int32 [1, length]; what is cut off is logged."""
    whole = len(tokenizer(prompt).input_ids)
    if whole > length:
        tell_cut(whole, f"{name} tokens", length, prompt)
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    return Tensor(ids.astype(np.int32))


class EncodeTokens(TensorUnit):
    """Hidden states of a prompt by a causal language model, to which padding at the end changes nothing.

    Shapes: prompt_ids int32 [B, L] -> prompt_embeds float32 [B, L, D].
    """

    input_params = ("prompt_ids",)
    output_params = ("prompt_embeds",)
    onload_model_names = ("text_encoder",)
    has_few_shapes = True

    def process(self, pipe, prompt_ids):
        """Compiled, a prompt is padded to the next of the pipeline's lengths."""
        length = prompt_ids.shape[1]
        if self.name not in pipe.units_to_compile:
            return super().process(pipe, prompt_ids=prompt_ids)
        longer = next((n for n in sorted(pipe.prompt_lengths) if n >= length), length)
        padded = mint.nn.functional.pad(prompt_ids, (0, longer - length))
        return {"prompt_embeds": super().process(pipe, prompt_ids=padded)["prompt_embeds"][:, :length]}

    def construct(self, prompt_ids):
        return (self.text_encoder(prompt_ids).astype(ms.float32),)
