"""Qwen3 as a text encoder, on mindone's layers: the hidden states of FLUX.2-klein and Z-Image.

mindone's own ``construct`` is made for generation and does not compile.

Shape legend: B batch, T tokens, W channels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn

from ms_diffsynth.models import arguments
from ms_diffsynth.pipelines.shared.language_model import LowerLayers, TakesTokens, attend, heads
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

with quiet_imports():
    from mindone.transformers.models.qwen3 import modeling_qwen3 as qwen3
    from transformers import Qwen3Config


class Qwen3Layer(qwen3.Qwen3DecoderLayer):
    """One layer of the language model, which normalises queries and keys."""

    def construct(self, x, table, looks, sees):
        """x [B, T, W], table of `text_table`, looks and sees of `where_to_look` -> the same shape as x."""
        attn, y = self.self_attn, self.input_layernorm(x)
        q, k = attn.q_norm(heads(attn.q_proj(y), attn.head_dim)), attn.k_norm(heads(attn.k_proj(y), attn.head_dim))
        x = x + sees * attend(attn, q, k, heads(attn.v_proj(y), attn.head_dim), table, looks)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Layers(LowerLayers, qwen3.Qwen3Model):
    layer_class = Qwen3Layer


class Qwen3TextEncoder(TakesTokens, nn.Cell):
    """Hidden states of a prompt after some of the layers, joined; parameters are named as in Qwen3ForCausalLM's files.

    Shapes: ids int32 [B, T], mask float32 [B, T] (1 for text, 0 for padding on either side; None: all text) ->
    [B, T, n W] for n counts of layers.

    Args:
        layers_read: from the number of layers to the counts after which it is read.
    """

    def __init__(self, config: dict[str, Any], layers_read: Callable[[int], tuple[int, ...]]):
        super().__init__()
        self.config = Qwen3Config(**arguments(Qwen3Config, config))
        self.model = Qwen3Layers._from_config(self.config, layers_read=layers_read)

    def construct(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(ids, mask)
