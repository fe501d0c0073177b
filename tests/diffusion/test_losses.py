"""The losses and their gradients, eager and compiled, against NumPy."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ms_diffsynth.diffusion import losses

MODES = ("pynative", "graph")


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a compilation that fails leaves a folder


class Loss(nn.Cell):
    def __init__(self, prior_loss_weight=None):
        super().__init__()
        self.prior_loss_weight = prior_loss_weight

    def construct(self, velocity, target, weight):
        loss, per_sample = losses.weighted_mse(velocity, target, weight)
        if self.prior_loss_weight is not None:
            loss = losses.prior_preservation(per_sample, self.prior_loss_weight)
        return loss, per_sample


class Value(nn.Cell):
    def __init__(self, cell):
        super().__init__()
        self.value_and_grad = ms.value_and_grad(cell, 0, None, has_aux=True)

    def construct(self, velocity, target, weight):
        (loss, per_sample), gradient = self.value_and_grad(velocity, target, weight)
        return loss, per_sample, gradient


def run(mode, prior_loss_weight, *arrays):
    cell = Value(Loss(prior_loss_weight))
    cell = ms.jit(cell, fullgraph=True) if mode == "graph" else cell
    return [t.asnumpy() for t in cell(*map(Tensor, arrays))]


def arrays(batch=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    velocity, target = rng.standard_normal((2, batch, 3, 2, 5)).astype(dtype)
    return velocity, target, np.array([0.0, 0.5, 1.0, 4.0], np.float32)[:batch]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prior", [None, 0.0, 0.7])
def test_loss_and_gradient(mode, prior):
    v, t, w = arrays()
    loss, per_sample, gradient = run(mode, prior, v, t, w)
    error = v.astype(np.float64) - t
    wanted = w * (error**2).mean((1, 2, 3))
    share = np.full(4, 1 / 4) if prior is None else np.array([1, 1, prior, prior]) / 2
    np.testing.assert_allclose(per_sample, wanted, rtol=1e-6)
    np.testing.assert_allclose(loss, (share * wanted).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, (share * w).reshape(-1, 1, 1, 1) * 2 * error / 30, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_compared_in_float32(mode):
    v, t, w = arrays(dtype=np.float16)
    v[:], t[:] = 300, -300  # 600 squared is infinite in float16
    loss, _, gradient = run(mode, None, v, t, w)
    assert loss == pytest.approx(360_000 * w.mean())
    assert gradient.dtype == np.float16


def test_each_half_keeps_its_own_weights():
    """Weight only the instances: the class images then do not count, whatever prior_loss_weight is."""
    v, t, _ = arrays()
    w = np.array([1, 1, 0, 0], np.float32)
    assert run("pynative", 5.0, v, t, w)[0] == run("pynative", 0.0, v, t, w)[0] > 0


def test_an_odd_batch_has_no_halves():
    with pytest.raises(ValueError, match="a batch of 3 with prior preservation"):
        losses.prior_preservation(Tensor(np.ones(3, np.float32)), 1.0)
