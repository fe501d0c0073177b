"""Attention equals NumPy in value and gradient, for every mask, layout and mode mindone uses."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, ops
from reference import Case, check

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.ops.cpu.attention import scaled_dot_product_attention

TAKEN = np.array([[True, False, True, True], [False, True, True, False], [True, True, True, True]])
NOTHING = np.array([[True, True, False, True], [False, False, False, False], [True, True, True, True]])
BIAS = np.array([[0.0, 1.0, -2.0, 0.5], [0.3, 0.0, 0.0, -1.0], [0.0, 2.0, 0.1, 0.0]], np.float32)
QUERY, KEY = (1, 2, 3, 2), (1, 2, 4, 2)  # batch, heads, tokens, channels


def attention(q, k, v, taken=None, bias=0.0, scale=None):
    """softmax by its definition, in [..., tokens, channels]."""
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    if taken is not None:
        weights = weights * taken
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


def causal(q, k, v):
    return attention(q, k, v, np.tri(q.shape[-2], k.shape[-2]))


def masked(q, k, v, mask):
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_and_masked(q, k, v, mask):
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True, scale=0.3)


def grouped(x):
    return x.repeat(2, 1)


def heads(x, n=2):
    """[B, S, N D] -> [B, N, S, D]."""
    return x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)


def merged(x):
    """[B, N, S, D] -> [B, S, N D]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def packed(q, k, v):
    """[T, N, D]: samples of 1 and 2 query tokens, 3 and 1 key tokens."""
    parts = [attention(*(x[a:b].swapaxes(0, 1) for x, (a, b) in ((q, qs), (k, ks), (v, ks)))).swapaxes(0, 1)
             for qs, ks in (((0, 1), (0, 3)), ((1, 3), (3, 4)))]
    return np.concatenate(parts)


def flash_masked(q, k, v, left_out):
    return ops.flash_attention_score(q, k, v, 2, attn_mask=left_out, scalar_value=0.5, input_layout="BNSD")


def flash_cell(q, k, v):
    return ops.operations.nn_ops.FlashAttentionScore(2, scale_value=2 ** -0.5, input_layout="BSND",
                                                     sparse_mode=2)(q, k, v)[3]


def flash(**settings):
    return {"head_num": 2, "scalar_value": 2 ** -0.5, **settings}


SDPA, FLASH = scaled_dot_product_attention, ops.flash_attention_score
CASES = [
    Case(name="plain", function=SDPA, reference=attention, inputs=[QUERY, KEY, KEY]),
    Case(name="scale", function=SDPA, reference=lambda *x: attention(*x, scale=0.1), inputs=[QUERY, KEY, KEY],
         settings={"scale": 0.1}),
    Case(name="causal", function=SDPA, reference=causal, inputs=[QUERY, KEY, KEY], settings={"is_causal": True}),
    Case(name="bool mask", function=masked, reference=attention, inputs=[QUERY, KEY, KEY, TAKEN]),
    Case(name="a row that takes nothing gives zeros", function=masked, reference=attention,
         inputs=[QUERY, KEY, KEY, NOTHING]),
    Case(name="additive mask", function=masked, reference=lambda q, k, v, b: attention(q, k, v, bias=b),
         inputs=[QUERY, KEY, KEY, BIAS]),
    Case(name="causal and masked", function=causal_and_masked, inputs=[QUERY, KEY, KEY, TAKEN],
         reference=lambda q, k, v, m: attention(q, k, v, m * np.tri(3, 4), scale=0.3)),
    Case(name="grouped heads", function=SDPA, reference=lambda q, k, v: attention(q, grouped(k), grouped(v)),
         inputs=[(1, 4, 3, 2), KEY, KEY], settings={"enable_gqa": True}),
    Case(name="three dimensions", function=SDPA, reference=attention, inputs=[(2, 3, 2), (2, 4, 2), (2, 4, 2)]),
    Case(name="flash BNSD", function=FLASH, reference=attention, inputs=[QUERY, KEY, KEY],
         settings=flash(input_layout="BNSD")),
    Case(name="flash BNSD, True leaves out", function=flash_masked, inputs=[QUERY, KEY, KEY, ~TAKEN],
         reference=lambda q, k, v, m: attention(q, k, v, ~m, scale=0.5)),
    Case(name="flash BSH", function=FLASH, reference=lambda q, k, v: merged(attention(heads(q), heads(k), heads(v))),
         inputs=[(2, 3, 4), (2, 4, 4), (2, 4, 4)], settings=flash(input_layout="BSH")),
    Case(name="flash BSH, grouped heads", function=FLASH, inputs=[(1, 3, 4), (1, 4, 2), (1, 4, 2)],
         reference=lambda q, k, v: merged(attention(heads(q), grouped(heads(k, 1)), grouped(heads(v, 1)))),
         settings=flash(input_layout="BSH")),
    Case(name="flash BSND, causal from the last token", function=FLASH,
         inputs=[(1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2)],
         reference=lambda *x: attention(*(y.swapaxes(1, 2) for y in x), np.tri(3, 4, 1)).swapaxes(1, 2),
         settings=flash(input_layout="BSND", sparse_mode=3)),
    Case(name="flash primitive BSND, causal from the first token", function=flash_cell,
         inputs=[(1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2)],
         reference=lambda *x: causal(*(y.swapaxes(1, 2) for y in x)).swapaxes(1, 2)),
    Case(name="flash TND", function=FLASH, reference=packed, inputs=[(3, 2, 2), (4, 2, 2), (4, 2, 2)],
         settings=flash(input_layout="TND", actual_seq_qlen=(1, 3), actual_seq_kvlen=(3, 4))),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_equals_numpy(case, compiled):
    check(case, compiled)


def test_dropout_of_the_weights_keeps_the_mean():
    ones = Tensor(np.ones((64, 64, 8), np.float32))
    out = scaled_dot_product_attention(ones, ones, ones, dropout_p=0.5).asnumpy()
    assert out.std() > 0.05 and abs(out.mean() - 1) < 0.05


@pytest.mark.parametrize("settings", [{"input_layout": "SBH"}, {"sparse_mode": 4}, {"prefix": 1},
                                      {"input_layout": "TND", "sparse_mode": 2}])
def test_what_is_not_there_is_refused(settings):
    x = Tensor(np.ones((2, 2, 2), np.float32))
    with pytest.raises(DeviceError, match="flash attention"):
        ops.flash_attention_score(x, x, x, 1, **settings)
