"""From a template's folder to its model, and what process_inputs may return."""
from __future__ import annotations

import inspect
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from ms_diffsynth import TemplatePipeline, attach_template, load_template_model, no_grad, save_state_dict
from ms_diffsynth.errors import TemplateError, WeightError
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.template.loading import open_template, processed

TRUST = {"trust_template_code": True}

# The document's example. What differs: torch.nn.Module -> nn.Cell, @torch.no_grad() -> @no_grad(), and xxx, a number,
# becomes a Tensor, which the document leaves open; zzz is called kv_cache, which is what a base model takes
DOCUMENTS = '''
from mindspore import Tensor, nn
from ms_diffsynth import no_grad

class CustomizedTemplateModel(nn.Cell):
    def __init__(self):
        super().__init__()

    @no_grad()
    def process_inputs(self, xxx, **kwargs):
        yyy = xxx
        return {"yyy": yyy}

    def forward(self, yyy, **kwargs):
        zzz = {"double_0": (yyy.reshape(1, 1, 1, 1), yyy.reshape(1, 1, 1, 1))}
        return {"kv_cache": zzz}

class DataProcessor:
    def __call__(self, www, **kwargs):
        xxx = www
        return {"xxx": xxx}

TEMPLATE_MODEL = CustomizedTemplateModel
TEMPLATE_MODEL_PATH = None
TEMPLATE_DATA_PROCESSOR = DataProcessor
'''


def load(folder, **options):
    return load_template_model(folder, **options, **TRUST)


def arrays(model):
    return [p.asnumpy() for p in model.get_parameters()]


def test_the_documents_example_runs(template):
    opened = open_template(template(DOCUMENTS), True)
    inputs = opened.processor()(www=0.5, more=1)
    assert inputs == {"xxx": 0.5}
    values = processed(opened, opened.build(), None, inputs)
    assert {n: v.asnumpy().tolist() for n, v in values.items()} == {"yyy": [0.5]}
    cache = TemplatePipeline([opened], ms.float32).call_single_side(None, [{"xxx": 0.25, "model_id": 0}])
    assert [x.asnumpy().item() for x in cache["kv_cache"]["double_0"]] == [0.25, 0.25]


def test_weights_from_one_file_from_shards_or_at_random(template, plain_source):
    folder = template()
    model = load(folder)
    found = state_dict(model)
    weights = {name: np.random.default_rng(k).random(a.shape, np.float32) for k, (name, a) in enumerate(found.items())}
    save_state_dict(folder / "model.safetensors", weights)
    for k, name in enumerate(weights):
        save_state_dict(folder / f"model-0000{k + 1}-of-00004.safetensors", {name: weights[name]})
    shards = [f"model-0000{k}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    for path in ("model.safetensors", ["model.safetensors"], shards, tuple(shards)):
        (folder / "model.py").write_text(plain_source + f"\nTEMPLATE_MODEL_PATH = {path!r}\n")
        loaded = state_dict(load(folder))
        assert loaded.keys() == weights.keys() and all(np.array_equal(loaded[n], weights[n]) for n in weights)
    for path in ("", "\nTEMPLATE_MODEL_PATH = None\n"):
        (folder / "model.py").write_text(plain_source + path)
        assert all(np.array_equal(a, found[n]) for n, a in state_dict(load(folder)).items())
    (folder / "model.py").write_text(plain_source + f"\nTEMPLATE_MODEL_PATH = {shards[:3]!r}\n")
    with pytest.raises(WeightError, match="00004-of-00004"):
        load(folder)


RANDOM = '''
class Noisy(nn.Cell):
    def __init__(self):
        super().__init__()
        self.a = nn.Dense(3, 3)
        self.b = mint.nn.Linear(3, 3)
        self.c = Parameter(Tensor(np.random.standard_normal(3).astype(np.float32)))
        self.d = Parameter(mint.randn(3))
        self.e = Parameter(ops.rand(3))

    def process_inputs(self, x, **kwargs):
        return {"x": x}

    def forward(self, x, **kwargs):
        return {}


TEMPLATE_MODEL = Noisy
'''


def draws():
    return [np.random.rand(), *ops.standard_normal((2,)).asnumpy(), *ops.rand(2).asnumpy(),
            *nn.Dense(1, 2).weight.asnumpy().ravel()]


@pytest.mark.parametrize("seed", [None, 5])
def test_random_weights_are_always_the_same_and_leave_all_else_alone(template, head, seed, monkeypatch):
    opened = open_template(template(head + RANDOM), True)
    monkeypatch.setattr(sys.modules["mindspore.common.seed"], "_GLOBAL_SEED", None)
    data_seed = ms.dataset.config.get_seed()

    def begin():
        np.random.seed(11)
        if seed is not None:
            ms.set_seed(seed)
        return [draws()]

    wanted = [*begin(), draws(), draws()]
    found, data_seed = begin(), ms.dataset.config.get_seed()
    models = [opened.build()]
    found.append(draws())
    models.append(opened.build())
    found.append(draws())
    for a, b in zip(arrays(models[0]), arrays(models[1])):
        assert np.array_equal(a, b) and len(np.unique(a)) > 1
    assert ms.get_seed() == seed and ms.dataset.config.get_seed() == data_seed
    if seed is None:  # MindSpore's own operators are then seeded by chance
        found, wanted = ([[d[0], *d[5:]] for d in rows] for rows in (found, wanted))
    assert found == wanted


def test_weights_get_the_dtype_asked_for_and_numbers_that_count_keep_theirs(template, head):
    source = head + '''
class Typed(nn.Cell):
    def __init__(self):
        super().__init__()
        self.a = Parameter(Tensor(np.ones(2, np.float16)))
        self.b = mint.nn.Linear(1, 1, bias=False)
        self.index = Parameter(Tensor(np.array([3, 2], np.int32)), requires_grad=False)

    def process_inputs(self, x, **kwargs):
        return {"x": x}

    def forward(self, x, **kwargs):
        return {}


TEMPLATE_MODEL = Typed
'''
    folder = template(source)
    assert [p.dtype for p in load(folder).get_parameters()] == [ms.float32, ms.int32, ms.float32]
    save_state_dict(folder / "w.safetensors", {"a": np.float32([1, 1 / 3]), "b.weight": np.float32([[2]]),
                                               "index": np.int32([1, 0])})
    (folder / "model.py").write_text(source + 'TEMPLATE_MODEL_PATH = "w.safetensors"\n')
    model = load(folder)
    assert [p.dtype for p in model.get_parameters()] == [ms.float32, ms.int32, ms.float32]
    assert model.a.asnumpy()[1] == np.float32(1 / 3) and model.index.asnumpy().tolist() == [1, 0]
    half = load(folder, mindspore_dtype=ms.bfloat16)
    assert [p.dtype for p in half.get_parameters()] == [ms.bfloat16, ms.int32, ms.bfloat16]
    assert not model.training and not any(p.requires_grad for p in model.get_parameters())


def test_weights_that_do_not_match(template, plain_source):
    folder = template(plain_source + '\nTEMPLATE_MODEL_PATH = "model.safetensors"\n')
    save_state_dict(folder / "model.safetensors", {"mlp.weight": np.zeros((4, 32), np.float32),
                                                   "mlp.bias": np.zeros(32, np.float32),
                                                   "mlp.bais": np.zeros(32, np.float32)})
    with pytest.raises(WeightError, match=r"2 missing: frozen\.weight, frozen\.bias; 1 superfluous: mlp\.bais; "
                                          r"1 of the wrong shape: mlp\.weight \(4, 32\), expected \(32, 4\)"):
        load(folder)


def cell(methods, base="nn.Cell"):
    return f"class T({base}):\n" + "\n".join(f"    {line}" for line in methods) + "\nTEMPLATE_MODEL = T\n"


IN, OUT = "def process_inputs(self, x, **kwargs): return {'x': x}", "def forward(self, x, **kwargs): return {}"


@pytest.mark.parametrize("source, message", [
    (cell([OUT]), "T has no process_inputs: expected both"),
    (cell([IN]), "T has no forward: expected both"),
    (cell(["pass"]), "T has no process_inputs and no forward"),
    (cell([IN, OUT], "object"), r"TEMPLATE_MODEL\(\) is a T: expected an nn\.Cell"),
    (cell([IN, "def forward(self): return {}"]), r"forward\(\) names no input: expected the keys"),
    (cell([IN, "def forward(self, pipe): return {}"]), r"forward\(pipe\) names no input"),
    (cell(["def __init__(self): 1 / 0", IN, OUT]), r"model\.py line 8: TEMPLATE_MODEL\(\) failed \(ZeroDivisionError"),
    (cell(["def __init__(self): exit(3)", IN, OUT]), r"line 8: TEMPLATE_MODEL\(\) failed \(SystemExit: 3"),
    (cell(["def __init__(self, size): pass", IN, OUT]), r"TEMPLATE_MODEL\(\) failed \(TypeError: .*'size'"),
])
def test_models_of_another_form(template, head, source, message):
    with pytest.raises(TemplateError, match=message):
        load(template(head + "\n" + source))


@pytest.mark.parametrize("returned, message", [
    ("x", "process_inputs returned a float: expected a dict, the arguments of forward"),
    ("None", "process_inputs returned a NoneType"),
    ("{}", "returned nothing, and forward takes x: expected the same names"),
    ("{'y': x}", "returned y, and forward takes x"),
    ("dict(x=x, xx=x)", "returned x, xx, and forward takes x: .*Did you mean 'x'?"),
    ("{'x': 'text'}", "x is a str: expected a Tensor, an array or a number"),
    ("{'x': [x]}", "x is a list: expected a Tensor"),
    ("{'x': np.array(['text'])}", "x is a ndarray: expected a Tensor"),
    ("{'x': 2**31}", "x is 2147483648: expected a number that int32 holds"),
    ("{'x': Tensor(x)}", r"x has the shape \[\]: expected a batch axis of 1 in front, e\.g\. \[1\]"),
    ("{'x': np.ones((2, 3))}", r"x has the shape \[2, 3\]: expected a batch axis of 1 in front, e\.g\. \[1, 2, 3\]"),
    ("1 / 0", r"model\.py line 8: process_inputs failed on \{'x': 0\.5\} \(ZeroDivisionError"),
    ("exit(3)", r"model\.py line 8: process_inputs failed on \{'x': 0\.5\} \(SystemExit: 3"),
])
def test_what_process_inputs_may_not_return(template, head, returned, message):
    opened = open_template(template(head + "\n" + cell([IN.replace("{'x': x}", returned), OUT])), True)
    with pytest.raises(TemplateError, match=message) as error:
        processed(opened, opened.build(), None, {"x": 0.5})
    assert "model.py" in str(error.value)


@pytest.mark.parametrize("returned, dtype, values", [
    ("0.5", ms.float32, [0.5]), ("3", ms.int32, [3]), ("True", ms.bool_, [True]), ("np.float64(2)", ms.float32, [2]),
    ("np.arange(3)[None]", ms.int32, [[0, 1, 2]]), ("np.ones((1, 2))", ms.float32, [[1, 1]]),
    ("Tensor(np.ones((1, 2), np.float16))", ms.float16, [[1, 1]]),
])
def test_what_process_inputs_may_return(template, head, returned, dtype, values):
    opened = open_template(template(head + "\n" + cell([IN.replace("'x': x", f"'x': {returned}"), OUT])), True)
    value = processed(opened, opened.build(), None, {"x": 0})["x"]
    assert value.dtype == dtype and value.asnumpy().tolist() == values


def test_missing_arguments_of_process_inputs_are_named(template):
    opened = open_template(template(), True)
    with pytest.raises(TemplateError, match=r"process_inputs failed on \{'scael': 1\} \(TypeError: .*'scale'"):
        processed(opened, opened.build(), None, {"scael": 1})


def test_pipe_is_given_where_the_signature_asks_for_it(template, head, toy):
    source = head + '''
SEEN = []


class T(nn.Cell):
    def process_inputs(self, scale, {first}**kwargs):
        SEEN.append(("process_inputs", {first_name}, sorted(kwargs)))
        return {{"scale": scale}}

    def forward(self, scale, {second}**kwargs):
        SEEN.append(("forward", {second_name}, sorted(kwargs)))
        return {{"kv_cache": {{"double_0": (ops.zeros((1, 1, 1, 16)), ops.zeros((1, 1, 1, 16)))}}}}


TEMPLATE_MODEL = T
'''
    pipe = toy()
    for k, (first, second) in enumerate([("pipe, ", ""), ("", "pipe, "), ("pipe, ", "pipe, "), ("", "")]):
        names = [name.strip(", ") or "None" for name in (first, second)]
        folder = template(source.format(first=first, second=second, first_name=names[0], second_name=names[1]), f"t{k}")
        pipeline = TemplatePipeline.from_pretrained(folder, **TRUST)
        pipeline.call_single_side(pipe, [{"scale": 1, "more": 2}])
        seen = sys.modules[type(pipeline.fetch_model(0)).__module__].SEEN
        assert [(name, given is pipe, rest) for name, given, rest in seen] == [
            ("process_inputs", bool(first), ["more"]), ("forward", bool(second), [])]


def test_keys_that_our_own_functions_use_as_names_reach_the_template(template, head, toy, row):
    source = head + "\n" + cell(["def process_inputs(self, name, function, **kwargs): "
                                 "return {'name': float(name), 'function': float(function)}",
                                 "def forward(self, name, function, **kwargs): "
                                 "return {'text_embedding': (name + function).reshape(1, 1, 1)}"])
    folder = template(source)
    cache = TemplatePipeline.from_pretrained(folder, **TRUST).call_single_side(None, [{"name": 1, "function": 2}])
    assert cache["text_embedding"].asnumpy().item() == 3
    pipe = toy()
    attach_template(pipe, folder, **TRUST)
    slots = pipe.run(pipe.optional_units["template_inputs"], {"template_inputs": {"name": 1, "function": 2}})
    assert slots["template.name"].asnumpy().tolist() == [1]


def test_no_gradient_leaves_process_inputs():
    class Model(nn.Cell):
        def __init__(self):
            super().__init__()
            self.w = ms.Parameter(Tensor([2.0]))

        @no_grad()
        def process_inputs(self, x, **kwargs):
            """Doc."""
            return {"a": self.w * x, "b": 3}

    model = Model()
    value, gradient = ms.value_and_grad(lambda: (model.process_inputs(3.0)["a"] * model.w).sum(), None,
                                        model.trainable_params())()
    assert value.asnumpy() == 12 and gradient[0].asnumpy() == 6, "6 through w, and not 12"
    assert model.process_inputs(1.0)["b"] == 3 and Model.process_inputs.__doc__ == "Doc."
    assert "x" in inspect.signature(model.process_inputs).parameters
