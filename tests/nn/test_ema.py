"""The moving average of weights: its formula, with the step, in both modes."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor, mint, nn
from mindspore.nn.utils import no_init_parameters

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.nn.names import assign
from ms_diffsynth.training.optim import AdamW, ShardedAdamW
from ms_diffsynth.training.step import TrainStep


class Step(TrainStep):
    def forward(self, x):
        return (((self.model(x) - 1) ** 2).mean(),)


def build(mode, decay=0.9):
    runtime.configure(mode, DEVICE)
    ms.set_seed(3)
    model = mint.nn.Linear(4, 2)
    ema = EMA(model.trainable_params(), decay)
    return model, ema, Step(model, AdamW(model.trainable_params(), learning_rate=0.05), ema=ema, mode=mode)


def inputs(k):
    return Tensor(np.random.default_rng(k).standard_normal((3, 4)).astype(np.float32))


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_the_average_follows_the_weights_of_every_update(mode):
    model, ema, step = build(mode)
    expected = model.weight.asnumpy().astype(np.float64)
    for t in range(30):
        step.step(inputs(t))
        expected += max(1 - 0.9, 9 / (10 + t) if t else 1.0) * (model.weight.asnumpy() - expected)
    np.testing.assert_allclose(ema.average[0].asnumpy(), expected, rtol=2e-6)
    assert int(ema.step.asnumpy()) == 30 and np.abs(expected - model.weight.asnumpy()).max() > 1e-3


def test_the_first_updates_are_those_of_diffusers():
    """diffusers 0.42.1, EMAModel(decay=0.9): weights of 1, 4, 9, ... 49 after 0, which is forgotten at once."""
    runtime.configure("pynative", DEVICE)
    weight = ms.Parameter(Tensor(np.zeros(1, np.float32)), name="w")
    ema, found = EMA([weight], 0.9), []
    for k in range(1, 8):
        ms.ops.assign(weight, Tensor(np.float32([k * k])))
        ema(Tensor(True))
        found.append(float(ema.average[0].asnumpy()[0]))
    wanted = [1.0, 3.4545455, 7.6136365, 13.4195796, 20.8641357, 29.9456558, 40.6637268]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_of_rounded_weights_the_float32_values_are_averaged(mode):
    """Float16 stands for bfloat16; updates are below the last digit of the weights, which stand still at first."""
    runtime.configure(mode, DEVICE)
    model = mint.nn.Linear(4, 2)
    for p in model.trainable_params():
        p.set_dtype(ms.float16)
        p.set_data(Tensor(np.full(p.shape, 1.0, np.float16)))
    ema = EMA(model.trainable_params(), 0.5)
    optimizer = ShardedAdamW(model.trainable_params(), learning_rate=1e-5, weight_decay=0.0)

    class Half(TrainStep):
        def forward(self, x):
            return (ms.ops.matmul(x, self.model.weight.astype(ms.float32).T).mean() + self.model.bias.sum(),)

    step, expected = Half(model, optimizer, ema=ema, mode=mode), None
    for t in range(6):
        step.step(Tensor(np.ones((3, 4), np.float32)))
        now = optimizer.state_pieces()[0][f"float32.{model.weight.name}"].astype(np.float64)
        expected = now if expected is None else expected + max(0.5, 9 / (10 + t)) * (now - expected)
    assert model.weight.dtype == ms.float16 and (model.weight.asnumpy() == 1).all() and expected.max() < 0.99996
    np.testing.assert_allclose(ema.average[0].asnumpy().reshape(-1), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_a_skipped_step_does_not_count(mode):
    _, ema, step = build(mode)
    step.step(inputs(0))
    before = {name: p.asnumpy().copy() for name, p in ema.state_tensors().items()}
    assert not bool(step.step(Tensor(np.full((3, 4), np.inf, np.float32))).is_finite.asnumpy())
    for name, p in ema.state_tensors().items():
        np.testing.assert_array_equal(p.asnumpy(), before[name])


def test_the_compiled_step_reads_the_weights_again_after_the_average_was_applied():
    model, ema, step = build("graph")
    other_model, _, other = build("graph")
    for t in range(5):
        loss, expected = step.step(inputs(t)).loss, other.step(inputs(t)).loss
        before = model.weight.asnumpy().copy()
        with ema.applied():
            np.testing.assert_array_equal(model.weight.asnumpy(), ema.average[0].asnumpy())
        np.testing.assert_array_equal(model.weight.asnumpy(), before)
        assert float(loss.asnumpy()) == float(expected.asnumpy())
    np.testing.assert_array_equal(model.weight.asnumpy(), other_model.weight.asnumpy())


def test_the_average_begins_at_weights_that_were_loaded():
    runtime.configure("pynative", DEVICE)
    with no_init_parameters():
        model = mint.nn.Linear(4, 2)
    weights = {"weight": np.full((2, 4), 0.25, np.float32), "bias": np.full(2, 0.5, np.float32)}
    assign(model, weights.items())
    found = EMA(list(model.get_parameters())).average
    np.testing.assert_array_equal(found[0].asnumpy(), weights["weight"])
    np.testing.assert_array_equal(found[1].asnumpy(), weights["bias"])


def test_the_weights_come_back_after_an_error():
    model, ema, step = build("pynative")
    step.step(inputs(0))
    before = model.weight.asnumpy().copy()
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    np.testing.assert_array_equal(model.weight.asnumpy(), before)


def test_state_goes_out_and_in():
    _, ema, step = build("pynative")
    step.step(inputs(0))
    saved = {name: p.asnumpy().copy() for name, p in ema.state_tensors().items()}
    _, fresh, _ = build("pynative")
    fresh.load_state_tensors(saved)
    for name, p in fresh.state_tensors().items():
        np.testing.assert_array_equal(p.asnumpy(), saved[name])
    with pytest.raises(WeightError, match=r"missing: ema\.step"):
        fresh.load_state_tensors({k: v for k, v in saved.items() if k != "ema.step"})


@pytest.mark.parametrize("decay", [1, 1.5, -0.1])
def test_a_decay_that_is_none(decay):
    with pytest.raises(ConfigError, match=f"ema_decay={decay}: expected 0 <= ema_decay < 1"):
        EMA(nn.Dense(1, 1).trainable_params(), decay)
