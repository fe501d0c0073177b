"""Flash attention and its gradient, and rotary position embedding."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ms_diffsynth.standin.compute.table import Array, aclnn

_MASKED = np.finfo(np.float32).min  # a score that weighs nothing, also where a whole row is masked
_COPIES = 8  # the maxima and sums of the rows are kept eight times, side by side


@aclnn("FlashAttentionScore", "t t t t r r r I d d i i i c i i -> t t _ t")
def flash_attention(query: Array, key: Array, value: Array, shift: Array | None, drop: Array | None,
                    padding: Array | None, mask: Array | None, prefix: Sequence[int] | None, scale: float, keep: float,
                    before: int, after: int, heads: int, layout: str, inner_precise: int, sparse: int) -> tuple:
    """softmax(scale query key^T + shift) value; a true element of ``mask`` takes its score out.

    Returns: the maximum and the sum of exponentials of each row, (B, N, S, 8), nothing, and the result.
    """
    _refuse(drop=drop, padding=padding, prefix=prefix or None, dropout=None if keep == 1 else keep)
    q, k, v = (_heads(x, heads, layout) for x in (query, key, value))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = _scores(q, k, scale, mask, sparse, shift)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    kept = [np.broadcast_to(x, (*x.shape[:-1], _COPIES)) for x in (most, total)]
    return *kept, None, _joined((weights / total) @ v, layout, query.shape)


@aclnn("FlashAttentionScoreGrad", "t t t t t r r r t t r t I d d i i i c i i -> t t t _")
def flash_attention_gradient(query: Array, key: Array, value: Array, gradient: Array, shift: Array | None,
                             drop: Array | None, padding: Array | None, mask: Array | None, most: Array, total: Array,
                             soft: Array | None, result: Array | None, prefix: Sequence[int] | None, scale: float,
                             keep: float, before: int, after: int, heads: int, layout: str, inner_precise: int,
                             sparse: int) -> tuple:
    """Gradients of query, key and value, from the rows' maxima and sums that the forward pass kept."""
    _refuse(drop=drop, padding=padding, prefix=prefix or None, dropout=None if keep == 1 else keep)
    q, g = (_heads(x, heads, layout) for x in (query, gradient))
    few = [_heads(x, heads, layout) for x in (key, value)]
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in few)
    scores = _scores(q, k, scale, mask, sparse, shift)
    most, total = (x.reshape(*scores.shape[:-1], _COPIES)[..., :1] for x in (most, total))
    p = np.exp(scores - most) / total
    to_p = g @ v.swapaxes(-1, -2)
    to_scores = p * (to_p - (to_p * p).sum(-1, keepdims=True)) * np.float32(scale)
    to_k, to_v = to_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ g
    groups = few[0].shape[1]  # heads of queries that share one of keys add up
    to_k, to_v = (x.reshape(x.shape[0], groups, -1, *x.shape[2:]).sum(2) for x in (to_k, to_v))
    return (_joined(to_scores @ k, layout, query.shape), _joined(to_k, layout, key.shape),
            _joined(to_v, layout, value.shape), None)


def _heads(x: Array, heads: int, layout: str) -> Array:
    """As (B, N, S, D). ``heads`` counts those of the queries; keys may have fewer only where the layout shows it."""
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(0, 2, 1, 3)
    if layout == "BSH":
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    if layout == "SBH":
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2, 0, 3)
    raise NotImplementedError(f"layout {layout} is not computed by the stand-in: write it in compute/attention.py")


def _joined(x: Array, layout: str, shape: tuple[int, ...]) -> Array:
    """(B, N, S, D) as ``layout`` has it."""
    order = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3)}[layout]
    return x.transpose(order).reshape(shape)


def _scores(q: Array, k: Array, scale: float, mask: Array | None, sparse: int, shift: Array | None) -> Array:
    scores = (q @ k.swapaxes(-1, -2)) * np.float32(scale)
    if shift is not None:
        scores = scores + shift
    if sparse in (2, 3):  # causal, aligned to the first (2) or the last row and column (3)
        rows, columns = scores.shape[-2:]
        return np.where(np.tril(np.ones((rows, columns), bool), columns - rows if sparse == 3 else 0), scores, _MASKED)
    if sparse not in (0, 1):
        raise NotImplementedError(f"sparse mode {sparse} is not computed by the stand-in: write it in "
                                  "compute/attention.py")
    return scores if mask is None else np.where(mask.astype(bool), _MASKED, scores)


def _refuse(**unsupported: object) -> None:
    given = [name for name, value in unsupported.items() if value is not None]
    if given:
        raise NotImplementedError(f"with {', '.join(given)} it is not computed by the stand-in: write it in "
                                  "compute/attention.py")


@aclnn("RotaryPositionEmbedding", "t t t i -> t")
def rotary(x: Array, cos: Array, sin: Array, mode: int) -> Array:
    """x cos + rotate(x) sin; mode 0 rotates the two halves of the last axis, mode 1 its neighbours (2i, 2i + 1)."""
    return x * cos + _rotate(x, mode) * sin


@aclnn("RotaryPositionEmbeddingGrad", "t t t t i -> t t t")
def rotary_gradient(gradient: Array, cos: Array, sin: Array, x: Array | None, mode: int) -> tuple:
    """Rotating is antisymmetric, so its gradient rotates back. Without x, cos and sin have none."""
    to_x = gradient * cos - _rotate(gradient * sin, mode)
    if x is None:
        return to_x, None, None
    axes = tuple(i for i, n in enumerate(cos.shape) if n == 1)
    return to_x, (gradient * x).sum(axes, keepdims=True), (gradient * _rotate(x, mode)).sum(axes, keepdims=True)


def _rotate(x: Array, mode: int) -> Array:
    if mode == 0:
        first, second = np.split(x, 2, -1)
        return np.concatenate([-second, first], -1)
    if mode == 1:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return np.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
    raise NotImplementedError(f"mode {mode} is not computed by the stand-in: write it in compute/attention.py")
