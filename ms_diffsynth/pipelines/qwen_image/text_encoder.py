"""The language model of Qwen2.5-VL on mindone's layers, so that it compiles: text only, attended causally.

mindone's own ``construct`` is made for generation (caches, keyword arguments that are popped) and does not compile. On
text alone its three position axes coincide, which is the plain rotary embedding of `rotary.text_table`.

Shape legend: B batch, T tokens, H heads, K key heads, G = H / K, D channels of a head.
"""
from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn

from ms_diffsynth.models import arguments
from ms_diffsynth.pipelines.shared.language_model import TakesTokens, attend, causal_mask, heads
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import text_table

with quiet_imports():
    from mindone.transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as mindone
    from transformers import Qwen2_5_VLConfig


class QwenTextLayer(mindone.Qwen2_5_VLDecoderLayer):
    """One layer of the language model."""

    def construct(self, x, table, mask):
        """x [B, T, H D], table of `rotary.text_table`, mask of `causal_mask` -> the same shape as x."""
        x = x + attention(self.self_attn, self.input_layernorm(x), table, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention(attn: nn.Cell, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """x [B, T, W] -> the same shape; see `language_model.attend`."""
    q, k = heads(attn.q_proj(x), attn.head_dim), heads(attn.k_proj(x), attn.head_dim)
    return attend(attn, q, k, heads(attn.v_proj(x), attn.head_dim), table, mask)


class QwenTextModel(mindone.Qwen2_5_VLTextModel):
    """Embedding, layers and the last norm."""

    def construct(self, ids, table, mask):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, table, mask)
        return self.norm(x)


class QwenTextEncoder(TakesTokens, nn.Cell):
    """Hidden states after the last norm, for token ids; without the vision tower and the head over the vocabulary.

    Shapes: ids int32 [B, T] -> [B, T, H D].
    """

    takes_mask = False

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = Qwen2_5_VLConfig(**arguments(Qwen2_5_VLConfig, config))
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
