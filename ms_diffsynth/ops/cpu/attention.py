"""Attention without the flash kernel, which only Ascend has.

mindone's own fallback casts float32 to float16 (layers_compat.py, mindone 0.5.0), good to 1e-3 only; here the soft-max
and everything before and after it keep their precision. Compared with NumPy by tests/ops/test_cpu_attention.py.

Letters of the flash layouts: B batch, N heads, S tokens, D channels of a head, H = N D, T tokens of all samples.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import ops
from mindspore.common import dtype as mstype
from mindspore.ops.primitive import _primexpr

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.ops.cpu.functional import HAS_NATIVE, are_float32, dropout, native
from ms_diffsynth.ops.cpu.tensor import repeat_interleave

LEFT_OUT = -1e30  # added to a score: its weight becomes exactly 0, and a row of nothing else stays finite


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False, backend="math"):
    """softmax(q k^T scale + mask) v, the soft-max in float32; a row whose keys are all left out gives zeros.

    Shapes: query [..., S, D], key and value [..., S', D]; attn_mask broadcasts to [..., S, S'], bool (True takes
    part) or additive. With ``enable_gqa`` key and value may have fewer heads (axis -3) than query.
    Source: torch.nn.functional.scaled_dot_product_attention, PyTorch 2.13.
    """
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = repeat_interleave(key, repeats, -3), repeat_interleave(value, repeats, -3)
    if (HAS_NATIVE and attn_mask is None and dropout_p == 0 and not is_causal and are_float32(query, key, value)
            and query.shape[:-2] == key.shape[:-2]):
        return _native_attention(query if scale is None else query * (scale * query.shape[-1] ** 0.5), key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = ops.matmul(query * scale, key.swapaxes(-2, -1)).astype(mstype.float32)
    taken = None
    if is_causal:
        taken = ops.ones((query.shape[-2], key.shape[-2]), mstype.float32).tril()
    if attn_mask is not None:
        if attn_mask.dtype == mstype.bool_:
            mask = attn_mask.astype(mstype.float32)
            taken = mask if taken is None else taken * mask
        else:
            scores = scores + attn_mask.astype(mstype.float32)
    if taken is not None:
        scores = scores + (1.0 - taken) * LEFT_OUT
    weights = ops.softmax(scores, -1)
    if taken is not None:
        weights = weights * taken
    weights = weights.astype(query.dtype)
    if dropout_p > 0:
        weights = dropout(weights, dropout_p, True)
    return ops.matmul(weights, value)


def _native_attention(query, key, value):
    """Each head is a sample of one head, so that nothing is transposed."""
    q, k, v = _one_head(query), _one_head(key), _one_head(value)
    return native.attention(q, k, v).reshape(query.shape)


def _one_head(x):
    return x.reshape(-1, x.shape[-2], 1, x.shape[-1])


@_primexpr
def _check_flash(layout, sparse_mode, extras):
    if layout not in ("BSH", "BNSD", "BSND", "TND") or sparse_mode not in (0, 1, 2, 3) or any(extras):
        raise DeviceError(
            f"flash attention with input_layout={layout}, sparse_mode={sparse_mode} on the CPU: expected BSH, BNSD, "
            "BSND or TND, sparse_mode 0 to 3, and no real_shift, drop_mask, padding_mask or prefix.")
    if layout == "TND" and sparse_mode in (2, 3):
        raise DeviceError("causal flash attention in layout TND on the CPU: use BSND, one sample at a time.")


def _to_heads(x, head_dim, layout):
    """Any flash layout -> [B, N, S, D]."""
    if layout == "BSH":
        return x.reshape(x.shape[0], x.shape[1], x.shape[2] // head_dim, head_dim).swapaxes(1, 2)
    if layout == "BSND":
        return x.swapaxes(1, 2)
    if layout == "TND":
        return x.swapaxes(0, 1).expand_dims(0)
    return x


def _sample_of_token(ends, tokens):
    """For each of the packed tokens, how many samples end at or before it. Shapes: ends [B], result [tokens]."""
    ends = ends if isinstance(ends, ms.Tensor) else ms.Tensor(ends, mstype.int32)
    passed = ops.arange(0, tokens).reshape(-1, 1) >= ends.reshape(1, -1)
    return passed.astype(mstype.int32).sum(1)


def _taken_mask(q, k, attn_mask, q_ends, kv_ends, sparse_mode):
    """The flash kernel's ways to leave out scores, as one bool mask that is True for what takes part, or None."""
    if q_ends is not None:
        q_sample, kv_sample = _sample_of_token(q_ends, q.shape[2]), _sample_of_token(kv_ends, k.shape[2])
        return q_sample.reshape(-1, 1) == kv_sample.reshape(1, -1)
    if sparse_mode in (2, 3):  # causal, counted from the first (2) or the last (3) token; the mask is a template
        shift = k.shape[2] - q.shape[2] if sparse_mode == 3 else 0
        return ops.ones((q.shape[2], k.shape[2]), mstype.float32).tril(shift) > 0
    if attn_mask is None:
        return None
    return ops.logical_not(attn_mask.astype(mstype.bool_))  # True means "leave out" to the flash kernel


def flash_attention_score(query, key, value, head_num, real_shift=None, drop_mask=None, padding_mask=None,
                          attn_mask=None, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, keep_prob=1.0,
                          scalar_value=1.0, pre_tokens=2147483647, next_tokens=2147483647, inner_precise=0,
                          input_layout="BSH", sparse_mode=0):
    """``ops.flash_attention_score``. Bands (pre_tokens, next_tokens) are not supported; mindone sets none."""
    _check_flash(input_layout, sparse_mode, (real_shift is not None, drop_mask is not None,
                                             padding_mask is not None, prefix is not None))
    head_dim = query.shape[-1] // head_num if input_layout == "BSH" else query.shape[-1]
    q = _to_heads(query, head_dim, input_layout)
    k, v = _to_heads(key, head_dim, input_layout), _to_heads(value, head_dim, input_layout)
    taken = _taken_mask(q, k, attn_mask, actual_seq_qlen, actual_seq_kvlen, sparse_mode)
    out = scaled_dot_product_attention(q, k, v, taken, 1.0 - keep_prob, False, scalar_value, True)
    if input_layout == "BSH":
        return out.swapaxes(1, 2).reshape(query.shape)
    if input_layout == "BSND":
        return out.swapaxes(1, 2)
    if input_layout == "TND":
        return out.squeeze(0).swapaxes(0, 1)
    return out


@ms.jit_class
class FlashAttentionScore:
    """Stands in for the primitive of the same name; of its four results only the last, the attention, is given."""

    def __init__(self, head_num=1, keep_prob=1.0, scale_value=1.0, pre_tokens=2147483647, next_tokens=2147483647,
                 inner_precise=0, input_layout="BSH", sparse_mode=0):
        self.head_num = head_num
        self.keep_prob = keep_prob
        self.scale_value = scale_value
        self.input_layout = input_layout
        self.sparse_mode = sparse_mode

    def __call__(self, query, key, value, real_shift=None, drop_mask=None, padding_mask=None, attn_mask=None,
                 prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None):
        out = flash_attention_score(
            query, key, value, self.head_num, real_shift, drop_mask, padding_mask, attn_mask, prefix,
            actual_seq_qlen, actual_seq_kvlen, self.keep_prob, self.scale_value,
            input_layout=self.input_layout, sparse_mode=self.sparse_mode)
        return None, None, None, out
