"""FLUX.2 klein's text encoder: the lower three quarters of Qwen3, on mindone's layers, so that it compiles.

mindone's own ``construct`` is made for generation and does not compile. The upper quarter, the last norm and the head
over the vocabulary take no part, so they are not loaded: a quarter of the memory.

Shape legend: B batch, T tokens, H heads, K key heads, G = H / K, D channels of a head.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from ms_diffsynth.ops import install_cpu_kernels
from ms_diffsynth.pipelines.quiet import quiet_imports
from ms_diffsynth.pipelines.qwen_image.rotary import rotate_halves, text_table

install_cpu_kernels()  # a network of mindone is adapted while it is imported

with quiet_imports():
    from mindone.diffusers.models import layers_compat
    from mindone.transformers.models.qwen3 import modeling_qwen3 as mindone
    from transformers import Qwen3Config


@ops.constexpr
def causal_mask(tokens: int) -> Tensor:
    """1 where a token may look: at itself and those before it. float32 [1, 1, T, T].

    Float, because the gradients of what is handed to several cells are added, and there is no sum of bools.
    """
    return Tensor(np.tril(np.ones((1, 1, tokens, tokens), np.float32)))


class Qwen3Layer(mindone.Qwen3DecoderLayer):
    """One layer of the language model."""

    def construct(self, x, table, mask):
        """x [B, T, W], table of `text_table`, mask float32 [B, 1, T, T] -> the same shape as x."""
        x = x + attention(self.self_attn, self.input_layernorm(x), table, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention(attn: nn.Cell, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """Attention in which G heads share a key head. Source: mindone 0.5.0, Qwen3Attention."""
    batch, tokens, size = x.shape[0], x.shape[1], attn.head_dim
    q = rotate_halves(attn.q_norm(attn.q_proj(x).reshape(batch, tokens, -1, size)).swapaxes(1, 2), table)
    k = rotate_halves(attn.k_norm(attn.k_proj(x).reshape(batch, tokens, -1, size)).swapaxes(1, 2), table)
    v = attn.v_proj(x).reshape(batch, tokens, -1, size).swapaxes(1, 2)
    shape = (batch, k.shape[1], q.shape[1] // k.shape[1], tokens, size)
    k = ops.broadcast_to(k.expand_dims(2), shape).reshape(q.shape)
    v = ops.broadcast_to(v.expand_dims(2), shape).reshape(q.shape)
    out = layers_compat.scaled_dot_product_attention(q, k, v, mask > 0.5)
    return attn.o_proj(out.swapaxes(1, 2).reshape(batch, tokens, -1).astype(x.dtype))


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
