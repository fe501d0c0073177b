"""Fused operators, called by MindSpore, against the same formula in small ones. Started by `test_device.py`."""
from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, ops
from mindspore.ops.operations.nn_ops import FlashAttentionScore

ms.set_device("Ascend")
RANDOM = np.random.default_rng(0)


def normal(*shape: int, dtype: ms.Type = ms.float32) -> Tensor:
    return Tensor(RANDOM.normal(size=shape).astype(np.float32), dtype)


def assert_same(fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, tolerance: float) -> None:
    """Values and gradients of all inputs, relative to the largest."""
    position = tuple(range(len(inputs)))
    (y, to_inputs), (expected, expected_to_inputs) = (
        ms.value_and_grad(lambda *x, f=f: (f(*x).astype(ms.float32) ** 2).sum(), position)(*inputs)
        for f in (fused, plain))
    for a, b in zip((y, *_tuple(to_inputs)), (expected, *_tuple(expected_to_inputs))):
        a, b = (t.astype(ms.float32).asnumpy() for t in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (fused, a, b)


def _tuple(value: Tensor | tuple) -> tuple:
    return value if isinstance(value, tuple) else (value,)


x, weight = normal(2, 3, 8), normal(8)
assert_same(lambda x, w: ops.rms_norm(x, w, 1e-6)[0],
            lambda x, w: x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + 1e-6) * w, x, weight, tolerance=1e-5)

angles = RANDOM.random((1, 5, 1, 4)).astype(np.float32).repeat(2, -1)
cos, sin = Tensor(np.cos(angles)), Tensor(np.sin(angles))


def turned(q: Tensor) -> Tensor:
    pairs = q.reshape(2, 5, 3, 4, 2)
    return q * cos + ops.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(q.shape) * sin


assert_same(lambda q: ops.rotary_position_embedding(q, cos, sin, 1), turned, normal(2, 5, 3, 8), tolerance=1e-5)

attention = FlashAttentionScore(head_num=3, scale_value=8 ** -0.5, input_layout="BSND")


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.swapaxes(1, 2) for t in (q, k, v))
    return ops.matmul(ops.softmax(ops.matmul(q, k.swapaxes(2, 3)) * 8 ** -0.5, -1), v).swapaxes(1, 2)


assert_same(lambda q, k, v: attention(q, k, v, None, None, None, None)[3], plain_attention,
            *(normal(2, 5, 3, 8, dtype=ms.bfloat16) for _ in range(3)), tolerance=2 ** -6)  # the plain rounds often

parameter = Parameter(Tensor(np.ones(4, np.float32)))
optimizer = mint.optim.AdamW([parameter], lr=0.1, weight_decay=0.01)
m = v = 0.0
expected = 1.0
for t in (1, 2, 3):
    optimizer((Tensor(np.full(4, t, np.float32)),))
    m, v = 0.9 * m + 0.1 * t, 0.999 * v + 0.001 * t * t
    expected = expected * (1 - 0.1 * 0.01) - 0.1 * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
np.testing.assert_allclose(parameter.asnumpy(), expected, rtol=1e-4)
