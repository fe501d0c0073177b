"""Prodigy and Adafactor against PyTorch; the contract, its registry, division and settings; runs with each optimizer.

``optimizers_torch.npz`` is written by ``optimizers_torch.py``.
"""
from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from toy_run import Module, equal, rows, state, toy_model, train

from ms_diffsynth import runtime
from ms_diffsynth.errors import CheckpointError, ConfigError, TrainingError, WeightError
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.ops.update import put
from ms_diffsynth.registry import OPTIMIZERS
from ms_diffsynth.storage.checkpoint import latest
from ms_diffsynth.training import grads, same_run, zero
from ms_diffsynth.training.optim import (
    AdamW,
    Float32Weights,
    Sharded,
    build_optimizer,
    guarded,
    optimizer_arguments,
)
from ms_diffsynth.training.optim.adafactor import Adafactor
from ms_diffsynth.training.optim.came import CAME
from ms_diffsynth.training.optim.prodigy import Prodigy
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.step import TrainStep

MODES = ("pynative", "graph")
STEPS, KEPT = 60, (0, 1, 9, 59)
CASES = {
    "prodigy.default": (Prodigy, 1.0, {}),
    "prodigy.other": (Prodigy, 0.5, {"betas": (0.8, 0.95), "weight_decay": 0.1, "d_coef": 2.0, "d0": 1e-3,
                                     "use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.2}),
    "adafactor.default": (Adafactor, 1e-2, {}),
    "adafactor.other": (Adafactor, 5e-2, {"scale_parameter": True, "momentum": 0.9, "weight_decay": 0.1,
                                          "decay_rate": -0.7, "clip_threshold": 0.5, "eps": (1e-20, 1e-2)}),
}
KINDS = {"prodigy": lambda p: Prodigy(p, 1.0, weight_decay=0.1),
         "prodigy, corrected": lambda p: Prodigy(p, 1.0, use_bias_correction=True, safeguard_warmup=True),
         "adafactor": lambda p: Adafactor(p, 1e-2, weight_decay=0.1),
         "adafactor, all": lambda p: Adafactor(p, 1e-2, momentum=0.9, scale_parameter=True, weight_decay=0.1),
         "came": lambda p: CAME.from_settings(p, 1e-2, 0.1)}


@pytest.fixture(autouse=True)
def _device():
    runtime.configure("graph", DEVICE)
    yield
    runtime.configure("graph", DEVICE)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "optimizers_torch.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


class Update(nn.Cell):
    """What a training step does with three gradients."""

    def __init__(self, optimizer):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer

    def construct(self, first, second, third):
        norm = ops.sqrt(grads.sum_of_squares((first, second, third)))
        is_finite = grads.is_finite(norm)
        self.optimizer((first, second, third), grads.clip_coefficient(norm, 2.0), is_finite)
        return is_finite


def runner(optimizer, mode):
    cell = Update(optimizer)
    return ms.jit(cell, fullgraph=True) if mode == "graph" else cell


def weights(reference) -> list[Parameter]:
    return [Parameter(Tensor(reference[f"start.{i}"]), name=f"w{i}") for i in range(3)]


def gradients(reference, k, case="prodigy.default") -> list[Tensor]:
    return [Tensor(reference[f"{case}.gradients.{i}"][k]) for i in range(3)]


def contents(optimizer) -> list[np.ndarray]:
    return [to_numpy(p) for p in (*optimizer.parameters, *optimizer.state_tensors().values())]


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.few(2)
def test_follows_torch_for_sixty_clipped_steps_of_a_learning_rate_that_warms_up(reference, case, mode):
    kind, rate, settings = CASES[case]
    optimizer = kind(weights(reference), rate, **settings)
    run, kept, distances = runner(optimizer, mode), [], []
    for k in range(STEPS):
        optimizer.set_learning_rate(rate * min(k / 4, 1.0))
        assert bool(run(*gradients(reference, k, case)))
        if kind is Prodigy:
            distances.append(float(optimizer.d.asnumpy()))
        if k in KEPT:
            kept.append([to_numpy(p) for p in optimizer.parameters])
    for i in range(3):
        # Float32 weights of size 5. Prodigy's first steps are as small as their last digits, and d remembers them.
        tolerance = 1e-5 if kind is Prodigy else 2e-6
        np.testing.assert_allclose([w[i] for w in kept], reference[f"{case}.{i}"], rtol=tolerance, atol=tolerance)
    if kind is Prodigy:
        np.testing.assert_allclose(distances, reference[f"{case}.d"], rtol=1e-5)
        assert distances[-1] > 500 * distances[0] and int(optimizer.step.asnumpy()) == STEPS - 1  # one with rate 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(2)
def test_modes_agree(reference, kind):
    found = []
    for mode in MODES:
        optimizer = KINDS[kind](weights(reference))
        run = runner(optimizer, mode)
        for k in range(8):
            run(*gradients(reference, k))
        found.append(contents(optimizer))
    for eager, compiled in zip(*found):
        np.testing.assert_allclose(compiled, eager, rtol=2e-6, atol=1e-9)


@pytest.mark.fault
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(2)
def test_gradients_that_are_not_finite_change_nothing(reference, kind, mode):
    optimizer, other = (KINDS[kind](weights(reference)) for _ in range(2))
    run, rerun = runner(optimizer, mode), runner(other, mode)
    for k in range(3):
        before = contents(optimizer)
        for value in (np.nan, np.inf, -np.inf):
            bad = [g.asnumpy().copy() for g in gradients(reference, 5)]
            bad[k][-1] = value
            assert not bool(run(*map(Tensor, bad)))
            for old, new in zip(before, contents(optimizer)):
                assert np.array_equal(old, new)
        run(*gradients(reference, k))
        rerun(*gradients(reference, k))
    for one, two in zip(contents(optimizer), contents(other)):
        assert np.array_equal(one, two)  # as if the bad steps had never been
    assert not np.array_equal(contents(optimizer)[0], reference["start.0"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(2)
def test_state_goes_into_another_that_is_compiled_and_goes_on_to_the_same_bits(reference, kind, mode):
    first = KINDS[kind](weights(reference))
    run = runner(first, mode)
    for k in range(5):
        run(*gradients(reference, k))
    second = KINDS[kind](weights(reference))
    rerun = runner(second, mode)
    rerun(*gradients(reference, 9))  # compiled before the state arrives
    for to, parameter in zip(second.parameters, first.parameters):
        ops.assign(to, Tensor(to_numpy(parameter)))
    saved = {name: to_numpy(p) for name, p in first.state_tensors().items()}
    assert not saved.keys() & {p.name for p in first.parameters}
    second.load_state_tensors(saved)
    for k in range(5, 9):
        run(*gradients(reference, k))
        rerun(*gradients(reference, k))
    for one, two in zip(contents(first), contents(second)):
        assert one.tobytes() == two.tobytes()
    with pytest.raises(WeightError, match="missing: "):
        second.load_state_tensors({name: saved[name] for name in list(saved)[1:]})


@pytest.mark.parametrize("mode", MODES)
def test_prodigy_waits_while_every_gradient_or_the_learning_rate_is_zero(mode):
    optimizer = Prodigy([Parameter(Tensor(np.ones(4, np.float32)), name="w")], weight_decay=0.5)

    def update(gradient):
        return optimizer((gradient,))

    update = ms.jit(update, fullgraph=True) if mode == "graph" else update
    before = contents(optimizer)
    update(Tensor(np.zeros(4, np.float32)))
    optimizer.set_learning_rate(0.0)
    update(Tensor(np.ones(4, np.float32)))
    for old, new in zip(before, contents(optimizer)):
        assert np.array_equal(old, new)
    optimizer.set_learning_rate(1.0)
    update(Tensor(np.ones(4, np.float32)))
    assert (optimizer.parameters[0].asnumpy() < 1).all()


def test_prodigy_finds_the_distance():
    """On |w - goal| it needs no learning rate: d is about the distance of an element, and the loss falls."""
    goal = np.linspace(-30, 30, 64).astype(np.float32)
    weight = Parameter(Tensor(np.zeros(64, np.float32)), name="w")
    optimizer = Prodigy([weight])
    for _ in range(300):
        optimizer((Tensor(np.sign(weight.asnumpy() - goal)),))
    assert np.abs(weight.asnumpy() - goal).mean() < 3 and 1 < float(optimizer.d.asnumpy()) < 30


def test_adafactor_keeps_rows_and_columns_of_matrices_and_the_whole_of_a_vector(reference):
    shapes = {name: p.shape for name, p in Adafactor(weights(reference)).state_tensors().items()}
    assert shapes == {"row.w0": (3,), "column.w0": (4,), "moment2.w1": (5,), "row.w2": (2, 3), "column.w2": (2, 4),
                      "adafactor.step": ()}


def test_impossible_numbers_are_all_named_at_once():
    half = Parameter(Tensor(np.ones(2), ms.float16), name="half")
    with pytest.raises(ConfigError) as error:
        Prodigy([half], -1, (1.0, 0.9), 0, np.nan, d0=0, d_coef=0, growth_rate=1)
    for part in ("learning_rate=-1", "betas=(1.0, 0.9,", "eps=0", "weight_decay=nan", "d0=0", "d_coef=0",
                 "growth_rate=1:", "half (Float16)"):
        assert part in str(error.value)
    with pytest.raises(ConfigError) as error:
        Adafactor([half], -1, (0, 1), 0, 0.8, 1)
    for part in ("learning_rate=-1", "eps=(0, 1)", "clip_threshold=0", "decay_rate=0.8", "momentum=1", "half"):
        assert part in str(error.value)
    with pytest.raises(TrainingError, match="Prodigy was given no parameters"):
        Prodigy([])


# -- the contract ----------------------------------------------------------------------------------------------------


class Line(nn.Cell):
    def __init__(self, dtype=ms.float32):
        super().__init__()
        rng = np.random.default_rng(0)
        self.weight, self.bias = (Parameter(Tensor(rng.standard_normal(shape).astype(np.float32)).astype(dtype))
                                  for shape in ((3, 2), (2,)))

    def construct(self, x):
        return x @ self.weight.astype(ms.float32) + self.bias.astype(ms.float32)


class Step(TrainStep):
    def forward(self, x, y):
        return ((self.model(x) - y) ** 2).mean()


def losses(build, mode, steps=12, dtype=ms.float32, **options):
    runtime.configure(mode, DEVICE)
    net, rng = Line(dtype), np.random.default_rng(1)
    step = Step(net, build(net.trainable_params()), max_grad_norm=1.0, mode=mode, **options)
    batch = [Tensor(rng.standard_normal((4, n)).astype(np.float32)) for n in (3, 2)]
    return [float(step.step(*batch).loss.asnumpy()) for _ in range(steps)], step


class Descent:
    """Plain gradient descent: the contract and nothing of ours."""

    is_elementwise, exchange, sums_early, is_divided = True, None, False, False

    def __init__(self, parameters, rate=0.1):
        self.parameters = self.accumulated = ParameterTuple(parameters)
        self.rate = Parameter(Tensor(rate, ms.float32), name="descent.rate")

    def __call__(self, gradients, coefficient=None, is_finite=None):
        rate = ops.select(is_finite, self.rate * coefficient, ops.zeros_like(coefficient))
        return tuple(put(p, p - g * rate) for p, g in zip(self.parameters, gradients))

    def set_learning_rate(self, value):
        ops.assign(self.rate, Tensor(np.float32(value)))

    def take_weights(self):
        pass

    def divide(self):
        pass

    def float32_weights(self):
        return None

    def state_tensors(self):
        return {}

    def load_state_tensors(self, state):
        pass


def test_a_step_takes_anything_that_fulfils_the_contract():
    found, step = losses(Descent, "pynative")
    assert found[-1] < 0.8 * found[0] and isinstance(step.optimizer, Descent)
    assert all(guarded(optimizer) is optimizer for optimizer in (step.optimizer, AdamW(step.weights)))
    half = type("Half", (), {"parameters": step.weights, "state_tensors": None, "exchange": None})()
    with pytest.raises(TrainingError, match=r"Half has no set_learning_rate, take_weights, .* OptimizerCell"):
        guarded(half)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.few(2)
def test_every_optimizer_of_the_registry_trains(name, mode):
    options = TrainingOptions(optimizer=name, learning_rate=1.0 if name == "prodigy" else 5e-2)
    found, step = losses(lambda p: build_optimizer(options, p), mode, 30, gradient_accumulation_steps=2)
    assert found[-1] < (0.99 if name == "prodigy" else 0.8) * found[0], found
    for member in ("parameters", "is_elementwise", "exchange", "sums_early", "accumulated", "is_divided"):
        assert hasattr(step.optimizer, member)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["AdamWeightDecay", "Momentum", "SGD"])
@pytest.mark.few(2)
def test_mindsporess_optimizers_obey_their_list_of_learning_rates(kind, mode):
    def build(parameters):
        rates = [0.05, 0.05, 0.0, 0.0, 0.05]
        return nn.Momentum(parameters, rates, 0.9) if kind == "Momentum" else getattr(nn, kind)(parameters, rates)

    found, _ = losses(build, mode, 5)
    assert found[0] > found[1] > found[2] == found[3] == found[4], found


# -- divided, and float32 weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.few(1)
def test_prodigy_in_parts_is_prodigy(stage, mode, monkeypatch):
    monkeypatch.setattr(zero.plan_buckets, "__defaults__", (6,))  # a bucket for each weight
    build = partial(Prodigy, weight_decay=0.1, d0=1e-2)
    options = {"gradient_accumulation_steps": 2}
    wanted, whole = losses(build, mode, 24, **options)
    found, parts = losses(partial(Sharded, build, stage=stage), mode, 24, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    pieces, shapes = parts.optimizer.state_pieces()
    kept = whole.optimizer.state_tensors()
    assert {name: tuple(shape) for name, shape in shapes.items()} == {name: p.shape for name, p in kept.items()}
    for name, parameter in kept.items():
        np.testing.assert_allclose(pieces[name], to_numpy(parameter).reshape(-1), rtol=1e-4, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("build", [Adafactor, partial(CAME.from_settings, learning_rate=1e-2, weight_decay=0.0)])
def test_what_needs_whole_weights_is_not_divided(reference, build):
    with pytest.raises(ConfigError, match=r"needs every weight whole.*expected zero_stage=0 instead of 2"):
        Sharded(build, weights(reference), 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.few(1)
def test_float32_values_of_shorter_weights_add_up_for_adafactor(mode):
    """Float16 stands for bfloat16. Updates a thousand times smaller than the last digit of a weight."""
    options = TrainingOptions(optimizer="adafactor", learning_rate=1e-6)
    _, step = losses(lambda p: build_optimizer(options, p), mode, 20, ms.float16)
    _, exact = losses(lambda p: Adafactor(p, 1e-6, weight_decay=1e-2), mode, 20)
    assert isinstance(step.optimizer, Float32Weights) and step.weights[0].dtype == ms.float16
    start = Line(ms.float16).weight.asnumpy().astype(np.float32)
    moved = to_numpy(step.optimizer.copies[0]) - start
    np.testing.assert_allclose(moved, to_numpy(exact.weights[0]) - to_numpy(Line().weight), rtol=0.05, atol=1e-6)
    assert 1e-5 < np.abs(moved).max() < 3e-5
    state = {name: to_numpy(p) for name, p in step.optimizer.state_tensors().items()}
    _, other = losses(lambda p: build_optimizer(options, p), mode, 1, ms.float16)
    other.optimizer.load_state_tensors(state)
    assert np.array_equal(to_numpy(other.optimizer.copies[0]), state[step.optimizer.copies[0].name])
    other.optimizer.take_weights()
    assert np.array_equal(to_numpy(other.optimizer.copies[0]), to_numpy(other.weights[0]).astype(np.float32))


def test_element_wise_ones_with_short_weights_are_sharded():
    for name in ("adamw", "prodigy"):
        optimizer = build_optimizer(TrainingOptions(optimizer=name, learning_rate=1.0),
                                    Line(ms.float16).trainable_params())
        assert isinstance(optimizer, Sharded) and optimizer.is_divided


# -- settings --------------------------------------------------------------------------------------------------------


def options(**given):
    return SimpleNamespace(**{"optimizer": "adamw", "optimizer_args": (), "adam_beta1": 0.9, "adam_beta2": 0.999,
                              "adam_epsilon": 1e-8} | given)


def test_arguments_of_an_optimizer():
    assert optimizer_arguments(options(adam_beta2=0.95)) == {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    found = optimizer_arguments(options(optimizer="prodigy", optimizer_args=("d_coef=2", "safeguard_warmup=TRUE",
                                                                             "beta1 = 0.8")))
    assert found == {"beta1": 0.8, "beta2": 0.999, "epsilon": 1e-8, "d_coef": 2.0, "safeguard_warmup": True}
    assert optimizer_arguments(options(optimizer="adafactor")) == {}


@pytest.mark.parametrize("given, part", [
    ({"optimizer": "prodogy"}, "optimizer='prodogy' is unknown: .*Did you mean 'prodigy'?"),
    ({"optimizer_args": ("d_coef=2",)}, "'d_coef' is none of optimizer=adamw: it has beta1, beta2, epsilon"),
    ({"optimizer": "prodigy", "optimizer_args": ("d_coeff=2",)}, "Did you mean 'd_coef'?"),
    ({"optimizer": "prodigy", "optimizer_args": ("d_coef=two",)}, "d_coef=two: expected a number, such as d_coef=1.0"),
    ({"optimizer": "prodigy", "optimizer_args": ("safeguard_warmup",)}, "safeguard_warmup=: expected true or false"),
    ({"optimizer_args": ("beta1=0.5", "beta1=0.6")}, "'beta1' is set twice"),
    ({"optimizer_args": ("beta1=0.5",), "adam_beta1": 0.8}, "adam_beta1=0.8 and beta1 .* the same setting"),
    ({"optimizer": "adafactor", "adam_beta1": 0.8}, "adam_beta1=0.8 would not be used: optimizer=adafactor has no"),
])
def test_arguments_that_it_has_not(given, part):
    with pytest.raises(ConfigError, match=part):
        optimizer_arguments(options(**given))


def test_a_small_learning_rate_for_prodigy_is_said(caplog):
    build_optimizer(TrainingOptions(optimizer="prodigy", learning_rate=1e-4), Line().trainable_params())
    assert "learning_rate=0.0001 with optimizer=prodigy is a factor" in caplog.text
    with pytest.raises(ConfigError, match=r"optimizer_args='d_coef=2': expected a list, such as \['d_coef=2'\]"):
        TrainingOptions(optimizer="prodigy", optimizer_args="d_coef=2")


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["prodigy", "adafactor", "came"])
@pytest.mark.few(1)
def test_a_run_that_goes_on_has_the_same_bits(folder, tmp_path, name, mode):
    how = {"mode": mode, "batch_size": 2, "optimizer": name, "learning_rate": 1.0 if name == "prodigy" else 1e-2,
           "num_epochs": None, "use_ema": True}
    train(tmp_path / "whole", Module(folder), rows(5), max_train_steps=7, **how)
    for steps in (3, 7):
        train(tmp_path / "run", Module(folder), rows(5), max_train_steps=steps, resume="auto", **how)
    assert equal(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_from_before_there_were_other_optimizers_is_gone_on_from(folder, tmp_path, monkeypatch):
    train(tmp_path / "whole", Module(folder), rows(3), num_epochs=2)
    with monkeypatch.context() as then:
        identity = same_run.identity
        then.setattr(same_run, "identity", lambda *given: {name: value for name, value in identity(*given).items()
                                                         if not name.startswith("optimizer")})
        train(tmp_path / "run", Module(folder), rows(3), num_epochs=1)
    assert "optimizer" not in latest(tmp_path / "run/checkpoints").state["identity"]
    with pytest.raises(CheckpointError, match=r"optimizer: \"adamw\" when saved, \"came\" now"):
        train(tmp_path / "run", Module(folder), rows(3), num_epochs=2, optimizer="came", resume="auto")
    train(tmp_path / "run", Module(folder), rows(3), num_epochs=2, resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "run")


def test_another_optimizer_is_another_run(folder, tmp_path):
    def run(**more):
        return train(tmp_path / "run", Module(folder), rows(3), **{"num_epochs": 1} | more)

    run()
    with pytest.raises(CheckpointError, match=r"optimizer: \"adamw\" when saved, \"prodigy\" now\nSet them back"):
        run(optimizer="prodigy", resume="auto", num_epochs=2)
    with pytest.raises(WeightError, match=r"missing: .*prodigy.d.*optimizer settings the checkpoint was written with"):
        run(optimizer="prodigy", resume="auto", num_epochs=2, accept_changes=("optimizer",))
    train(tmp_path / "other", Module(folder), rows(3), optimizer="prodigy", optimizer_args=("d0=1e-5",))
    assert "moments/prodigy.d" in state(tmp_path / "other")[0]
    with pytest.raises(CheckpointError, match=r"optimizer_args: \[\"d0=1e-5\"\] when saved, \[\] now"):
        train(tmp_path / "other", Module(folder), rows(3), optimizer="prodigy", resume="auto", num_epochs=2)
