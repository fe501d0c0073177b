"""The language model of Qwen2.5-VL on mindone's layers, so that it compiles: text only, attended causally.

mindone's own ``construct`` is made for generation (caches, keyword arguments that are popped) and does not compile. On
text alone its three position axes coincide, which is the plain rotary embedding of `rotary.text_table`.

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
    from mindone.transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as mindone
    from transformers import Qwen2_5_VLConfig


@ops.constexpr
def causal_mask(tokens: int) -> Tensor:
    """1 where a token may look: at itself and those before it. float32 [1, 1, T, T].

    Float, because the gradients of what is handed to several cells are added, and there is no sum of bools.
    """
    return Tensor(np.tril(np.ones((1, 1, tokens, tokens), np.float32)))


class QwenTextLayer(mindone.Qwen2_5_VLDecoderLayer):
    """One layer of the language model."""

    def construct(self, x, table, mask):
        """x [B, T, H D], table of `rotary.text_table`, mask of `causal_mask` -> the same shape as x."""
        x = x + attention(self.self_attn, self.input_layernorm(x), table, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention(attn: nn.Cell, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """Causal attention in which G heads share a key head. Source: mindone 0.5.0, Qwen2_5_VLAttention."""
    batch, tokens, size = x.shape[0], x.shape[1], attn.head_dim
    q = rotate_halves(attn.q_proj(x).reshape(batch, tokens, -1, size).swapaxes(1, 2), table)
    k = rotate_halves(attn.k_proj(x).reshape(batch, tokens, -1, size).swapaxes(1, 2), table)
    v = attn.v_proj(x).reshape(batch, tokens, -1, size).swapaxes(1, 2)
    shape = (batch, k.shape[1], q.shape[1] // k.shape[1], tokens, size)
    k = ops.broadcast_to(k.expand_dims(2), shape).reshape(q.shape)
    v = ops.broadcast_to(v.expand_dims(2), shape).reshape(q.shape)
    out = layers_compat.scaled_dot_product_attention(q, k, v, mask > 0.5)
    return attn.o_proj(out.swapaxes(1, 2).reshape(batch, tokens, -1).astype(x.dtype))


class QwenTextModel(mindone.Qwen2_5_VLTextModel):
    """Embedding, layers and the last norm."""

    def construct(self, ids, table, mask):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, table, mask)
        return self.norm(x)


class QwenTextEncoder(nn.Cell):
    """Hidden states after the last norm, for token ids; without the vision tower and the head over the vocabulary.

    Shapes: ids int32 [B, T] -> [B, T, H D].
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = Qwen2_5_VLConfig(**config)
        text = self.config.text_config
        self.theta, self.head_dim = float(text.rope_theta), text.hidden_size // text.num_attention_heads
        self.model = mindone.Qwen2_5_VLTextModel._from_config(text)
        self.model.__class__ = QwenTextModel
        del self.model.rotary_emb
        for layer in self.model.layers:
            layer.__class__ = QwenTextLayer
            del layer.self_attn.rotary_emb

    def construct(self, ids):
        tokens = ids.shape[1]
        return self.model(ids, text_table(tokens, self.head_dim, self.theta), causal_mask(tokens))
