"""1,008 batches that are not finite: not one of them changes a bit of weights, moments or moving average.

Twelve kinds of steps (no scaler, a static one, a dynamic one; groups of one and of three; both modes), each compiled
once, take 84 bad batches: seven kinds of badness, each at every place of a group. Every seventh group is good, so that
there are moments to spoil, and a guard that never lets anything through would be seen.
"""
from __future__ import annotations

from itertools import count

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.amp import DynamicLossScaler, StaticLossScaler

from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.step import TrainStep

BAD_BATCHES = 84
SCALE = 2.0**16
SCALERS = {"none": lambda: None, "static": lambda: StaticLossScaler(SCALE),
           "dynamic": lambda: DynamicLossScaler(SCALE, 2, 1)}
KINDS = ["overflow", *((name, value) for name in ("x", "noise") for value in (np.nan, np.inf, -np.inf))]
# Its loss is finite. Gradients go with its square: 1e34 overflows where it is squared for their norm, 1e16 does so only
# after it was multiplied by the scale.
OVERFLOWS = {"none": 1e17, "static": 1e8, "dynamic": 1e8}
NAMES = count()  # MindSpore wants distinct names of Parameters

pytestmark = pytest.mark.fault


class Network(nn.Cell):
    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.weight, self.bias = [
            Parameter(Tensor(rng.standard_normal(shape).astype(np.float32)), name=f"nonfinite{next(NAMES)}")
            for shape in ((3, 3), (3,))]

    def construct(self, x):
        return mint.matmul(x, self.weight) + self.bias


class Denoising(TrainStep):
    def forward(self, x, noise):
        error = self.model(x + noise) - noise
        return (error * error).mean()


def build(scaler, accumulation, mode):
    network = Network()
    optimizer = AdamW(list(network.get_parameters()), 1e-2)
    return Denoising(network, optimizer, loss_scaler=SCALERS[scaler](), gradient_accumulation_steps=accumulation,
                     max_grad_norm=1.0, ema=EMA(optimizer.parameters, 0.9), mode=mode)


def bits(step):
    """Everything that a step must not touch, as bytes by name."""
    state = {p.name: p for p in step.weights} | step.optimizer.state_tensors() | step.ema.state_tensors()
    return {name: parameter.asnumpy().tobytes() for name, parameter in state.items()}


def group_of(rng, size, bad=None, place=0):
    """The batches of one optimizer step; in the one at ``place`` a number of one input is ``bad``: (input, value)."""
    group = [{name: rng.standard_normal((2, 3)).astype(np.float32) for name in ("x", "noise")} for _ in range(size)]
    if bad is not None:
        name, value = bad
        group[place][name][1, rng.integers(3)] = value
    return group


def train_on(step, group):
    results = [step.step(Tensor(batch["x"]), Tensor(batch["noise"])) for batch in group]
    assert [result.is_update for result in results] == [False] * (len(group) - 1) + [True]
    return results


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("accumulation", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.few(3)
def test_84_bad_batches_change_no_bit(scaler, accumulation, mode):
    step, rng = build(scaler, accumulation, mode), np.random.default_rng(1)
    losses = []
    for number in range(BAD_BATCHES):
        before = bits(step)
        if number % len(KINDS) == 0:
            if scaler == "dynamic":
                ops.assign(step.loss_scale, Tensor(SCALE, ms.float32))  # as after many good steps
            assert bool(train_on(step, group_of(rng, accumulation))[-1].is_finite.asnumpy())
            after = bits(step)
            assert all(after[name] != before[name] for name in before), "a good step changes everything"
            before = after
        kind = KINDS[number % len(KINDS)]
        bad = ("x", OVERFLOWS[scaler]) if kind == "overflow" else kind
        results = train_on(step, group_of(rng, accumulation, bad, number // len(KINDS) % accumulation))
        assert not bool(results[-1].is_finite.asnumpy()), kind
        assert bits(step) == before, f"{kind} changed {[n for n, v in bits(step).items() if v != before[n]]}"
        losses += [float(result.loss.asnumpy()) for result in results] if kind == "overflow" else []
    assert len(losses) == 12 * accumulation and np.isfinite(losses).all(), "what overflows are gradients"
    if scaler != "none":  # doubled by the last good step, halved by the seven since
        assert float(step.loss_scale.asnumpy()) == (SCALE if scaler == "static" else SCALE * 2 / 2**7)
    assert step.compilations == (0 if mode == "pynative" else 2 if accumulation > 1 else 1)
    train_on(step, group_of(rng, accumulation))
    assert all(np.isfinite(np.frombuffer(data, np.float32)).all() for data in bits(step).values())
    assert ms.get_context("mode") == ms.PYNATIVE_MODE


def test_that_is_more_than_a_thousand():
    assert len(SCALERS) * 2 * 2 * BAD_BATCHES == 1008
