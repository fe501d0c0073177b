"""The fast CPU cells equal their formulas in NumPy float64, in value and gradient, in PyNative and compiled."""
from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from reference import Case, check

from ms_diffsynth.ops.cpu import fast

EPS = 1e-3  # large enough to be seen in the result


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def layer_norm_modulate(x, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + EPS)
    return normal * (1 + scale[:, None]) + shift[:, None]


def rms_norm(x, weight):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + EPS) * weight


def rotary(x, cos, sin):
    swapped = np.empty_like(x)
    swapped[..., 0::2], swapped[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return x * cos + swapped * sin


def attention(q, k, v, scale):
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


ANGLES = np.random.default_rng(3).uniform(0, 6, (3, 6))
COS, SIN = (Tensor(np.broadcast_to(f(ANGLES), (2, 2, 3, 6)), ms.float32) for f in (np.cos, np.sin))
LEFT_OUT = np.array([0, 0, 1, 0, 1, 0], np.float32).reshape(2, 1, 3, 1)  # of the keys of two samples


def masked_attention(q, k, v):
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * 0.5
    weights = np.exp(scores) * (1 - LEFT_OUT.swapaxes(2, 3))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


def attended(q, k, v):
    return fast.masked_attention(q, k, v, Tensor((LEFT_OUT * -fast.LEFT_OUT).repeat(2, 1).reshape(4, 3, 1)), 0.5)


def swiglu(x):
    return x[..., :4] / (1 + np.exp(-x[..., :4])) * x[..., 4:]


def geglu(x):
    x, gate = np.split(x, 2, -1)
    return x * gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))


def layer_norm(x, weight, bias):
    return layer_norm_modulate(x, np.zeros(x.shape[::2]), np.zeros(x.shape[::2])) * weight + bias


def rotated(x):
    return fast.rotary(x, COS, SIN)


CASES = [
    Case(name="linear", function=fast.linear, reference=lambda x, w, b: x @ w.T + b, inputs=[(2, 3, 4), (5, 4), (5,)]),
    Case(name="linear of rows", function=fast.linear, reference=lambda x, w, b: x @ w.T + b,
         inputs=[(2, 4), (3, 4), (3,)]),
    Case(name="gelu", function=fast.gelu_tanh, reference=gelu, inputs=[np.linspace(-6, 6, 20, dtype=np.float32)]),
    Case(name="gate", function=fast.gate_add, reference=lambda r, g, x: r + g[:, None] * x,
         inputs=[(2, 3, 4), (2, 4), (2, 3, 4)]),
    Case(name="layer norm", function=fast.layer_norm_modulate, reference=layer_norm_modulate,
         inputs=[(2, 3, 8), (2, 8), (2, 8)], settings={"eps": EPS}),
    Case(name="rms norm", function=fast.rms_norm, reference=rms_norm, inputs=[(2, 3, 2, 4), (4,)],
         settings={"eps": EPS}),
    Case(name="modulated rms norm", function=fast.rms_norm_modulate, inputs=[(2, 3, 4), (4,), (2, 4)],
         reference=lambda x, w, s: rms_norm(x, w) * (1 + s[:, None]), settings={"eps": EPS}),
    Case(name="rotary", function=rotated, reference=lambda x: rotary(x, np.cos(ANGLES), np.sin(ANGLES)),
         inputs=[(2, 2, 3, 6)]),
    Case(name="swiglu", function=fast.swiglu, reference=swiglu, inputs=[(2, 3, 8)]),
    Case(name="geglu", function=fast.geglu, reference=geglu,
         inputs=[np.linspace(-6, 6, 48, dtype=np.float32).reshape(2, 3, 8)]),
    Case(name="layer norm with weights", function=fast.layer_norm, reference=layer_norm, inputs=[(2, 3, 8), (8,), (8,)],
         settings={"eps": EPS}),
    Case(name="gated silu", function=fast.gated_silu, reference=lambda g, x: g / (1 + np.exp(-g)) * x,
         inputs=[np.linspace(-9, 9, 8, dtype=np.float32).reshape(2, 4), (2, 4)]),
    Case(name="masked attention", function=attended, reference=masked_attention, inputs=[(2, 2, 3, 4)] * 3),
    Case(name="attention", function=fast.attention, reference=lambda q, k, v: attention(q, k, v, 0.5),
         inputs=[(2, 2, 3, 4)] * 3),
    Case(name="cross attention, scaled", function=fast.attention,
         reference=lambda q, k, v: attention(q, k, v, 0.7), inputs=[(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)],
         settings={"scale": 0.7}),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_equals_numpy(case, compiled):
    check(case, compiled)


def test_positions_get_no_gradient():
    x = Tensor(np.ones((2, 2, 3, 6), np.float32))
    gradients = ms.grad(lambda c, s: fast.rotary(x, c, s).sum(), (0, 1))(COS, SIN)
    assert all((g.asnumpy() == 0).all() for g in gradients)


def test_linear_without_bias():
    x, weight = np.arange(6, dtype=np.float32).reshape(1, 2, 3), np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(fast.linear(Tensor(x), Tensor(weight), None).asnumpy(), x @ weight.T)
