"""DoRA against what peft 0.21.2 makes of it (tests/golden/make_dora.py), in both modes.

Tolerance: 1e-5 of each tensor's largest element; float32, sums of up to twenty terms in another order.
"""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import ParameterTuple, Tensor, mint, nn, ops

from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.formats.adapters import DORA
from ms_diffsynth.formats.lora import AdapterFile
from ms_diffsynth.nn.adapters.dora import DoRA
from ms_diffsynth.nn.adapters.linear import fuse
from ms_diffsynth.nn.quant import store_8bit
from ms_diffsynth.nn.recompute import use_recompute

GOLDEN = Path(__file__).parents[1] / "golden/dora/case.npz"
RELATIVE = 1e-5
BOTH = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])


@pytest.fixture(scope="module")
def case():
    return dict(np.load(GOLDEN))


def of(case, kind):
    return {name.removeprefix(f"{kind}."): array for name, array in case.items() if name.startswith(f"{kind}.")}


def plain(case, kind=mint.nn.Linear):
    """The base of the case: Linear, Tanh, Linear without bias."""
    if kind is nn.Dense:
        model = nn.SequentialCell(nn.Dense(12, 20), nn.Tanh(), nn.Dense(20, 8, has_bias=False))
    else:
        model = nn.SequentialCell(kind(12, 20), mint.nn.Tanh(), kind(20, 8, bias=False))
    for name, array in of(case, "base").items():
        place, _, what = name.partition(".")
        getattr(model[int(place)], what).set_data(Tensor(array))
    return model


def adapted(case, kind=mint.nn.Linear, tensors="given"):
    model = plain(case, kind)
    DoRA().inject(model, ["0", "2"], int(case["rank"]), float(case["alpha"]))
    if tensors:
        DoRA().load(model, of(case, tensors))
    return model


def close(found, expected, name=""):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= RELATIVE, f"{name}: {error:.1e}"
    return error


def value_and_gradients(model, x, target, compiled):
    weights = DoRA().parameters(model)

    def loss(x):
        out = model(x)
        return ((out - target) ** 2).mean(), out

    gradient = ms.value_and_grad(loss, 0, ParameterTuple(weights), has_aux=True)

    def step(x):
        return gradient(x)

    (value, out), (of_x, of_weights) = (ms.jit(step, fullgraph=True) if compiled else step)(x)
    return {"loss": value, "out": out, "grad.x": of_x, **{f"grad.{p.name}": g for p, g in zip(weights, of_weights)}}


@BOTH
@pytest.mark.parametrize("kind", [mint.nn.Linear, nn.Dense])
def test_value_and_gradients_equal_peft(case, kind, compiled):
    model = adapted(case, kind)
    found = value_and_gradients(model, Tensor(case["x"]), Tensor(case["target"]), compiled)
    assert {f"grad.{name}" for name in of(case, "grad")} <= found.keys()
    for name, tensor in found.items():
        close(tensor.asnumpy(), case[name], name)


@BOTH
def test_three_steps_equal_peft(case, compiled):
    model, losses = adapted(case), []
    weights, rate = DoRA().parameters(model), float(case["rate"])

    def loss(x, target):
        return ((model(x) - target) ** 2).mean()

    gradient = ms.value_and_grad(loss, None, ParameterTuple(weights))

    def step(x, target):
        return gradient(x, target)

    run = ms.jit(step, fullgraph=True) if compiled else step
    for _ in case["losses"]:
        value, gradients = run(Tensor(case["x"]), Tensor(case["target"]))
        losses.append(float(value.asnumpy()))
        for parameter, g in zip(weights, gradients):
            ops.assign(parameter, parameter - rate * g)
    close(np.array(losses), case["losses"], "losses")
    for name, array in DoRA().tensors(model).items():
        close(array, case[f"trained.{name}"], name)


def test_it_starts_as_peft_does_and_changes_nothing(case):
    model = adapted(case, tensors=None)
    assert DoRA().tensors(model).keys() == of(case, "start").keys()
    for name, array in DoRA().tensors(model).items():
        if "lora_A" not in name:  # drawn by another generator
            np.testing.assert_allclose(array, case[f"start.{name}"], rtol=1e-6)
    x = Tensor(case["x"])
    np.testing.assert_allclose(model(x).asnumpy(), plain(case)(x).asnumpy(), atol=1e-6)  # the bias is added later
    assert [p.name for p in model.trainable_params()] == [p.name for p in DoRA().parameters(model)]


def dora_file(modules):
    return AdapterFile(modules, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, DORA))


def test_fusing_equals_peft_and_running_beside(case):
    model, modules = plain(case), {}
    for name, array in of(case, "trained").items():
        module, _, part = name.partition(".")
        modules.setdefault(module, {})[part] = array
    fuse(dora_file(modules), model, float(case["alpha"]) / float(case["rank"]))
    for place, array in of(case, "merged").items():
        close(model[int(place)].weight.asnumpy(), array, place)
    x = Tensor(case["x"])
    close(model(x).asnumpy(), adapted(case, tensors="trained")(x).asnumpy(), "out")


def test_a_row_of_zeros_stays_zero():
    model = nn.SequentialCell(mint.nn.Linear(4, 3))
    weight = model[0].weight.asnumpy().copy()
    weight[1] = 0
    model[0].weight.set_data(Tensor(weight))
    x = Tensor(np.ones((2, 4), np.float32))
    expected = model(x).asnumpy()
    DoRA().inject(model, ["0"], 2)
    np.testing.assert_array_equal(model(x).asnumpy(), expected)
    fuse(dora_file({"0": model[0].tensors()}), (fresh := nn.SequentialCell(mint.nn.Linear(4, 3))))
    assert np.isfinite(fresh[0].weight.asnumpy()).all()


@BOTH
@pytest.mark.parametrize("order", ["stored first", "DoRA first"])
@pytest.mark.few(2)
def test_on_a_base_in_8_bits(case, order, compiled):
    """As on the weights that the 8 bits stand for."""
    model = plain(case)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    if order == "stored first":
        store_8bit(model)
        DoRA().inject(model, ["0", "2"], int(case["rank"]), float(case["alpha"]))
    else:
        DoRA().inject(model, ["0", "2"], int(case["rank"]), float(case["alpha"]))
        store_8bit(model)
    DoRA().load(model, of(case, "given"))
    meant = plain(case)
    for place in (0, 2):
        base = model[place].base
        meant[place].weight.set_data(Tensor(base.weight.asnumpy() * base.weight_scale.asnumpy()[:, None]))
    DoRA().inject(meant, ["0", "2"], int(case["rank"]), float(case["alpha"]))
    DoRA().load(meant, of(case, "given"))
    given = Tensor(case["x"]), Tensor(case["target"]), compiled
    found, expected = value_and_gradients(model, *given), value_and_gradients(meant, *given)
    for name, tensor in found.items():
        close(tensor.asnumpy(), expected[name].asnumpy(), name)


@BOTH
def test_recomputed_to_the_bit(case, compiled):
    given = Tensor(case["x"]), Tensor(case["target"]), compiled
    expected = value_and_gradients(adapted(case), *given)
    model = adapted(case)
    use_recompute(model, ["0", "2"])
    found = value_and_gradients(model, *given)
    assert all((found[name].asnumpy() == tensor.asnumpy()).all() for name, tensor in expected.items())


def test_half_precision_keeps_the_tensors_in_float32():
    model = nn.SequentialCell(mint.nn.Linear(4, 6, dtype=ms.float16))
    DoRA().inject(model, ["0"], 2)
    assert all(p.dtype == ms.float32 for p in DoRA().parameters(model))
    assert model(Tensor(np.ones((3, 4)), ms.float16)).dtype == ms.float16


def test_what_does_not_fit_is_refused(case):
    with pytest.raises(ConfigError, match=r"the layer 0 has an activation inside.*adapter=lora"):
        DoRA().inject(nn.SequentialCell(nn.Dense(4, 3, activation="relu")), ["0"], 2)
    model, given = adapted(case), of(case, "given")
    with pytest.raises(WeightError, match=r"these DoRA weights do not fit.*2: A \(4, 20\), B \(8, 4\), expected A"):
        DoRA().load(model, {n: a for n, a in given.items() if n != "2.lora_magnitude_vector"})
