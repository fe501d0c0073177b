"""AdamW on float32 parts, in one process: as `AdamW` where weights are float32, and exact where they are shorter.

Float16 stands for bfloat16, in which the CPU cannot assign (MindSpore 2.10).
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Parameter, Tensor, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.training import zero
from ms_diffsynth.training.optim import AdamW, ShardedAdamW
from ms_diffsynth.training.step import TrainStep

SHAPES = ((7, 5), (5,), (30, 4), (3,))
OPTIONS = {"learning_rate": 1e-2, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(zero.plan_buckets, "__defaults__", (50,))
    yield
    runtime.configure("graph", DEVICE)


def weights(dtype=ms.float32):
    rng = np.random.default_rng(0)
    return [Parameter(Tensor(rng.standard_normal(shape).astype(np.float32)).astype(dtype), name=f"w{k}")
            for k, shape in enumerate(SHAPES)]


class Net(nn.Cell):
    def __init__(self, dtype):
        super().__init__()
        self.weights = ms.ParameterTuple(weights(dtype))

    def construct(self, x):
        for weight in self.weights:
            x = ops.tanh(x * ops.sum(weight.astype(ms.float32) ** 2) + ops.sum(weight.astype(ms.float32)))
        return x


class State(dict):
    """Arrays as a checkpoint gives them."""

    @property
    def shapes(self):
        return {name: array.shape for name, array in self.items()}


class Step(TrainStep):
    def forward(self, x):
        return ((self.model(x) - 0.3) ** 2).mean()


def trained(kind, dtype, mode, accumulation=1, steps=8):
    runtime.configure(mode, DEVICE)
    net = Net(dtype)
    optimizer = kind(list(net.weights), **OPTIONS)
    step = Step(net, optimizer, max_grad_norm=0.5, gradient_accumulation_steps=accumulation, mode=mode)
    rng = np.random.default_rng(1)
    losses = [float(step.step(Tensor(rng.standard_normal((4, 3)).astype(np.float32))).loss.asnumpy())
              for _ in range(steps * accumulation)]
    return losses, [to_numpy(p) for p in net.weights], optimizer


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize(("stage", "accumulation"), [(1, 1), (2, 3)])
@pytest.mark.few(2)
def test_float32_weights_are_updated_as_adamw_does(mode, stage, accumulation):
    losses, expected, adamw = trained(AdamW, ms.float32, mode, accumulation)
    found, own, optimizer = trained(lambda p, **o: ShardedAdamW(p, stage, **o), ms.float32, mode, accumulation)
    assert np.allclose(found, losses, rtol=1e-6)
    for one, two in zip(own, expected):
        assert np.allclose(one, two, rtol=1e-6, atol=1e-7)
    pieces, shapes = optimizer.state_pieces()
    state = adamw.state_tensors()
    assert {name: tuple(shape) for name, shape in shapes.items()} == {name: p.shape for name, p in state.items()}
    for name, parameter in state.items():
        assert np.allclose(pieces[name], to_numpy(parameter).reshape(-1), rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.few(1)
def test_float16_weights_are_float32_ones_rounded(mode):
    """Updates a thousand times smaller than the last digit of a weight add up."""
    runtime.configure(mode, DEVICE)
    rounded, exact = weights(ms.float16), weights(ms.float16)
    exact = [Parameter(p.astype(ms.float32), name=p.name) for p in exact]
    one, two = ShardedAdamW(rounded, learning_rate=1e-5), AdamW(exact, learning_rate=1e-5)

    def update_one(*gradients):
        return one(gradients)

    def update_two(*gradients):
        return two(gradients)

    if mode == "graph":
        update_one, update_two = ms.jit(update_one, fullgraph=True), ms.jit(update_two, fullgraph=True)
    rng = np.random.default_rng(2)
    before = [to_numpy(p).astype(np.float32) for p in rounded]
    for _ in range(300):
        gradients = [np.abs(rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]
        flat = [np.concatenate([gradients[k].reshape(-1) for k in range(b.first, b.last)])
                for b in one.exchange.buckets]
        update_one(*map(Tensor, flat))
        update_two(*map(Tensor, gradients))
    pieces, _ = one.state_pieces()
    for k, (p, q) in enumerate(zip(rounded, exact)):
        assert np.array_equal(pieces[f"float32.w{k}"], to_numpy(q).reshape(-1))
        assert np.array_equal(to_numpy(p), to_numpy(q.astype(ms.float16))) and p.dtype == ms.float16
        assert np.abs(to_numpy(q) - before[k]).min() > 1e-3


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.few(1)
def test_a_step_trains_float16_weights(mode):
    losses, own, _ = trained(ShardedAdamW, ms.float16, mode, 2, steps=20)
    expected, _, _ = trained(AdamW, ms.float32, mode, 2, steps=20)
    assert np.allclose(losses, expected, rtol=2e-2) and all(array.dtype.name == "float16" for array in own)


def test_state_goes_into_another_and_training_goes_on_as_before():
    optimizers = [ShardedAdamW(weights(ms.float16), **OPTIONS) for _ in range(2)]
    rng = np.random.default_rng(3)
    batches = [[Tensor(rng.standard_normal(part).astype(np.float32)) for part in optimizers[0].exchange.parts]
               for _ in range(6)]
    for batch in batches[:3]:
        optimizers[0](batch)
    pieces, shapes = optimizers[0].state_pieces()
    for one, two in zip(optimizers[1].parameters, optimizers[0].parameters):
        ops.assign(one, two)
    optimizers[1].load_state_tensors(State({name: pieces[name].reshape(shapes[name]) for name in shapes}))
    for optimizer in optimizers:
        for batch in batches[3:]:
            optimizer(batch)
    for one, two in zip(optimizers[1].parameters, optimizers[0].parameters):
        assert np.array_equal(to_numpy(one), to_numpy(two))


def test_refused():
    with pytest.raises(ConfigError, match=r"zero_stage=3: expected 0, 1 or 2\."):
        ShardedAdamW(weights(), 3)
    with pytest.raises(WeightError, match=r"superfluous: moment1\.other"):
        ShardedAdamW(weights()).load_state_tensors(State({"moment1.other": np.zeros(3, np.float32)}))
    with pytest.raises(ConfigError, match="two parameters have one name: w, w"):
        ShardedAdamW([Parameter(Tensor(np.zeros(3, np.float32)), name="w") for _ in range(2)])
