"""AdamW against PyTorch and against a float64 AdamW; the finite guard; foreign optimizers; learning rates.

``adamw_torch.npz`` was made with torch 2.13.0 (CPU) and numpy 1.26.4 by::

    import numpy as np, torch
    rng = np.random.default_rng(7); shapes = [(3, 4), (5,)]
    out = {f"start.{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}
    size = np.exp(rng.standard_normal(100))
    for i, s in enumerate(shapes):
        out[f"gradients.{i}"] = (rng.standard_normal((100, *s)) * size.reshape(-1, *[1] * len(s))).astype(np.float32)
    for case, (lr, betas, eps, wd) in {"default": (1e-2, (0.9, 0.999), 1e-8, 1e-2),
                                       "other": (1e-3, (0.8, 0.95), 1e-4, 0.1)}.items():
        ps = [torch.nn.Parameter(torch.tensor(out[f"start.{i}"])) for i in range(2)]
        opt = torch.optim.AdamW(ps, lr=lr, betas=betas, eps=eps, weight_decay=wd); kept = []; norms = []
        for k in range(100):
            opt.param_groups[0]["lr"] = lr * (1 - k / 100)
            for i, p in enumerate(ps): p.grad = torch.tensor(out[f"gradients.{i}"][k])
            norms.append(torch.nn.utils.clip_grad_norm_(ps, 2.0).item()); opt.step()
            if k in (0, 1, 9, 99): kept.append([p.detach().numpy().copy() for p in ps])
        for i in range(2): out[f"{case}.{i}"] = np.stack([w[i] for w in kept])
        out["norms"] = np.array(norms, np.float32)
    np.savez_compressed("adamw_torch.npz", **out)
"""
from __future__ import annotations

import math
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.experimental import optim

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, TrainingError, WeightError
from ms_diffsynth.training import grads
from ms_diffsynth.training.optim import AdamW, Guarded, LearningRate, guarded

MODES = ("pynative", "graph")
SETTINGS = {"default": {"learning_rate": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
            "other": {"learning_rate": 1e-3, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}}
BAD = (np.nan, np.inf, -np.inf)


@pytest.fixture(scope="module", autouse=True)
def _cpu():
    runtime.configure("graph", DEVICE)


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "adamw_torch.npz") as file:
        return dict(file)


class Update(nn.Cell):
    """What a training step does with two gradients: norm, guard, clipping, update."""

    def __init__(self, optimizer, max_grad_norm=2.0):
        super().__init__(auto_prefix=False)
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm

    def construct(self, first, second):
        norm = ops.sqrt(grads.sum_of_squares((first, second)))
        is_finite = grads.is_finite(norm)
        self.optimizer((first, second), grads.clip_coefficient(norm, self.max_grad_norm), is_finite)
        return norm, is_finite


def weights(*values: np.ndarray) -> list[Parameter]:
    return [Parameter(Tensor(v.astype(np.float32)), name=f"block.{i}.weight") for i, v in enumerate(values)]


def runner(optimizer, mode: str, max_grad_norm: float | None = 2.0):
    cell = Update(optimizer, max_grad_norm)
    return ms.jit(cell, fullgraph=True) if mode == "graph" else cell


def copies(tensors) -> list[np.ndarray]:
    return [t.asnumpy().copy() for t in tensors]


def contents(optimizer) -> list[np.ndarray]:
    return copies([*optimizer.parameters, *optimizer.state_tensors().values()])


def adamw_float64(start, gradients, learning_rate, betas, eps, weight_decay):
    """Algorithm 2 of Loshchilov and Hutter, one tensor, every step's weights."""
    p, m, v = start.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients.astype(np.float64), 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        root = np.sqrt(v / (1 - betas[1] ** t)) + eps
        p = p - learning_rate * weight_decay * p - learning_rate * m / (1 - betas[0] ** t) / root
        yield p


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SETTINGS)
def test_follows_torch_for_a_hundred_clipped_steps_of_changing_learning_rate(reference, case, mode):
    optimizer = AdamW(weights(reference["start.0"], reference["start.1"]), **SETTINGS[case])
    run, kept = runner(optimizer, mode), []
    for k in range(100):
        optimizer.set_learning_rate(SETTINGS[case]["learning_rate"] * (1 - k / 100))
        norm, is_finite = run(Tensor(reference["gradients.0"][k]), Tensor(reference["gradients.1"][k]))
        assert bool(is_finite)
        assert float(norm) == pytest.approx(float(reference["norms"][k]), rel=5e-7)
        if k in (0, 1, 9, 99):
            kept.append(copies(optimizer.parameters))
    for i in range(2):
        found = np.stack([w[i] for w in kept])
        # float32 weights of size 1 after 100 roundings; without the table of corrections it is 1e-5
        np.testing.assert_allclose(found, reference[f"{case}.{i}"], rtol=0, atol=1e-6)
    assert int(optimizer.step.asnumpy()) == 100


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.9, 0.9999)])
def test_follows_the_algorithm_in_float64(betas):
    rng = np.random.default_rng(1)
    start, gradients = rng.standard_normal((2, 3)), rng.standard_normal((30, 2, 3)).astype(np.float32)
    settings = {"learning_rate": 1e-2, "betas": betas, "eps": 1e-8, "weight_decay": 1e-2}
    optimizer = AdamW(weights(start), **settings)
    for g, wanted in zip(gradients, adamw_float64(start, gradients, **settings)):
        optimizer((Tensor(g),))
        np.testing.assert_allclose(optimizer.parameters[0].asnumpy(), wanted, rtol=0, atol=1e-6)


def test_corrections_beyond_their_table_are_one():
    optimizer = AdamW(weights(np.ones(3)), learning_rate=1.0, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.0)
    for _ in range(optimizer.last + 3):
        before = optimizer.parameters[0].asnumpy().copy()
        optimizer((Tensor(np.full(3, 2.0, np.float32)),))
        np.testing.assert_allclose(before - optimizer.parameters[0].asnumpy(), 1.0, rtol=1e-6)


def test_modes_agree_to_the_last_bit(reference):
    found = []
    for mode in MODES:
        optimizer = AdamW(weights(reference["start.0"], reference["start.1"]), **SETTINGS["default"])
        run = runner(optimizer, mode)
        for k in range(5):
            run(Tensor(reference["gradients.0"][k]), Tensor(reference["gradients.1"][k]))
        found.append(contents(optimizer))
    for eager, compiled in zip(*found):
        assert np.array_equal(eager, compiled)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_not_finite_change_nothing(reference, mode):
    optimizer = AdamW(weights(reference["start.0"], reference["start.1"]), **SETTINGS["default"])
    run = runner(optimizer, mode)
    good = [Tensor(reference[f"gradients.{i}"][0]) for i in range(2)]

    def refuses():
        before = contents(optimizer)
        for value in BAD:
            bad = reference["gradients.0"][1].copy()
            bad[1, 2] = value
            assert not bool(run(Tensor(bad), good[1])[1])
            for old, new in zip(before, contents(optimizer)):
                assert old.tobytes() == new.tobytes()

    refuses()  # at step 0, where nothing has been seen yet
    run(*good)
    refuses()
    run(*good)
    other = AdamW(weights(reference["start.0"], reference["start.1"]), **SETTINGS["default"])
    run = runner(other, mode)
    run(*good)
    run(*good)
    for one, two in zip(contents(optimizer), contents(other)):
        assert np.array_equal(one, two)  # as if the bad steps had never been


def test_called_with_gradients_alone_like_any_optimizer():
    optimizer = AdamW(weights(np.ones(3)), 1e-2, weight_decay=0.0)
    optimizer((Tensor(np.array([1.0, -2.0, 0.0], np.float32)),))
    np.testing.assert_allclose(optimizer.parameters[0].asnumpy(), [0.99, 1.01, 1.0], rtol=1e-6)


def test_unscaling_by_the_coefficient():
    plain, scaled = AdamW(weights(np.ones(3)), 1e-2), AdamW(weights(np.ones(3)), 1e-2)
    gradient = np.array([1.0, -2.0, 0.5], np.float32)
    plain((Tensor(gradient),))
    scaled((Tensor(gradient * 4096),), Tensor(1 / 4096, ms.float32), Tensor(True))
    for one, two in zip(contents(plain), contents(scaled)):
        assert np.array_equal(one, two)


def test_a_compiled_step_sees_a_new_learning_rate(reference):
    optimizer = AdamW(weights(np.zeros(3), np.zeros(3)), 1e-2)
    run, gradient = runner(optimizer, "graph"), Tensor(np.ones(3, np.float32))
    run(gradient, gradient)
    optimizer.set_learning_rate(0.0)
    before = copies(optimizer.parameters)
    run(gradient, gradient)
    assert np.array_equal(before[0], optimizer.parameters[0].asnumpy())
    optimizer.set_learning_rate(1e-2)
    run(gradient, gradient)
    assert not np.array_equal(before[0], optimizer.parameters[0].asnumpy())


class Reads(nn.Cell):
    def __init__(self):
        super().__init__()
        self.value = Parameter(Tensor(1.0, ms.float32), name="value")

    def construct(self, x):
        return x * self.value


@pytest.mark.xfail(DEVICE == "CPU", strict=True, reason="MindSpore 2.10: on the CPU a compiled function does not see "
                                                        "set_data, on an Ascend it does; when this passes, the "
                                                        "warnings about it may go")
def test_a_compiled_function_sees_set_data():
    cell, one = Reads(), Tensor(1.0, ms.float32)
    run = ms.jit(cell, fullgraph=True)
    run(one)
    cell.value.set_data(Tensor(2.0, ms.float32))
    assert float(run(one)) == 2.0


def test_a_compiled_function_sees_assign():
    cell, one = Reads(), Tensor(1.0, ms.float32)
    run = ms.jit(cell, fullgraph=True)
    run(one)
    ops.assign(cell.value, Tensor(2.0, ms.float32))
    assert float(run(one)) == 2.0


def test_state_goes_into_another_optimizer(reference):
    gradients = [[Tensor(reference[f"gradients.{i}"][k]) for i in range(2)] for k in range(4)]
    first = AdamW(weights(reference["start.0"], reference["start.1"]), **SETTINGS["default"])
    run = runner(first, "graph")
    run(*gradients[0])
    run(*gradients[1])
    second = AdamW(weights(*copies(first.parameters)), **SETTINGS["default"])
    rerun = runner(second, "graph")
    rerun(*gradients[3])  # compiled before the state arrives
    for parameter, value in zip(second.parameters, copies(first.parameters)):
        ops.assign(parameter, Tensor(value))
    second.load_state_tensors({name: p.asnumpy().copy() for name, p in first.state_tensors().items()})
    run(*gradients[2])
    rerun(*gradients[2])
    for one, two in zip(contents(first), contents(second)):
        assert np.array_equal(one, two)


def test_state_that_does_not_fit_is_refused_whole():
    optimizer = AdamW(weights(np.ones(3), np.ones(2)), 1e-2)
    state = {name: p.asnumpy() + 1 for name, p in optimizer.state_tensors().items()}
    state["moment9.x"] = state.pop("moment1.block.0.weight")
    state["moment2.block.1.weight"] = np.ones(7, np.float32)
    before = contents(optimizer)
    with pytest.raises(WeightError) as error:
        optimizer.load_state_tensors(state)
    for part in ("missing: moment1.block.0.weight", "superfluous: moment9.x",
                 "moment2.block.1.weight (7,), expected (2,)"):
        assert part in str(error.value)
    for old, new in zip(before, contents(optimizer)):
        assert np.array_equal(old, new)


def test_impossible_settings_are_all_named_at_once():
    half = Parameter(Tensor(np.ones(2), ms.float16), name="half")
    with pytest.raises(ConfigError) as error:
        AdamW([half], learning_rate=-1, betas=(1.0, 0.9), eps=0, weight_decay=math.nan)
    for part in ("learning_rate=-1", "betas=(1.0, 0.9)", "eps=0", "weight_decay=nan", "half (Float16)"):
        assert part in str(error.value)
    with pytest.raises(TrainingError, match="no parameters"):
        AdamW([])


def came():
    from mindone.trainers.came import CAME  # after the CPU kernels are there

    return CAME


FOREIGN = {"AdamWeightDecay": lambda p: nn.AdamWeightDecay(p, learning_rate=1e-2, weight_decay=0.1),
           "Momentum": lambda p: nn.Momentum(p, learning_rate=1e-2, momentum=0.9),
           "SGD": lambda p: nn.SGD(p, learning_rate=1e-2, momentum=0.9, weight_decay=0.1),
           "dynamic": lambda p: nn.AdamWeightDecay(p, learning_rate=nn.CosineDecayLR(1e-3, 1e-1, 10)),
           "list": lambda p: nn.AdamWeightDecay(p, learning_rate=[1e-2, 5e-2, 1e-1]),
           "list, Momentum": lambda p: nn.Momentum(p, [1e-2, 5e-2, 1e-1], 0.9),
           "list, SGD": lambda p: nn.SGD(p, [1e-2, 5e-2, 1e-1]),
           "groups": lambda p: nn.AdamWeightDecay([{"params": p[:1], "lr": 1e-2},
                                                   {"params": p[1:], "weight_decay": 0.1}], 1e-3),
           "groups of lists": lambda p: nn.Momentum([{"params": p[:1], "lr": [1e-2, 5e-2, 1e-1]},
                                                     {"params": p[1:]}], 1e-3, 0.9),
           "groups of schedules": lambda p: nn.AdamWeightDecay([{"params": p[:1], "lr": nn.CosineDecayLR(1e-3, 0.1, 9)},
                                                                {"params": p[1:]}], 1e-3),
           "mint.optim": lambda p: mint.optim.AdamW(p, lr=1e-2),
           "experimental.optim": lambda p: optim.Adam(p, lr=1e-2),
           "experimental.optim, groups": lambda p: optim.SGD([{"params": p[:1], "lr": 1e-1}, {"params": p[1:]}], 1e-2),
           "mindone's CAME": lambda p: came()(p, [1e-2, 5e-2, 1e-1])}
OF_ITS_OWN = [kind for kind in FOREIGN if kind not in ("AdamWeightDecay", "Momentum", "SGD", "mint.optim",
                                                       "experimental.optim")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.few(10)
def test_a_foreign_optimizer_is_guarded_and_else_as_it_was(reference, kind, mode):
    start = reference["start.0"], reference["start.1"]
    plain, inner = FOREIGN[kind](weights(*start)), FOREIGN[kind](weights(*start))
    optimizer = guarded(inner)
    assert isinstance(optimizer, Guarded)
    run = runner(optimizer, mode, None)
    good = [Tensor(reference[f"gradients.{i}"][0]) for i in range(2)]
    bad = Tensor(np.full_like(reference["gradients.0"][0], np.nan))
    for _ in range(2):
        assert bool(run(*good)[1])
        plain(tuple(good))
        before = copies(inner.get_parameters())
        assert not bool(run(bad, good[1])[1])
        for old, new, wanted in zip(before, inner.get_parameters(), plain.get_parameters()):
            assert old.tobytes() == new.asnumpy().tobytes(), new.name
            # equal, up to another order of operations in the compiled optimizer
            np.testing.assert_allclose(new.asnumpy(), wanted.asnumpy(), rtol=1e-6, atol=3e-7, err_msg=new.name)


def test_a_foreign_learning_rate_can_be_set_where_it_is_one_number(reference):
    optimizer = guarded(FOREIGN["Momentum"](weights(np.zeros(3))))
    optimizer.set_learning_rate(0.5)
    optimizer((Tensor(np.ones(3, np.float32)),), Tensor(1.0, ms.float32), Tensor(True))
    np.testing.assert_allclose(optimizer.parameters[0].asnumpy(), -0.5)
    assert "block.0.weight" not in optimizer.state_tensors() and "moments.block.0.weight" in optimizer.state_tensors()


@pytest.mark.parametrize("kind", OF_ITS_OWN)
def test_a_foreign_learning_rate_of_its_own_cannot_be_set(kind):
    with pytest.raises(ConfigError, match="learning rate of its own"):
        guarded(FOREIGN[kind](weights(np.zeros(3), np.zeros(2)))).set_learning_rate(0.5)


@pytest.mark.parametrize("kind", ["mint.optim", "experimental.optim"])
def test_a_learning_rate_as_in_torch_can_be_set(kind):
    optimizer = guarded(FOREIGN[kind](weights(np.zeros(3), np.zeros(2))))
    optimizer.set_learning_rate(0.0)
    optimizer((Tensor(np.ones(3, np.float32)), Tensor(np.ones(2, np.float32))))
    assert not any(p.asnumpy().any() for p in optimizer.parameters)


def test_guarded_leaves_our_own_optimizers_alone():
    optimizer = AdamW(weights(np.ones(1)))
    assert guarded(optimizer) is optimizer
    foreign = guarded(FOREIGN["Momentum"](weights(np.ones(1))))
    assert guarded(foreign) is foreign


def test_learning_rates():
    constant = LearningRate(schedule="constant", base=2.0)
    assert [constant(k) for k in (0, 1, 10**6)] == [2.0] * 3
    linear = LearningRate(schedule="linear", base=2.0, warmup_steps=2, total_steps=6)
    assert [linear(k) for k in range(8)] == [0.0, 1.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    cosine = LearningRate(schedule="cosine", base=2.0, warmup_steps=2, total_steps=6)
    np.testing.assert_allclose([cosine(k) for k in range(8)],
                               [0, 1, 2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0], atol=1e-15)


@pytest.mark.parametrize("settings, part", [
    ({"schedule": "cosin", "total_steps": 5}, "Did you mean 'cosine'?"), ({"base": math.nan}, "learning_rate=nan"),
    ({"warmup_steps": -1}, "lr_warmup_steps=-1"),
    ({"schedule": "linear", "warmup_steps": 9, "total_steps": 9}, "total steps=9")])
def test_impossible_learning_rates(settings, part):
    with pytest.raises(ConfigError) as error:
        LearningRate(**settings)
    assert part in str(error.value)
