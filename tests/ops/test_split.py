"""Parts of a Tensor: the gradient of `ops.split.Split` where the gradients of the parts are views."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from ms_diffsynth.ops.split import Split

DRAWN = np.random.default_rng(0)


def draw(*shape: int) -> Tensor:
    return Tensor(DRAWN.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gradients_that_are_views_are_joined_as_they_are(configured, axis, compiled):
    """Part 1 is joined with others, so its gradient is a slice with an offset and strides of its own."""
    x, beside, factor = draw(4, 4, 4), draw(4, 2, 2), draw(4, 6, 2)
    split, sizes, middle = Split(axis), (1, 2, 1), [slice(None)] * 3
    middle[axis] = slice(1, 3)

    def forward(x):
        return (ops.cat((beside, split(x, sizes)[1].reshape(4, 4, 2)), 1) * factor).sum()

    gradient = ms.grad(forward)
    found = (ms.jit(gradient, fullgraph=True) if compiled else gradient)(x).asnumpy()
    expected = np.zeros((4, 4, 4), np.float32)
    expected[tuple(middle)] = factor.asnumpy()[:, 2:].reshape(expected[tuple(middle)].shape)
    np.testing.assert_array_equal(found, expected)
