"""FLUX.2 klein's text encoder: the lower three quarters of Qwen3, on mindone's layers, so that it compiles.

mindone's own ``construct`` is made for generation and does not compile. The upper quarter, the last norm and the head
over the vocabulary take no part, so they are not loaded: a quarter of the memory.

Shape legend: B batch, T tokens, H heads, K key heads, G = H / K, D channels of a head.
"""
from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn, ops

from ms_diffsynth.pipelines.language_model import attend, causal_mask, heads
from ms_diffsynth.pipelines.quiet import quiet_imports
from ms_diffsynth.pipelines.qwen_image.rotary import text_table

with quiet_imports():
    from mindone.transformers.models.qwen3 import modeling_qwen3 as mindone
    from transformers import Qwen3Config


class Qwen3Layer(mindone.Qwen3DecoderLayer):
    """One layer of the language model."""

    def construct(self, x, table, mask):
        """x [B, T, W], table of `text_table`, mask float32 [B, 1, T, T] -> the same shape as x."""
        x = x + attention(self.self_attn, self.input_layernorm(x), table, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention(attn: nn.Cell, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """x [B, T, W] -> the same shape; see `language_model.attend`."""
    q, k = attn.q_norm(heads(attn.q_proj(x), attn.head_dim)), attn.k_norm(heads(attn.k_proj(x), attn.head_dim))
    return attend(attn, q, k, heads(attn.v_proj(x), attn.head_dim), table, mask)


class Qwen3Layers(mindone.Qwen3Model):
    """Embedding and layers, without the last norm."""

    def construct(self, ids, table, mask, taken):
        """ids int32 [B, T] -> the hidden states after each of the ``taken`` counts of layers, side by side."""
        x, kept = self.embed_tokens(ids), ()
        for k in range(len(self.layers)):
            x = self.layers[k](x, table, mask)
            if k + 1 in taken:
                kept = kept + (x,)
        return ops.cat(kept, -1)


class Qwen3TextEncoder(nn.Cell):
    """Hidden states of a prompt at a quarter, a half and three quarters of the layers (9, 18 and 27 of 36), joined.

    Shapes: ids int32 [B, T], mask float32 [B, T] (1 for text, 0 for padding behind it) -> [B, T, 3 W].
    Source: diffusers 0.37, Flux2KleinPipeline; klein of 4B and 9B have 36 layers.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = Qwen3Config(**config)
        layers = self.config.num_hidden_layers
        self.taken = (layers // 4, layers // 2, 3 * layers // 4)
        lower = dict(config, num_hidden_layers=self.taken[-1])
        if lower.get("layer_types"):
            lower["layer_types"] = lower["layer_types"][:self.taken[-1]]
        lower = Qwen3Config(**lower)
        self.theta, self.head_dim = float(lower.rope_theta), lower.head_dim
        self.model = mindone.Qwen3Model._from_config(lower)
        self.model.__class__ = Qwen3Layers
        del self.model.rotary_emb
        del self.model.norm
        for layer in self.model.layers:
            layer.__class__ = Qwen3Layer

    def construct(self, ids, mask):
        tokens = ids.shape[1]
        looks = causal_mask(tokens) * mask.reshape(mask.shape[0], 1, 1, tokens)
        return self.model(ids, text_table(tokens, self.head_dim, self.theta), looks, self.taken)
