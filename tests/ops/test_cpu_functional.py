"""`mindspore.mint.nn.functional`: linear maps, norms, activations and losses equal NumPy in value and gradient."""
from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, ops
from reference import Case, check

from ms_diffsynth.errors import DeviceError

F = mint.nn.functional
WORDS = np.array([[1, 0, 2], [2, 2, 3]], np.int32)
ERF = np.vectorize(math.erf)
WIDE = np.array([[-30.0, -4.0, -0.3, 0.0], [0.2, 1.0, 5.0, 30.0]], np.float32)
EXP = 2e-5  # where the CPU's exp, good to 5e-6, enters


def layer_norm(x, weight=1.0, bias=0.0, axes=(-1,), eps=1e-5):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps) * weight + bias


def rms_norm(x, weight):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * weight


def gelu(x):
    return 0.5 * x * (1 + ERF(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def softplus(x):
    return np.logaddexp(0, x)


def functional_layer_norm(x, weight, bias):
    return F.layer_norm(x, (4,), weight, bias)


def ops_rms_norm(x, weight):
    return ops.rms_norm(x, weight)[0]


def padded_embedding_reference(words, weight):
    """In this reference row 2 is a constant, as it is to the gradient."""
    return np.where((words == 2)[..., None], PADDED[2], weight[words])


PADDED = np.random.default_rng(3).standard_normal((4, 2)).astype(np.float32)

CASES = [
    Case(name="linear", function=F.linear, reference=lambda x, w, b: x @ w.T + b, inputs=[(2, 3), (4, 3), (4,)]),
    Case(name="linear in three dimensions", function=F.linear, reference=lambda x, w: x @ w.T,
         inputs=[(2, 2, 3), (4, 3)]),
    Case(name="embedding", function=F.embedding, reference=lambda i, w: w[i], inputs=[WORDS, (4, 2)]),
    Case(name="embedding with padding", function=F.embedding, reference=padded_embedding_reference,
         inputs=[WORDS, PADDED], settings={"padding_idx": -2}),
    Case(name="layer_norm", function=functional_layer_norm, reference=layer_norm, inputs=[(3, 4), (4,), (4,)]),
    Case(name="layer_norm of two axes", function=F.layer_norm, inputs=[(2, 2, 3)],
         reference=lambda x: layer_norm(x, axes=(-2, -1), eps=1e-3),
         settings={"normalized_shape": (2, 3), "eps": 1e-3}),
    Case(name="rms_norm", function=ops_rms_norm, reference=rms_norm, inputs=[(3, 4), (4,)]),
    Case(name="normalize", function=F.normalize, reference=lambda x: x / np.linalg.norm(x, axis=1, keepdims=True),
         inputs=[(2, 3, 2)]),
    Case(name="gelu", function=F.gelu, reference=gelu, inputs=[(2, 4)], tolerance=1e-6),
    Case(name="gelu far from zero", function=F.gelu, reference=gelu, inputs=[WIDE]),
    Case(name="gelu tanh", function=F.gelu, reference=gelu_tanh, inputs=[(2, 4)], settings={"approximate": "tanh"},
         tolerance=3e-6),
    Case(name="gelu tanh far from zero", function=F.gelu, reference=gelu_tanh, inputs=[WIDE],
         settings={"approximate": "tanh"}),
    # abs has no derivative at 0, where softplus has 1/2: that point is tested apart
    Case(name="softplus", function=F.softplus, reference=softplus, inputs=[WIDE[:, :3]], tolerance=EXP),
    Case(name="softplus beta", function=F.softplus, reference=lambda x: softplus(3 * x) / 3, inputs=[(2, 3)],
         settings={"beta": 3}, tolerance=EXP),
    Case(name="logsigmoid", function=F.logsigmoid, reference=lambda x: -softplus(-x), inputs=[(2, 3)], tolerance=EXP),
    Case(name="mish", function=F.mish, reference=lambda x: x * np.tanh(softplus(x)), inputs=[(2, 4)], tolerance=EXP),
    Case(name="mse_loss", function=F.mse_loss, reference=lambda x, y: ((x - y) ** 2).mean(), inputs=[(2, 3), (2, 3)]),
    Case(name="mse_loss sum", function=F.mse_loss, reference=lambda x, y: ((x - y) ** 2).sum(),
         inputs=[(2, 3), (2, 3)], settings={"reduction": "sum"}),
    Case(name="mse_loss none", function=F.mse_loss, reference=lambda x, y: (x - y) ** 2, inputs=[(2, 3), (2, 3)],
         settings={"reduction": "none"}),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_equals_numpy(case, compiled):
    check(case, compiled)


def test_softplus_has_slope_one_half_at_zero():
    gradient = ms.grad(lambda x: F.softplus(x).sum())(Tensor([0.0], ms.float32))
    np.testing.assert_allclose(gradient.asnumpy(), 0.5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("cell, shape, reference", [
    (mint.nn.Linear(3, 2), (2, 2, 3), lambda x, w, b: x @ w.T + b),
    (mint.nn.LayerNorm(3), (2, 3), layer_norm),
    (mint.nn.LayerNorm(3, elementwise_affine=False), (2, 3), layer_norm),
    (mint.nn.GELU(), (2, 3), gelu),
], ids=["Linear", "LayerNorm", "LayerNorm without weight", "GELU"])
def test_cells_equal_numpy(cell, shape, reference, compiled):
    weights = [p.asnumpy().astype(np.float64) for p in cell.trainable_params()]
    check(Case(name="cell", function=cell, reference=lambda x: reference(x, *weights), inputs=[shape]), compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_embedding_cell_equals_numpy(compiled):
    cell = mint.nn.Embedding(5, 3)
    check(Case(name="Embedding", function=cell, reference=lambda i: cell.weight.asnumpy()[i], inputs=[WORDS],
               gradient=False), compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_dropout_keeps_its_share_scaled_and_the_gradient_follows(compiled):
    cell = mint.nn.Dropout(0.25)
    cell.set_train(True)
    def total(x):
        out = cell(x)
        return out.sum(), out
    both = ms.value_and_grad(total, 0, None, has_aux=True)

    def step(x):
        return both(x)
    (_, out), gradient = (ms.jit(step) if compiled else step)(Tensor(np.full((200, 100), 3.0, np.float32)))
    out, gradient = out.asnumpy(), gradient.asnumpy()
    assert np.allclose(np.unique(out), [0, 4]) and abs((out > 0).mean() - 0.75) < 0.02
    np.testing.assert_allclose(gradient, out / 3, rtol=1e-6)


def test_dropout_is_the_identity_outside_training():
    cell = mint.nn.Dropout(0.25)
    cell.set_train(False)
    x = mint.ones((4, 4))
    assert (cell(x) == x).all() and (F.dropout(x, 0.5, training=False) == x).all()


def test_embedding_that_renormalises_is_refused():
    with pytest.raises(DeviceError, match="max_norm=1"):
        F.embedding(Tensor(WORDS), Tensor(PADDED), max_norm=1.0)
