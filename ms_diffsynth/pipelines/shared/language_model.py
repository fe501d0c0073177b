"""The layer of decoder-only language models whose hidden states are a prompt's embeddings, in a form that compiles.

mindone's own are made for generation (caches, keyword arguments that are popped).

Shape legend: B batch, T tokens, W channels, H heads, K key heads, G = H / K, D channels of a head.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ms_diffsynth.errors import WeightError
from ms_diffsynth.ops import install_cpu_kernels, network
from ms_diffsynth.pipelines.shared.rotary import rotate_halves, text_table

install_cpu_kernels()  # a network of mindone is adapted while it is imported

@ops.constexpr
def causal_mask(tokens: int) -> Tensor:
    """1 where a token may look: at itself and those before it. float32 [1, 1, T, T].

    Float, because the gradients of what is handed to several cells are added, and bools cannot be added.
    """
    return Tensor(np.tril(np.ones((1, 1, tokens, tokens), np.float32)))


def where_to_look(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token looks, when padding is never looked at, and which tokens look at anything.

    Padding in front of the text has nothing to look at: its attention is to be zero, as PyTorch's is. What a kernel
    makes of a row without keys differs between devices, so such a row looks at what is before it, and the second
    result is multiplied with its attention.

    Shapes: mask float32 [B, T], 1 for text -> float32 [B, 1, T, T], float32 [B, T, 1].
    """
    batch, tokens = mask.shape
    causal = causal_mask(tokens)
    looks = causal * mask.reshape(batch, 1, 1, tokens)
    sees = (looks.sum(-1, keepdims=True) > 0.5).astype(looks.dtype)
    return looks + causal * (1 - sees), sees.reshape(batch, tokens, 1)


def heads(x: Tensor, size: int) -> Tensor:
    """[B, T, n D] -> [B, T, n, D]."""
    return x.reshape(x.shape[0], x.shape[1], -1, size)


def attend(attn: nn.Cell, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """Rotate queries and keys, let G heads share a key head, attend, and put the heads together again.

    Shapes: q [B, T, H, D], k and v [B, T, K, D], table of `rotary.text_table`, mask float32, 1 where a token may look,
    [B or 1, 1, T, T] -> [B, T, W]. Source: mindone 0.5.0, Qwen2_5_VLAttention and Qwen3Attention.
    """
    batch, tokens = q.shape[0], q.shape[1]
    dtype = v.dtype
    q, k, v = rotate_halves(q.swapaxes(1, 2), table), rotate_halves(k.swapaxes(1, 2), table), v.swapaxes(1, 2)
    shape = (batch, k.shape[1], q.shape[1] // k.shape[1], tokens, q.shape[3])
    k = ops.broadcast_to(k.expand_dims(2), shape).reshape(q.shape)
    v = ops.broadcast_to(v.expand_dims(2), shape).reshape(q.shape)
    out = network.attention_where(dtype)(q, k, v, mask)
    return attn.o_proj(out.swapaxes(1, 2).reshape(batch, tokens, -1).astype(dtype))


class TakesTokens:
    """Mixed into a text encoder: called with what a tokenizer returns, it takes ids and mask out of that, so that
    ``pipe.text_encoder(pipe.tokenizer("a cat"))`` encodes a text. In a compiled step it is called with Tensors.
    """

    takes_mask = True

    def __call__(self, tokens, *mask):
        if isinstance(tokens, Mapping):
            ids, present = (np.atleast_2d(tokens[name]) for name in ("input_ids", "attention_mask"))
            mask = (Tensor(present.astype(np.float32)),) if self.takes_mask else ()
            tokens = Tensor(ids.astype(np.int32))
        return super().__call__(tokens, *mask)


def quarters(count: int) -> tuple[int, ...]:
    """A quarter, a half and three quarters of the layers. Raises: WeightError where they cannot be divided."""
    if count % 4:
        raise WeightError(f"a language model of num_hidden_layers={count}: it is read at a quarter, a half and "
                          "three quarters of its layers, so a multiple of 4 is expected. Give the text_encoder/ "
                          "folder of a FLUX.2.")
    return (count // 4, count // 2, 3 * count // 4)


class LowerLayers:
    """Mixed into a language model of mindone: its hidden states after some of its layers, joined.

    What is above the last of them, the last norm and the head over the vocabulary take no part, so they are not built.
    Layers are given the class ``layer_class``, whose ``construct(x, table, looks, sees)`` is made for this.

    Args:
        layers_read: from the number of layers to the counts after which it is read.

    Attributes:
        taken: these counts.
    """

    layer_class: type

    def __init__(self, config: Any, layers_read: Callable[[int], tuple[int, ...]] = quarters):
        taken = layers_read(config.num_hidden_layers)
        lower = copy.deepcopy(config)
        lower.num_hidden_layers = max(taken)
        super().__init__(lower)
        self.taken = taken
        rope = getattr(config, "rope_parameters", None) or {}  # where transformers 5 writes rope_theta
        self.theta, self.head_dim = float(rope.get("rope_theta", config.rope_theta)), config.head_dim
        del self.rotary_emb
        del self.norm
        for layer in self.layers:
            layer.__class__ = self.layer_class

    def construct(self, ids, mask=None):
        """ids int32 [B, T], mask float32 [B, T], 1 for text (None: all) -> [B, T, taken W]."""
        table = text_table(ids.shape[1], self.head_dim, self.theta)
        looks, sees = where_to_look(ops.ones(ids.shape, ms.float32) if mask is None else mask)
        x, kept = self.embed_tokens(ids), ()
        sees = sees.astype(x.dtype)
        for k in range(len(self.layers)):
            x = self.layers[k](x, table, looks, sees)
            if k + 1 in self.taken:
                kept = kept + (x,)
        return ops.cat(kept, -1)
