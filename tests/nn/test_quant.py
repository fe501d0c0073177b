"""Storage in 8 bits: how exact, what it saves, that LoRA trains on top of it as before, and what it refuses."""
from __future__ import annotations

import gc
import re
import weakref

import mindspore as ms
import numpy as np
import pytest
from low_rank import fuse_lora, inject_lora, lora_pairs, lora_parameters
from mindspore import Parameter, ParameterTuple, Tensor, mint, nn

from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.nn import quant
from ms_diffsynth.nn.names import state_dict, torch_parameters
from ms_diffsynth.nn.quant import store_8bit, store_models_8bit

COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class FamilyLinear(mint.nn.Linear):
    """A family's own kernel for the same mathematics."""

    def construct(self, input):
        return mint.nn.functional.linear(input, self.weight, self.bias)


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.to_q = mint.nn.Linear(24, 40)
        self.to_out = FamilyLinear(40, 24, bias=False)
        self.net = nn.SequentialCell(nn.Dense(24, 32, activation="relu"), nn.Dense(32, 24, has_bias=False))
        self.norm = mint.nn.LayerNorm(24)

    def construct(self, x):
        return self.norm(x + self.to_out(self.to_q(x))) + self.net(x)


def frozen(seed=0):
    model = nn.SequentialCell(Block(), Block())
    for k, parameter in enumerate(model.get_parameters()):
        parameter.set_data(Tensor(draw(seed + k, *parameter.shape) * 0.2))
        parameter.requires_grad = False
    return model


def rounded(model):
    """The weights of the linear layers as 8 bits can hold them, in float32."""
    for cell in [c for _, c in model.cells_and_names() if isinstance(c, (mint.nn.Linear, nn.Dense))]:
        weight = cell.weight.asnumpy()
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        cell.weight.set_data(Tensor(np.rint(weight / scale) * scale))
    return model


X = Tensor(draw(99, 2, 5, 24))


def value_and_gradients(model, weights, compiled, x=X):
    def forward(x):
        return (model(x) ** 2).mean()

    gradient = ms.value_and_grad(forward, 0, ParameterTuple(weights) if weights else None)

    def step(x):
        return gradient(x)

    value, grads = (ms.jit(step, fullgraph=True) if compiled else step)(x)
    return [t.asnumpy().copy() for t in (value, *((grads[0], *grads[1]) if weights else (grads,)))]


def assert_close(found, expected):
    for f, e in zip(found, expected, strict=True):  # float32: sums of forty products in another order
        assert np.abs(f - e).max() <= 2e-6 * np.abs(e).max()


@COMPILED
def test_computes_with_the_rounded_weights(compiled):
    stored = frozen()
    report = store_8bit(stored)
    assert report.layers == 8 and report.dtype == "int8"
    assert_close(value_and_gradients(stored, [], compiled), value_and_gradients(rounded(frozen()), [], compiled))


def test_compiled_backward_unpacks_again(tmp_path):
    model = frozen()
    store_8bit(model)
    ms.set_context(save_graphs=1, save_graphs_path=str(tmp_path))
    try:
        value_and_gradients(model, [], True)
    finally:
        ms.set_context(save_graphs=0)
    final = sorted(tmp_path.rglob("*_execute_*.ir"))[-1].read_text()
    casts = re.findall(r"= (?:PrimFunc_)?Cast\(.*\n\s*: \(<(?:Ref\[)?Tensor\[Int8\]", final)
    assert len(casts) == 2 * 8, "a copy shared by forward and backward would live as long as the float weight did"


def with_lora(model):
    cells = inject_lora(model, ["to_q", "to_out", "net.0"], rank=2)
    for seed, cell in enumerate(cells.values()):
        cell.lora_B.set_data(Tensor(draw(seed, *cell.lora_B.shape)))
    return lora_parameters(model)


@COMPILED
@pytest.mark.parametrize("order", ["stored first", "LoRA first"])
@pytest.mark.few(2)
def test_a_lora_trains_on_it_in_float32(order, compiled):
    expected_model = rounded(frozen())
    expected = value_and_gradients(expected_model, with_lora(expected_model), compiled)
    model = frozen()
    if order == "stored first":
        store_8bit(model)
        weights = with_lora(model)
    else:
        weights = with_lora(model)
        store_8bit(model)
    assert {p.dtype for p in weights} == {ms.float32} and all(p.requires_grad for p in weights)
    assert [p.name for p in model.trainable_params()] == [p.name for p in weights]
    assert_close(value_and_gradients(model, weights, compiled), expected)
    assert lora_pairs(model).keys() == lora_pairs(expected_model).keys()


def test_names_stay_and_a_scale_is_added():
    model = frozen()
    before, names = state_dict(model), [p.name for p in model.get_parameters()]
    store_8bit(model)
    after = state_dict(model)
    assert set(before) < set(after) and {n for n in after if n not in before} == {
        f"{k}.{n}.weight_scale" for k in (0, 1) for n in ("to_q", "to_out", "net.0", "net.1")}
    assert set(names) < {p.name for p in model.get_parameters()}
    found = after["0.to_q.weight"] * after["0.to_q.weight_scale"][:, None]
    step = np.abs(before["0.to_q.weight"]).max(1, keepdims=True) / 127
    assert after["0.to_q.weight"].dtype == np.int8 and (np.abs(found - before["0.to_q.weight"]) <= 0.501 * step).all()
    assert np.array_equal(after["0.norm.weight"], before["0.norm.weight"])
    assert torch_parameters(model)["0.to_q.weight"].dtype == ms.int8


def test_report_counts_bytes_and_errors():
    model = nn.SequentialCell(mint.nn.Linear(3, 2, bias=False), nn.Dense(2, 2))
    weight = np.array([[127, 63.5, 0.4], [0, 0, 0]], np.float32)  # steps of 1: 63.5 -> 64, 0.4 -> 0
    model[0].weight.set_data(Tensor(weight))
    model[1].weight.set_data(Tensor(np.eye(2, dtype=np.float32)))
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    report = store_8bit(model)
    assert report.bytes_before == 4 * (6 + 4 + 2) and report.bytes_after == (6 + 4 + 4 * 2) + 2 * 2 * 4
    wrong = (0.5**2 + 0.4**2) ** 0.5 / np.linalg.norm(weight[0])
    np.testing.assert_allclose([report.largest_error, report.mean_error], [wrong, wrong / 4], rtol=1e-5)
    assert str(report).startswith("2 linear layers in int8: 0.0 MB -> 0.0 MB, error of a channel 0.11% (largest 0.45%)")


def test_the_float_weights_are_freed():
    model = frozen()
    held = [weakref.ref(p) for _, p in model.parameters_and_names() if p.ndim == 2]
    store_8bit(model)
    gc.collect()
    assert len(held) == 8 and not [r for r in held if r() is not None]


def test_storing_twice_changes_nothing_more():
    model = frozen()
    store_8bit(model)
    once = state_dict(model)
    report = store_8bit(model)
    assert (report.layers, report.largest_error) == (0, 0) and report.bytes_before == report.bytes_after
    assert once.keys() == state_dict(model).keys()
    assert all(np.array_equal(once[name], value) for name, value in state_dict(model).items())


def test_no_lora_is_fused_into_stored_weights():
    model = frozen()
    store_8bit(model)
    before = state_dict(model)
    with pytest.raises(WeightError, match=r"cannot be added to weights that are stored in 8 bits: 0\.to_q"):
        fuse_lora(model, {"0.to_q": (draw(1, 2, 24), draw(2, 40, 2))})
    assert all(np.array_equal(before[name], value) for name, value in state_dict(model).items())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match="ReLU has no linear layer to store in 8 bits"):
        store_8bit(nn.ReLU())


def test_a_trained_weight_is_refused_by_name():
    model = frozen()
    model[1].to_q.weight.requires_grad = True
    with pytest.raises(ConfigError, match=r"1.to_q.weight of SequentialCell is trained.*train a LoRA on it"):
        store_8bit(model)
    assert model[0].to_q.weight.dtype == ms.float32, "nothing was changed"


def test_weights_that_are_not_finite_are_refused():
    model = frozen()
    weight = model[0].to_q.weight.asnumpy().copy()
    weight[3, 2] = np.nan
    model[0].to_q.weight.set_data(Tensor(weight))
    with pytest.raises(WeightError, match=r"0.to_q.weight holds 1 numbers that are not finite"):
        store_8bit(model)


def test_the_layer_whose_dtype_t5_reads_is_always_int8(monkeypatch):
    chosen = {}
    monkeypatch.setattr(quant, "_store", lambda name, cell, dtype: chosen.update({name: dtype}) or np.zeros(1))
    model = frozen()
    model[1].insert_child_to_cell("wo", mint.nn.Linear(2, 2))
    model[1].wo.weight.requires_grad = False
    store_8bit(model, ms.float8_e4m3fn)
    assert chosen.pop("1.wo") == ms.int8 and set(chosen.values()) == {ms.float8_e4m3fn}


# -- by the names of a pipeline's models ---------------------------------------------------------------------------


class Pipe:
    model_names = ("tokenizer_1", "text_encoder_2", "dit")

    def __init__(self):
        self.loaded = []

    def __getattr__(self, name):
        if name not in ("text_encoder_2", "dit"):
            raise AttributeError(name)
        self.loaded.append(name)
        setattr(self, name, frozen())
        return getattr(self, name)


def test_models_are_stored_by_name():
    pipe = Pipe()
    reports = store_models_8bit(pipe, "dit, text_encoder_2,dit")
    assert list(reports) == ["dit", "text_encoder_2"] and reports["dit"].layers == 8
    assert pipe.dit[0].to_q.weight.dtype == ms.int8


def test_models_that_the_job_does_not_need_are_not_loaded():
    pipe = Pipe()
    assert list(store_models_8bit(pipe, "dit,text_encoder_2", needed=("dit",))) == ["dit"] and pipe.loaded == ["dit"]
    assert store_models_8bit(pipe, None) == {}


@pytest.mark.parametrize(("text", "says"), [
    ("dti", "fp8_models: 'dti' is not a model of Pipe: expected some of text_encoder_2, dit. Did you mean 'dit'"),
    ("tokenizer_1", "'tokenizer_1' is not a model of Pipe"),
])
def test_a_name_that_matches_nothing_is_refused_before_anything_is_loaded(text, says):
    pipe = Pipe()
    with pytest.raises(ConfigError, match=says):
        store_models_8bit(pipe, f"dit,{text}")
    assert not pipe.loaded


def test_a_model_trained_whole_is_refused():
    pipe = Pipe()
    for parameter in pipe.dit.get_parameters():
        parameter.requires_grad = True
    with pytest.raises(ConfigError, match=r"fp8_models: 0.to_q.weight, .* is trained"):
        store_models_8bit(pipe, "dit")
    assert isinstance(pipe.dit[0].to_q.weight, Parameter)
