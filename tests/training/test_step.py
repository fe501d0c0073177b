"""The training step against a float64 reference: accumulation, clipping, scaling, bad batches; in both modes.

The reference knows nothing of scaling: whatever the scaler, the numbers are the same. A group of micro-steps with a bad
batch in it leaves everything as it was.
"""
from __future__ import annotations

from itertools import count

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.amp import DynamicLossScaler, StaticLossScaler

from ms_diffsynth.errors import TrainingError
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.step import AttrJitWrapper, TrainStep

MODES = ("pynative", "graph")
RATE, DECAY, FACTOR = 0.05, 0.1, 0.5
NAMES = count()  # MindSpore wants distinct names of Parameters


class Line(nn.Cell):
    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        weight, bias = rng.standard_normal((3, 2)), rng.standard_normal(2)
        self.weight = Parameter(Tensor(weight.astype(np.float32)), name=f"line{next(NAMES)}.weight")
        self.bias = Parameter(Tensor(bias.astype(np.float32)), name=f"line{next(NAMES)}.bias")

    def construct(self, x):
        return x @ self.weight + self.bias


class Regression(TrainStep):
    """As one writes it for mindone."""

    def __init__(self, model, optimizer, **options):
        super().__init__(model, optimizer, **options)
        self.args = AttrJitWrapper(is_weighted=True, factor=FACTOR, unused=None)

    def forward(self, x, y):
        prediction = self.model(x)
        error = prediction - y
        loss = (error * error).mean()
        if self.args.is_weighted:
            loss = loss * self.args.factor
        loss = self.scale_loss(loss)
        return loss, prediction


class Forgetful(Regression):
    """Neither scales its loss nor returns anything else."""

    def forward(self, x, y):
        error = self.model(x) - y
        return (error * error).mean() * self.args.factor


def reference(batches, groups, max_grad_norm, start):
    """(loss of every batch, (gradient norm, weights) of every group) in float64, by AdamW."""
    weights = [p.astype(np.float64) for p in start]
    m, v = [[np.zeros_like(p) for p in weights] for _ in range(2)]
    t, losses, updates, position = 0, [], [], 0
    for size in groups:
        total = [np.zeros_like(p) for p in weights]
        for x, y in batches[position:position + size]:
            error = x.astype(np.float64) @ weights[0] + weights[1] - y
            losses.append(FACTOR * np.mean(error**2))
            d = FACTOR * 2 * error / error.size
            total = [total[0] + x.T.astype(np.float64) @ d / size, total[1] + d.sum(0) / size]
        position += size
        norm = np.sqrt(sum((g**2).sum() for g in total))
        if np.isfinite(norm):
            t += 1
            clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
            for k, g in enumerate(total):
                m[k] = 0.9 * m[k] + 0.1 * g * clip
                v[k] = 0.999 * v[k] + 0.001 * (g * clip) ** 2
                weights[k] = weights[k] * (1 - RATE * DECAY)
                weights[k] = weights[k] - RATE * m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
        updates.append((norm, [p.copy() for p in weights]))
    return losses, updates


def batches_with_bad_ones(bad: dict[int, float], n: int = 9):
    rng = np.random.default_rng(5)
    batches = [(rng.standard_normal((4, 3)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32))
               for _ in range(n)]
    for k, value in bad.items():
        batches[k][0][1, 2] = value
    return batches


# The bad batches fall on a micro-step, on an update, and on the last, partial group of an epoch of three.
BAD = {1: np.nan, 2: np.inf, 6: -np.inf, 8: np.nan}
IN_TWOS = {"gradient_accumulation_steps": 2, "gradient_accumulation_kwargs": {"length_of_dataloader": 3}}
CASES = {
    "defaults": (Regression, [1] * 9, dict),
    "all at once": (Regression, [2, 1] * 3,
                    lambda: {"loss_scaler": StaticLossScaler(4096), "max_grad_norm": 0.3} | IN_TWOS),
    "growing and shrinking scale": (Forgetful, [1] * 9, lambda: {"loss_scaler": DynamicLossScaler(64, 2, 2)}),
    "accumulation of three": (Forgetful, [3] * 3, lambda: {"max_grad_norm": 0.3, "gradient_accumulation_steps": 3}),
}


def copies(tensors) -> list[np.ndarray]:
    return [t.asnumpy().copy() for t in tensors]


def build(case: str, mode: str):
    kind, groups, options = CASES[case]
    model = Line()
    optimizer = AdamW([model.weight, model.bias], RATE, weight_decay=DECAY)
    return kind(model, optimizer, mode=mode, **options()), groups


def run(step, batches):
    """Results of every batch, and all state after it."""
    results, states = [], []
    for x, y in batches:
        results.append(step.step(Tensor(x), Tensor(y)))
        states.append(copies([*step.weights, *step.optimizer.state_tensors().values()]))
    return results, states


@pytest.mark.fault
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_follows_the_reference_and_passes_over_what_is_not_finite(case, mode):
    step, groups = build(case, mode)
    start = copies(step.weights)
    before = copies([*step.weights, *step.optimizer.state_tensors().values()])
    batches = batches_with_bad_ones(BAD)
    with np.errstate(invalid="ignore"):
        losses, updates = reference(batches, groups, step.max_grad_norm, start)
    results, states = run(step, batches)

    last_of_group = np.cumsum(groups) - 1
    assert [k for k, r in enumerate(results) if r.is_update] == last_of_group.tolist()
    # the true loss, though it was scaled; float32 against float64, loss about 1
    np.testing.assert_allclose([float(r.loss.asnumpy()) for r in results], losses, rtol=2e-6)
    for k, (norm, weights) in zip(last_of_group, updates):
        assert bool(results[k].is_finite.asnumpy()) == bool(np.isfinite(norm))
        if np.isfinite(norm):
            assert float(results[k].grad_norm.asnumpy()) == pytest.approx(norm, rel=2e-6)
        else:
            for old, new in zip(before, states[k]):
                assert old.tobytes() == new.tobytes()  # weights, moments and step count
        for found, wanted in zip(states[k], weights):
            # Adam's first steps have size RATE whatever the gradient: an error of 1e-6 in it shows as 1e-6
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
        before = states[k]
    assert np.isfinite([r.grad_norm.asnumpy() for r in results if r.is_update]).sum() >= 1
    for r in results:
        assert r.is_update == (r.grad_norm is not None) == (r.is_finite is not None)


def test_both_modes_agree_to_the_last_bit_but_one():
    batches = batches_with_bad_ones(BAD)
    (eager, eager_states), (compiled, compiled_states) = [run(build("all at once", m)[0], batches) for m in MODES]
    for a, b in zip(eager, compiled):
        # a graph may fuse a product and a sum: one rounding, 6e-8 of the value
        np.testing.assert_allclose(a.loss.asnumpy(), b.loss.asnumpy(), rtol=1.2e-7)
        np.testing.assert_allclose(a.aux[0].asnumpy(), b.aux[0].asnumpy(), rtol=0, atol=1e-6)
    for a, b in zip(eager_states, compiled_states):
        for x, y in zip(a, b):
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-7)


@pytest.mark.fault
def test_the_scale_grows_and_shrinks_and_each_loss_is_the_true_one():
    step, _ = build("growing and shrinking scale", "pynative")
    scales = []
    for x, y in batches_with_bad_ones({4: np.inf}, 6):
        step.step(Tensor(x), Tensor(y))
        scales.append(float(step.loss_scale.asnumpy()))
    assert scales == [64, 128, 128, 256, 128, 128]  # grows after two good steps in a row, halves after a bad one


@pytest.mark.parametrize("mode", MODES)
def test_gradients_themselves(mode):
    """With plain descent at rate 1 the weights move by the gradients."""
    model = Line()
    optimizer = nn.SGD([model.weight, model.bias], learning_rate=1.0)
    step = Regression(model, optimizer, loss_scaler=StaticLossScaler(4096), mode=mode)
    (x, y), = batches_with_bad_ones({}, 1)
    before = copies(step.weights)
    loss, prediction = step(Tensor(x), Tensor(y))  # mindone's call
    error = x.astype(np.float64) @ before[0] + before[1] - y
    assert float(loss.asnumpy()) == pytest.approx(FACTOR * np.mean(error**2), rel=1e-6)
    np.testing.assert_allclose(prediction.asnumpy() - y, error, atol=1e-6)
    d = FACTOR * 2 * error / error.size
    for old, new, wanted in zip(before, copies(step.weights), (x.T @ d, d.sum(0))):
        np.testing.assert_allclose(old - new, wanted, rtol=0, atol=5e-7)  # differences of float32 of size 1


@pytest.mark.fault
@pytest.mark.parametrize("mode", MODES)
def test_a_foreign_optimizer_is_guarded(mode):
    model = Line()
    inner = nn.AdamWeightDecay([model.weight, model.bias], learning_rate=0.1)
    step = Regression(model, inner, max_grad_norm=1.0, mode=mode)
    (x, y), (bad, _) = batches_with_bad_ones({1: np.nan}, 2)
    first = float(step(Tensor(x), Tensor(y))[0].asnumpy())
    before = copies(inner.get_parameters())
    assert not bool(step.step(Tensor(bad), Tensor(y)).is_finite.asnumpy())
    for old, new in zip(before, copies(inner.get_parameters())):
        assert old.tobytes() == new.tobytes()
    for _ in range(20):
        last = float(step(Tensor(x), Tensor(y))[0].asnumpy())
    assert last < 0.7 * first


def test_sixty_steps_compile_once_each_kind_and_a_result_keeps_its_value():
    step, _ = build("all at once", "graph")
    batches = [tuple(map(Tensor, pair)) for pair in batches_with_bad_ones({}, 3)]
    results, read = [], []
    for k in range(60):
        results.append(step.step(*batches[k % 3]))
        read.append(float(results[-1].loss.asnumpy()))
    assert [c.compilations for c in step.compiled_steps.values()] == [1, 1]
    assert step.compilations == 2 and step.compile_seconds > 0
    assert [float(r.loss.asnumpy()) for r in results] == read  # later steps do not reuse its memory
    assert read[-3] < 0.5 * read[0]


def test_a_new_learning_rate_reaches_the_compiled_step():
    step, _ = build("defaults", "graph")
    (x, y), = batches_with_bad_ones({}, 1)
    step(Tensor(x), Tensor(y))
    step.optimizer.set_learning_rate(0.0)
    before = copies(step.weights)
    step(Tensor(x), Tensor(y))
    assert all(np.array_equal(a, b) for a, b in zip(before, copies(step.weights)))


def test_other_weights_are_left_alone():
    model = Line()
    step = Regression(model, AdamW([model.bias], RATE), mode="pynative")
    (x, y), = batches_with_bad_ones({}, 1)
    before = copies([model.weight, model.bias])
    step(Tensor(x), Tensor(y))
    assert np.array_equal(before[0], model.weight.asnumpy()) and not np.array_equal(before[1], model.bias.asnumpy())


def test_groups_run_across_epochs_when_told_so():
    model = Line()
    accumulation = {"length_of_dataloader": 3, "sync_with_dataloader": False}
    step = Regression(model, AdamW([model.bias], RATE), mode="pynative", gradient_accumulation_steps=2,
                      gradient_accumulation_kwargs=accumulation)
    results, _ = run(step, batches_with_bad_ones({}, 6))
    assert [r.is_update for r in results] == [False, True] * 3


def test_draws_are_appended_to_the_batch():
    class Noisy(Regression):
        def draws(self, *batch):
            assert len(batch) == 1
            return (Tensor(np.full((4, 2), 7.0, np.float32)),)

    model = Line()
    step = Noisy(model, AdamW([model.bias], RATE), mode="pynative")
    (x, _), = batches_with_bad_ones({}, 1)
    error = x @ model.weight.asnumpy() + model.bias.asnumpy() - 7
    assert float(step(Tensor(x))[0].asnumpy()) == pytest.approx(FACTOR * np.mean(error**2), rel=1e-5)


def test_what_cannot_work_is_refused_before_the_first_step():
    class Nothing:
        parameters = ()

    with pytest.raises(TrainingError, match=r"holds no parameters.*lora_base_model"):
        TrainStep(Line(), Nothing())
    for wrong, part in [({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
                        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
                        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
                        ({"gradient_accumulation_kwargs": {"lenght_of_dataloader": 3}}, "length_of_dataloader")]:
        model = Line()
        with pytest.raises(TrainingError, match=part):
            Regression(model, AdamW([model.bias]), **wrong)


def test_a_step_without_forward_says_so():
    model = Line()
    with pytest.raises(TypeError, match="TrainStep has no forward"):
        TrainStep(model, AdamW([model.bias])).forward(Tensor(1.0, ms.float32))
