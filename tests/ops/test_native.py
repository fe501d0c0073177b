"""The native kernels as MindSpore's operators equal NumPy in float64: value and gradient, in PyNative and compiled."""
from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from reference import STRICT, Case, check

from ms_diffsynth.ops.cpu.native.build import library

if library() is None:
    pytest.skip("there are no native kernels here", allow_module_level=True)

from ms_diffsynth.ops.cpu.native import kernels

EPS = 1e-3  # large enough to be seen in the result
ANGLES = np.random.default_rng(3).uniform(0, 6, (1, 5, 6))
COS, SIN = Tensor(np.cos(ANGLES), ms.float32), Tensor(np.sin(ANGLES), ms.float32)
LEFT_OUT = np.zeros((2, 5), np.float32)
LEFT_OUT[0, 3:], LEFT_OUT[1, 1] = -1e30, -1e30


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def geglu(x):
    x, gate = np.split(x, 2, -1)
    return x * gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))


def layer_norm(x, weight, bias):
    return layer_norm_modulate(x, np.zeros(x.shape[::2]), np.zeros(x.shape[::2])) * weight + bias


def layer_norm_modulate(x, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + EPS)
    return normal * (1 + scale[:, None]) + shift[:, None]


def rms_norm(x, weight):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + EPS) * weight


def rotate(x):
    swapped = np.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
    return x * np.cos(ANGLES)[:, :, None] + swapped * np.sin(ANGLES)[:, :, None]


def norm_rotate_joint(x, y, v, w):
    return rotate(np.concatenate([rms_norm(x, v), rms_norm(y, w)], 1))


def attention(q, k, v, mask=0.0):
    scores = np.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1]) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(*q.shape[:2], -1)


def masked(q, k, v):
    return attention(q, k, v, LEFT_OUT[:, None, None].astype(np.float64))


def group_norm(x, weight, bias):
    groups = x.reshape(x.shape[0], 2, -1)
    centred = groups - groups.mean(-1, keepdims=True)
    normal = (centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + EPS)).reshape(x.shape)
    return normal * weight[:, None, None] + bias[:, None, None]


def group_norm_silu(x, weight, bias):
    z = group_norm(x, weight, bias)
    return z * sigmoid(z)


def conv2d(stride, padding):
    def reference(x, weight, bias):
        padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
        windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (2, 3))
        windows = windows[:, :, ::stride[0], ::stride[1]]
        return np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]

    return reference


def rotated(x):
    return kernels.rotate(x, COS, SIN)


def norm_rotated(x, weight):
    return kernels.norm_rotate(x, weight, COS, SIN, EPS)


def norm_rotated_joint(x, y, v, w):
    return kernels.norm_rotate_joint(x, y, v, w, COS, SIN, EPS)


def attended(q, k, v):
    return kernels.masked_attention(q, k, v, Tensor(LEFT_OUT))


def normed(x, weight, bias):
    return kernels.group_norm(x, 2, weight, bias, EPS)


def normed_silu(x, weight, bias):
    return kernels.group_norm_silu(x, 2, weight, bias, EPS)


def convolution(name, stride, padding, *inputs):
    return Case(name=name, function=kernels.conv2d, reference=conv2d(stride, padding), inputs=inputs,
                settings={"stride": stride, "padding": padding})


CASES = [
    Case(name="linear", function=kernels.linear, reference=lambda x, w, b: x @ w.T + b,
         inputs=[(2, 3, 7), (5, 7), (5,)]),
    Case(name="linear of rows", function=kernels.linear, reference=lambda x, w, b: x @ w.T + b,
         inputs=[(1, 4), (3, 4), (3,)]),
    Case(name="linear without bias", function=kernels.linear_without_bias, reference=lambda x, w: x @ w.T,
         inputs=[(2, 3, 4), (5, 4)]),
    Case(name="low rank", function=kernels.add_low_rank, reference=lambda y, x, down, up: y + x @ down @ up,
         inputs=[(2, 3, 5), (2, 3, 7), (7, 2), (2, 5)]),
    Case(name="gelu", function=kernels.gelu_tanh, reference=gelu, inputs=[np.linspace(-6, 6, 21, dtype=np.float32)]),
    Case(name="silu", function=kernels.silu, reference=lambda x: x * sigmoid(x),
         inputs=[np.linspace(-9, 9, 21, dtype=np.float32)]),
    Case(name="swiglu", function=kernels.swiglu, reference=lambda x: x[..., :5] * sigmoid(x[..., :5]) * x[..., 5:],
         inputs=[(2, 3, 10)]),
    Case(name="geglu", function=kernels.geglu, reference=geglu,
         inputs=[np.linspace(-6, 6, 60, dtype=np.float32).reshape(3, 20)]),
    Case(name="gated silu", function=kernels.gated_silu, reference=lambda gate, x: gate * sigmoid(gate) * x,
         inputs=[np.linspace(-9, 9, 21, dtype=np.float32), (21,)]),
    Case(name="layer norm", function=kernels.layer_norm_modulate, reference=layer_norm_modulate,
         inputs=[(2, 37, 9), (2, 9), (2, 9)], settings={"eps": EPS}),
    Case(name="layer norm with weights", function=kernels.layer_norm, reference=layer_norm,
         inputs=[(2, 37, 9), (9,), (9,)], settings={"eps": EPS}),
    Case(name="gate", function=kernels.gate_add, reference=lambda r, g, x: r + g[:, None] * x,
         inputs=[(2, 35, 3), (2, 3), (2, 35, 3)]),
    Case(name="rms norm", function=kernels.rms_norm, reference=rms_norm, inputs=[(2, 3, 2, 5), (5,)],
         settings={"eps": EPS}),
    Case(name="modulated rms norm", function=kernels.rms_norm_modulate, inputs=[(2, 300, 5), (5,), (2, 5)],
         reference=lambda x, w, s: rms_norm(x, w) * (1 + s[:, None]), settings={"eps": EPS}),
    Case(name="rotation", function=rotated, reference=rotate, inputs=[(2, 5, 3, 6)]),
    Case(name="norm and rotation", function=norm_rotated, reference=lambda x, w: rotate(rms_norm(x, w)),
         inputs=[(2, 5, 3, 6), (6,)]),
    Case(name="norm and rotation of two streams", function=norm_rotated_joint, reference=norm_rotate_joint,
         inputs=[(2, 2, 3, 6), (2, 3, 3, 6), (6,), (6,)]),
    Case(name="attention", function=kernels.attention, reference=attention,
         inputs=[(2, 3, 2, 5), (2, 4, 2, 5), (2, 4, 2, 5)]),
    Case(name="masked attention", function=attended, reference=masked,
         inputs=[(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]),
    Case(name="group norm", function=normed, reference=group_norm, inputs=[(2, 6, 3, 5), (6,), (6,)]),
    Case(name="group norm and silu", function=normed_silu, reference=group_norm_silu,
         inputs=[(2, 6, 3, 5), (6,), (6,)]),
    convolution("convolution", (1, 1), (1, 1), (2, 3, 5, 7), (4, 3, 3, 3), (4,)),
    convolution("convolution with strides", (2, 1), (0, 2), (1, 3, 7, 4), (2, 3, 3, 5), (2,)),
    convolution("convolution of pixels", (1, 1), (0, 0), (2, 5, 3, 3), (4, 5, 1, 1), (4,)),
    Case(name="double", function=kernels.double, reference=lambda x: x.repeat(2, 2).repeat(2, 3),
         inputs=[(2, 3, 2, 3)]),
]


if not kernels.HAS_CONVOLUTIONS:
    CASES = [case for case in CASES if case.function is not kernels.conv2d]
convolutions = pytest.mark.skipif(not kernels.HAS_CONVOLUTIONS, reason="MindSpore's oneDNN is version 2")


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_equals_numpy(case, compiled):
    check(case, compiled)


def test_constants_get_no_gradient():
    x, q = Tensor(np.ones((2, 5, 3, 6), np.float32)), Tensor(np.ones((2, 5, 1, 4), np.float32))
    for gradients in (ms.grad(lambda c, s: kernels.rotate(x, c, s).sum(), (0, 1))(COS, SIN),
                      [ms.grad(lambda mask: kernels.masked_attention(q, q, q, mask).sum())(Tensor(LEFT_OUT))]):
        assert all((g.asnumpy() == 0).all() for g in gradients)


def test_another_dtype_is_refused():
    with pytest.raises(RuntimeError):
        kernels.silu(Tensor(np.ones(3), ms.float64)).asnumpy()


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_a_linear_layer_may_be_stored_in_half_precision(compiled):
    function = ms.jit(kernels.linear, **STRICT) if compiled else kernels.linear
    x, weight, bias = (Tensor(np.ones(shape), dtype) for shape, dtype in (((2, 3), ms.float16), ((4, 3), ms.float16),
                                                                          ((4,), ms.float32)))
    y = function(x, weight, bias)
    assert y.dtype == ms.float16 and (y.asnumpy() == 4).all()


def test_views_are_read_as_they_are():
    x = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)
    view = Tensor(x).swapaxes(0, 1)[:, :, 2:7]
    expected = x.swapaxes(0, 1)[:, :, 2:7]
    np.testing.assert_allclose(kernels.silu(view).asnumpy(), expected * sigmoid(expected), rtol=1e-5, atol=1e-6)


class Frozen(nn.Cell):
    """A trained layer, a frozen one, and a frozen convolution."""

    def __init__(self):
        super().__init__()
        weight, bias = np.eye(3, dtype=np.float32), np.ones(3, np.float32)
        self.weight, self.bias = Parameter(weight, name="weight"), Parameter(bias, name="bias")
        self.frozen = Parameter(weight * 2, name="frozen", requires_grad=False)
        self.frozen_bias = Parameter(bias, name="frozen_bias", requires_grad=False)
        self.kernel = Parameter(np.ones((2, 1, 1, 1), np.float32), name="kernel", requires_grad=False)
        self.shift = Parameter(np.ones(2, np.float32), name="shift", requires_grad=False)

    def construct(self, x):
        x = kernels.linear(kernels.linear(x, self.weight, self.bias), self.frozen, self.frozen_bias)
        return kernels.conv2d(x.reshape(1, 1, 2, 3), self.kernel, self.shift, (1, 1), (0, 0)).sum()


@convolutions
def test_a_frozen_weight_costs_no_gradient_in_pynative(monkeypatch):
    net, calls = Frozen(), []
    for name in ("_linear_x", "_linear_w", "_linear_b", "_conv_x", "_conv_w"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *x, name=name, kernel=kernel: calls.append(name) or kernel(*x))
    _, gradients = ms.value_and_grad(net, None, net.trainable_params())(Tensor(np.ones((2, 3), np.float32)))
    assert sorted(calls) == ["_conv_x", "_linear_b", "_linear_w", "_linear_x", "_linear_x"]
    np.testing.assert_array_equal(gradients[1].asnumpy(), np.full(3, 8, np.float32))


@convolutions
def test_a_frozen_weight_costs_no_gradient_compiled(tmp_path, monkeypatch):
    """Counted in the graph that MindSpore runs."""
    net = Frozen()
    step = ms.value_and_grad(net, None, net.trainable_params())

    def compiled(x):
        return step(x)

    ms.set_context(save_graphs=1, save_graphs_path=str(tmp_path))
    try:
        _, gradients = ms.jit(compiled, **STRICT)(Tensor(np.ones((2, 3), np.float32)))
    finally:
        ms.set_context(save_graphs=0)
    np.testing.assert_array_equal(gradients[1].asnumpy(), np.full(3, 8, np.float32))
    graphs = sorted(tmp_path.rglob("*validate*.ir"))
    assert graphs, list(tmp_path.rglob("*"))
    text = graphs[-1].read_text()
    assert [text.count(f':{name}", multi_output') for name in ("linear_backward_w", "conv2d_backward_w")] == [1, 0]
