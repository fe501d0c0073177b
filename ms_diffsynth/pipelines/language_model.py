"""The layer of decoder-only language models whose hidden states are a prompt's embeddings, in a form that compiles.

mindone's own are made for generation (caches, keyword arguments that are popped).

Shape legend: B batch, T tokens, H heads, K key heads, G = H / K, D channels of a head.
"""
from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from ms_diffsynth.ops import install_cpu_kernels
from ms_diffsynth.pipelines.quiet import quiet_imports
from ms_diffsynth.pipelines.qwen_image.rotary import rotate_halves

install_cpu_kernels()  # a network of mindone is adapted while it is imported

with quiet_imports():
    from mindone.diffusers.models import layers_compat


@ops.constexpr
def causal_mask(tokens: int) -> Tensor:
    """1 where a token may look: at itself and those before it. float32 [1, 1, T, T].

    Float, because the gradients of what is handed to several cells are added, and there is no sum of bools.
    """
    return Tensor(np.tril(np.ones((1, 1, tokens, tokens), np.float32)))


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
    out = layers_compat.scaled_dot_product_attention(q, k, v, mask > 0.5)
    return attn.o_proj(out.swapaxes(1, 2).reshape(batch, tokens, -1).astype(dtype))
