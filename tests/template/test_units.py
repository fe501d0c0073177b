"""A template in training: what is prepared and what learns, eager and compiled, in one stage and in two."""
from __future__ import annotations

import sys

import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor
from records import table

from ms_diffsynth import DiffusionTrainingModule, Flux2ImagePipeline, UnifiedDataset, attach_template
from ms_diffsynth.diffusion.density import timestep_index
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, DataError, TemplateError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.program_step import ProgramTrainStep
from ms_diffsynth.training.two_stage import launch_data_process_task

TRUST = {"trust_template_code": True}
TO_Q = "transformer_blocks.0.attn.to_q"


class Module(DiffusionTrainingModule):
    def __init__(self, pipe, folder, what="template_model", task="sft", is_recomputed=False, **how):
        super().__init__()
        self.pipe = pipe
        self.load_training_template_model(pipe, str(folder), is_recomputed, **TRUST)
        self.switch_pipe_to_training_mode(pipe, trainable_models=what, extra_inputs="template_inputs", task=task, **how)


def step_of(module, mode="pynative"):
    cut = module.training_cut()
    return cut, ProgramTrainStep(module, cut, AdamW(module.trainable_parameters(), learning_rate=1e-2), mode=mode)


def inputs_of(module, cut, rows, first=0):
    """The inputs of a step for a batch of rows, whose first is sample ``first``."""
    slots = [module.prepare(row, cut) for row in rows]
    shape, draws = module.pipe.latent_shape(*rows[0]["image"].size[::-1]), Draws(7)
    indices = np.arange(first, first + len(rows))
    values = {name: np.stack([s[name] for s in slots]) for name in cut.cache}
    values |= {"noise": draws.normal("noise", indices, shape),
               "timestep_index": timestep_index(draws.uniform("density_draw", indices), 1000)}
    return [Tensor(values[name]) for name in (*cut.cache, *cut.draws)]


def loss_and_gradients(step, inputs):
    values, gradients = step.value_and_grad(tuple(inputs))
    names = [p.name for p in step.optimizer.parameters]
    return float(values[1].asnumpy()), {n: g.asnumpy() for n, g in zip(names, gradients)}


def largest_difference(a, b):
    """Over all gradients, relative to the largest."""
    assert a.keys() == b.keys()
    return max(np.abs(a[n] - b[n]).max() for n in a) / max(np.abs(g).max() for g in a.values())


# -- FLUX.2 ----------------------------------------------------------------------------------------------------------

EVERYTHING = '''
class Everything(nn.Cell):
    """All three kinds of cache, each from one layer, in a batch."""

    def __init__(self):
        super().__init__()
        self.kv = mint.nn.Linear(2, 2 * 3 * 32)
        self.text = mint.nn.Linear(2, 2 * 96)
        self.down, self.up = mint.nn.Linear(2, 2 * 96), mint.nn.Linear(2, 96 * 2)
        self.one_for_all = Parameter(Tensor(np.random.standard_normal((2, 1, 2, 96)).astype(np.float32)))

    @no_grad()
    def process_inputs(self, scale, **kwargs):
        return {"value": Tensor(np.array([[scale, 1]], np.float32))}

    def forward(self, value, **kwargs):
        b, layer = value.shape[0], "single_transformer_blocks.1.attn.to_out"
        kv = self.kv(value).reshape(b, 2, 3, 32)
        return {"kv_cache": {"double_1": (3 * kv, ops.cos(kv)), "single_0": (ops.sin(kv), kv)},
                "text_embedding": self.text(value).reshape(b, 2, 96),
                "lora": {"transformer_blocks.0.attn.to_q.lora_A.weight": self.down(value).reshape(b, 2, 96),
                         "transformer_blocks.0.attn.to_q.lora_B.weight": self.up(value).reshape(b, 96, 2),
                         layer + ".lora_A.weight": ops.cat((self.one_for_all[0], ops.zeros((1, 2, 288))), 2),
                         layer + ".lora_B.weight": self.one_for_all[1].swapaxes(1, 2)}}


TEMPLATE_MODEL = Everything
'''


@pytest.fixture
def flux2(flux2_folder, template, head):
    """Makes modules that train the template above around a tiny FLUX.2."""
    folder = template(head + EVERYTHING, "everything")

    def make(**how):
        pipe = Flux2ImagePipeline.from_pretrained(str(flux2_folder))
        pipe.max_sequence_length = 16
        return Module(pipe, folder, **how)
    return make


def test_every_kind_of_cache_enters_flux2_with_its_gradient(flux2, row):
    """Gradients against central differences along a random direction, layer by layer."""
    module = flux2()
    cut, step = step_of(module)
    inputs, rng = inputs_of(module, cut, [row(0)]), np.random.default_rng(0)
    _, gradients = loss_and_gradients(step, inputs)
    assert all(np.abs(g).max() > 0 for g in gradients.values()), "every weight of the template learns"
    for parameter in step.optimizer.parameters:
        if not parameter.name.endswith(".weight") and "one_for_all" not in parameter.name:
            continue
        start, gradient = parameter.asnumpy().copy(), gradients[parameter.name]
        direction = gradient / np.linalg.norm(gradient)
        direction += 0.5 * rng.standard_normal(start.shape).astype(np.float32) / np.sqrt(start.size)
        losses = []
        for sign in (1, -1):  # float32 losses: 0.03 is where rounding and curvature both stay below the tolerance
            parameter.set_data(Tensor(start + sign * 0.03 * direction))
            losses.append(float(step.forward(*inputs)[0].asnumpy()))
        parameter.set_data(Tensor(start))
        assert (losses[0] - losses[1]) / 0.06 == pytest.approx((gradient * direction).sum(), rel=2e-2), parameter.name


@pytest.mark.slow
def test_a_batch_of_two_is_two_batches_of_one_recomputed_and_compiled(flux2, row):
    module, rows = flux2(), [row(0), row(1)]
    cut, step = step_of(module)
    loss, both = loss_and_gradients(step, inputs_of(module, cut, rows))
    single = [loss_and_gradients(step, inputs_of(module, cut, [rows[k]], k)) for k in (0, 1)]
    assert single[0][0] != single[1][0] and loss == pytest.approx(np.mean([s[0] for s in single]), rel=1e-6)
    mean = {name: (single[0][1][name] + single[1][1][name]) / 2 for name in both}
    assert largest_difference(mean, both) < 1e-5

    recomputed = flux2(use_gradient_checkpointing=True)
    assert recomputed.pipe.dit.transformer_blocks[0].is_recomputed
    cut, step = step_of(recomputed)
    again = loss_and_gradients(step, inputs_of(recomputed, cut, rows))
    assert again[0] == loss and all(np.array_equal(again[1][n], both[n]) for n in both), "to the bit"

    compiled = flux2()
    cut, step = step_of(compiled, "graph")
    before = state_dict(compiled.pipe.dit)
    result = step.step(*inputs_of(compiled, cut, rows))
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in both.values()))
    assert float(result.loss.asnumpy()) == pytest.approx(loss, rel=1e-5) and step.compilations == 1
    assert float(result.grad_norm.asnumpy()) == pytest.approx(norm, rel=1e-5)
    after = state_dict(compiled.pipe.dit)
    assert all(np.array_equal(before[n], after[n]) for n in before), "only the template learns"


# -- the toy pipeline ------------------------------------------------------------------------------------------------


def train(path, module, dataset, mode="pynative", **options):
    logger = ModelLogger(path, "pipe.template_model.")
    return launch_training_task(Accelerator(1, mode, DEVICE), dataset, module, logger,
                                **{"learning_rate": 1e-2, "max_train_steps": 30, "num_epochs": None, **options})


def process(path, module, dataset):
    return launch_data_process_task(Accelerator(1, "pynative", DEVICE), dataset, module, ModelLogger(path))


def rows_of(row, count=3):
    return [row(k, (16, 16)) for k in range(count)]


@pytest.mark.parametrize("what, mode", [("template_model", "graph"), ("template_model.mlp", "pynative")])
@pytest.mark.few(1)
def test_both_stages_give_the_bits_of_one(toy, template, row, tmp_path, what, mode):
    folder, data = template(), rows_of(row)
    logs = [train(tmp_path / "one", Module(toy(), folder, what), data, mode, batch_size=2)]
    first = Module(toy(), folder, what, "sft:data_process")
    cache = process(tmp_path / "cache", first, data)
    second = Module(toy(), folder, what, "sft:train")
    logs.append(train(tmp_path / "two", second, UnifiedDataset(str(cache.folder)), mode, batch_size=2))
    one, two = (load_state_dict(log.saved[-1]) for log in logs)
    assert table(tmp_path / "one") == table(tmp_path / "two") and len(table(tmp_path / "one")) == 31
    assert all(one[name].tobytes() == two[name].tobytes() for name in one) and one.keys() == two.keys()
    assert set(one) == {"mlp.weight", "mlp.bias"} | (set() if "mlp" in what else {"frozen.weight", "frozen.bias"})
    assert set(cache.read(cache.keys()[0])[0]) == {"template.value", "moments", "prompt_embeds"}
    assert set(first.pipe.models) == {"template_model", "text_encoder", "vae"}
    assert set(second.pipe.models) == {"template_model", "dit"}


def test_around_a_frozen_template_something_else_is_trained(toy, template, row, tmp_path):
    """forward stays in the step then too: the cache of split training holds no dict."""
    how, data = {"lora_base_model": "dit", "lora_rank": 2}, rows_of(row)
    one = train(tmp_path / "one", Module(toy(), template(), None, **how), data, max_train_steps=3)
    first = Module(toy(), template(), None, "sft:data_process", **how)
    cache = process(tmp_path / "cache", first, data)
    assert set(cache.read(cache.keys()[0])[0]) == {"template.value", "moments", "prompt_embeds"}
    second = Module(toy(), template(), None, "sft:train", **how)
    two = train(tmp_path / "two", second, UnifiedDataset(str(cache.folder)), max_train_steps=3)
    assert table(tmp_path / "one") == table(tmp_path / "two") and all("lora" in n for n in
                                                                       load_state_dict(two.saved[-1]))
    assert one.saved[-1].read_bytes()[-64:] == two.saved[-1].read_bytes()[-64:]


COUNTING = '''
CALLS = {"process_inputs": 0, "processor": 0, "forward": []}


class Counting(Plain):
    def process_inputs(self, scale, **kwargs):
        CALLS["process_inputs"] += 1
        return super().process_inputs(scale)

    def forward(self, value, use_gradient_checkpointing=None, use_gradient_checkpointing_offload=None, **kwargs):
        note(use_gradient_checkpointing, use_gradient_checkpointing_offload, sorted(kwargs))
        vectors = gradient_checkpoint_forward(self.mlp, use_gradient_checkpointing, use_gradient_checkpointing_offload,
                                              value).reshape(value.shape[0], 2, 2, 8)
        return {"kv_cache": {"double_0": (vectors, vectors)}}


@constexpr
def note(*what):
    CALLS["forward"].append(what)


class Processor:
    def __call__(self, scale, **kwargs):
        CALLS["processor"] += 1
        return {"scale": scale}


TEMPLATE_MODEL, TEMPLATE_DATA_PROCESSOR = Counting, Processor
'''


@pytest.fixture
def counting(template, plain_source):
    imports = "from mindspore.ops.primitive import constexpr\nfrom ms_diffsynth import gradient_checkpoint_forward\n"
    return template(imports + plain_source + COUNTING, "counting")


def calls(module):
    return sys.modules[type(module.pipe.template_model).__module__].CALLS


def test_process_inputs_runs_once_a_row_and_never_in_the_step(toy, counting, row, tmp_path):
    module = Module(toy(), counting)
    train(tmp_path / "out", module, rows_of(row), max_train_steps=6)
    assert calls(module)["process_inputs"] == calls(module)["processor"] == 3 and len(calls(module)["forward"]) == 6


def test_gradient_checkpointing_reaches_forward_and_changes_no_bit(toy, counting, row):
    results = []
    for is_on in (False, True):
        module = Module(toy(), counting, is_recomputed=is_on)
        calls(module)["forward"].clear()
        cut, step = step_of(module)
        results.append(loss_and_gradients(step, inputs_of(module, cut, rows_of(row, 2))))
        seen = calls(module)["forward"]
        assert seen[0] == (is_on, False, []), "and nothing else is in kwargs"
    (loss, gradients), (again, recomputed) = results
    assert loss == again and all(np.array_equal(gradients[n], recomputed[n]) for n in gradients)


def test_stage_one_runs_no_forward(toy, template, plain_source, row, tmp_path):
    source = plain_source + '''
class Raises(Plain):
    def forward(self, value, **kwargs):
        raise RuntimeError("forward ran")

TEMPLATE_MODEL = Raises
'''
    folder = template(source)
    cache = process(tmp_path / "cache", Module(toy(), folder, task="sft:data_process"), rows_of(row))
    assert len(cache.keys()) == 3
    with pytest.raises(RuntimeError, match="forward ran"):
        train(tmp_path / "out", Module(toy(), folder, task="sft:train"), UnifiedDataset(str(cache.folder)))


def test_another_template_or_another_version_of_it_shapes_the_cache(toy, template, plain_source, row, tmp_path):
    cache = process(tmp_path / "cache", Module(toy(), template(), task="sft:data_process"), rows_of(row))
    folder = template(plain_source + "\n# a comment\n")
    with pytest.raises(Exception, match=r"models\.template_model"):
        train(tmp_path / "out", Module(toy(), folder, task="sft:train"), UnifiedDataset(str(cache.folder)))


def test_rows_that_cannot_be_used(toy, template, head, plain_source, row):
    raising = plain_source + '''
class Processor:
    def __call__(self, scale, **kwargs):
        if scale > 1:
            raise ValueError("too bright")
        return {"scale": scale} if scale > 0 else scale

TEMPLATE_DATA_PROCESSOR = Processor
'''
    module = Module(toy(), template(raising))
    cut = module.training_cut()
    for inputs, error, message in [
        ({"scale": 2}, TemplateError, r"model\.py line \d+: TEMPLATE_DATA_PROCESSOR failed on \{'scale': 2\} "
                                      r"\(ValueError: too bright\)"),
        ({"scale": 0}, TemplateError, "TEMPLATE_DATA_PROCESSOR returned a int: expected a dict"),
        ({"size": 2}, TemplateError, r"TEMPLATE_DATA_PROCESSOR failed on \{'size': 2\} \(TypeError: .*'scale'"),
        ("0.5", DataError, r"template_inputs='0\.5': expected an object such as .*Write the metadata as \.json"),
        ([{"scale": 1}], DataError, r"template_inputs=\[\{'scale': 1\}\]: expected an object"),
        (None, DataError, "a row has no 'template_inputs'"),
    ]:
        with pytest.raises(error, match=message):
            module.prepare(row() | {"template_inputs": inputs}, cut)
    assert module.prepare(row(0, (16, 16), scale=1, model_id=3), cut)["template.value"].shape == (4,)


def test_a_family_without_templates_and_inputs_that_are_not_switched_on(toy, toy_folder, template):
    from ms_diffsynth.pipelines.toy.pipeline import ToyImagePipeline

    with pytest.raises(ConfigError, match="ToyImagePipeline does not support templates"):
        attach_template(ToyImagePipeline.from_pretrained(str(toy_folder)), template(), **TRUST)
    with pytest.raises(ConfigError, match=r"template_inputs.*Set template_model_id_or_path"):
        DiffusionTrainingModule().switch_pipe_to_training_mode(toy(), trainable_models="dit",
                                                               extra_inputs="template_inputs")
    with pytest.raises(ConfigError, match=r"'template_model\.mpl' names no weights: .*Did you mean 'mlp'"):
        Module(toy(), template(), "template_model.mpl")


def test_pipe_in_both_methods_while_training(toy, template, head, row, tmp_path):
    """process_inputs may call every model but the network; forward sees the dtype."""
    folder = template(head + '''
class Reads(nn.Cell):
    def __init__(self):
        super().__init__()
        self.mlp = mint.nn.Linear(16, 32)

    @no_grad()
    def process_inputs(self, text, pipe, **kwargs):
        return {"embedding": pipe.text_encoder(Tensor([[ord(c) for c in text]])).mean(1)}

    def forward(self, embedding, pipe, **kwargs):
        vectors = self.mlp(embedding.astype(pipe.dtype)).reshape(embedding.shape[0], 2, 2, 8)
        return {"kv_cache": {"double_0": (vectors, vectors)}}


TEMPLATE_MODEL = Reads
''')
    data = [row(k, (16, 16), text="abc"[k:]) for k in range(3)]
    train(tmp_path / "one", Module(toy(), folder), data, "graph", max_train_steps=2)
    cache = process(tmp_path / "cache", Module(toy(), folder, task="sft:data_process"), data)
    second = Module(toy(), folder, task="sft:train")
    train(tmp_path / "two", second, UnifiedDataset(str(cache.folder)), max_train_steps=2)
    one, two = ([float(line.split(",")[3]) for line in table(tmp_path / name)[1:]] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5) and set(second.pipe.models) == {"template_model", "dit"}
    (folder / "model.py").write_text((folder / "model.py").read_text().replace("pipe.text_encoder(", "pipe.dit("))
    module = Module(toy(), folder)
    with pytest.raises(Exception, match="touches the model 'dit' without declaring it"):
        module.prepare(data[0], module.training_cut())
