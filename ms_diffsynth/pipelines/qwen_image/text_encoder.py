"""The language model of Qwen2.5-VL on mindone's layers, so that it compiles: text and pictures, attended causally.

mindone's own ``construct`` is made for generation (caches, keyword arguments that are popped) and does not compile. On
text alone its three position axes coincide, which is the plain rotary embedding of `rotary.text_table`. The tokens of
pictures come from `vision.VisionTower`, and each has a row and a column.

Shape legend: B batch, T tokens, V tokens of pictures, H heads, K key heads, G = H / K, D channels of a head, W = H D.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from ms_diffsynth.models import arguments
from ms_diffsynth.pipelines.shared.language_model import TakesTokens, attend, causal_mask, heads
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import text_table

with quiet_imports():
    from mindone.transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as mindone
    from transformers import Qwen2_5_VLConfig


PLACES = 8192  # of the table of positions


class QwenTextLayer(mindone.Qwen2_5_VLDecoderLayer):
    """One layer of the language model."""

    def construct(self, x, table, mask):
        """x [B, T, W], table of `rotary.text_table` or `places_table`, mask of `causal_mask` -> the same shape as x."""
        x = x + attention(self.self_attn, self.input_layernorm(x), table, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention(attn: nn.Cell, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """x [B, T, W] -> the same shape; see `language_model.attend`."""
    q, k = heads(attn.q_proj(x), attn.head_dim), heads(attn.k_proj(x), attn.head_dim)
    return attend(attn, q, k, heads(attn.v_proj(x), attn.head_dim), table, mask)


class QwenTextModel(mindone.Qwen2_5_VLTextModel):
    """Embedding, layers and the last norm."""

    def construct(self, ids, table, mask, vision=None, index=None):
        """``index`` int32 [B, T]: which of ``vision`` [B, V, W] stands for a token, counted from 1; 0 for text."""
        x = self.embed_tokens(ids)
        if vision is not None:
            x = with_pictures(x, vision, index)
        for layer in self.layers:
            x = layer(x, table, mask)
        return self.norm(x)


class QwenTextEncoder(TakesTokens, nn.Cell):
    """Hidden states after the last norm, for token ids; without the vision tower and the head over the vocabulary.

    Shapes: ids int32 [B, T]; with pictures also vision [B, V, W], places int32 [B, T, 4] (three axes of positions, and
    as ``index`` of `QwenTextModel`) -> [B, T, W].
    """

    takes_mask = False

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = Qwen2_5_VLConfig(**arguments(Qwen2_5_VLConfig, config))
        text = self.config.text_config
        self.sections = tuple((text.rope_scaling or {}).get("mrope_section", ()))
        self.theta, self.head_dim = float(text.rope_theta), text.hidden_size // text.num_attention_heads
        self.model = mindone.Qwen2_5_VLTextModel._from_config(text)
        self.model.__class__ = QwenTextModel
        del self.model.rotary_emb
        for layer in self.model.layers:
            layer.__class__ = QwenTextLayer
            del layer.self_attn.rotary_emb

    def construct(self, ids, vision=None, places=None):
        tokens = ids.shape[1]
        if vision is None:
            return self.model(ids, text_table(tokens, self.head_dim, self.theta), causal_mask(tokens))
        table = places_table(places, self.sections, text_table(PLACES, self.head_dim, self.theta))
        return self.model(ids, table, causal_mask(tokens), vision, places[:, :, 3])


def places_table(places: Tensor, sections: tuple[int, ...], line: Tensor) -> Tensor:
    """Cosines and sines of tokens with three positions each: float32 [2, B, 1, T, D / 2].

    Args:
        places: int32 [B, T, 3 or more].
        sections: how many pairs of channels go by each axis.
        line: cosines and sines of the positions 0, 1, ..., [2, PLACES, D / 2].
    """
    tables = ()
    for k in range(2):
        columns, begin = (), 0
        for axis in range(3):
            found = ops.gather(line[k], places[:, :, axis], 0)
            columns += (found[:, :, begin:begin + sections[axis]],)
            begin += sections[axis]
        tables += (ops.cat(columns, -1).expand_dims(1),)
    return ops.stack(tables)


def with_pictures(x: Tensor, vision: Tensor, index: Tensor) -> Tensor:
    """Embeddings of tokens x [B, T, W], those of pictures in their places; see `QwenTextModel`."""
    batch, tokens, width = x.shape
    rows = ops.cat((ops.zeros((batch, 1, width), x.dtype), vision.astype(x.dtype)), 1).reshape(-1, width)
    flat = (index + row_begins(batch, vision.shape[1] + 1)).reshape(-1)
    is_text = ops.equal(index, 0).astype(x.dtype).expand_dims(2)
    return x * is_text + ops.gather(rows, flat, 0).reshape(batch, tokens, width)


@ops.constexpr
def row_begins(batch: int, length: int) -> Tensor:
    """0, length, 2 length, ...: int32 [batch, 1]."""
    return Tensor(np.arange(0, batch * length, length, dtype=np.int32)[:, None])
