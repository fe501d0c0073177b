"""What every family must hold, for each family of the registry; those that take long to compile are marked slow."""
from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor, nn, ops
from PIL import Image

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.diffusion.ddpm import DDPMObjective, LatentDDPMObjective
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.draws import Draws
from ms_diffsynth.formats.weights import load_state_dict, save_sharded
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.nn.adapters import ADAPTERS, adapter as adapter_called
from ms_diffsynth.nn.adapters.dora import MAGNITUDE
from ms_diffsynth.nn.adapters.layer import adapted_layers
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import FAMILIES, family
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.prepared import in_bucket
from ms_diffsynth.training.program_step import ProgramTrainStep
from ms_diffsynth.training.two_stage import launch_data_process_task, open_cache

QUICK = ("toy",)
WITH_VAE = tuple(n for n in FAMILIES if n != "ddpm_unet")
DIFFUSION = ("ddpm_unet", "sdxl")  # trained by denoising diffusion, the others by flow matching
SIDE = 32  # pixels
FLOAT = ms.float32


def each(names):
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


@pytest.fixture(params=each(FAMILIES))
def name(request):
    return request.param


def pipeline(folder, name):
    pipe = family(name).pipeline.from_pretrained(str(folder))
    if hasattr(pipe, "max_sequence_length"):
        pipe.max_sequence_length = 16
    return pipe


@pytest.fixture
def pipe(tiny_model, name):
    return pipeline(tiny_model(name), name)


def row(pipe, seed=0):
    prompt = ("a red cat", "two small dogs by the sea")[seed % 2]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size_of(pipe), 3), np.uint8)
    return {"prompt": prompt, pipe.medium: pixels if pipe.medium == "video" else Image.fromarray(pixels)}


def size_of(pipe):
    """Of an image (height, width), of a video (frames, height, width)."""
    return (5, SIDE, SIDE) if pipe.medium == "video" else (SIDE, SIDE)


def objective_of(pipe, **flow_matching):
    """Of the family's kind, with all its draws and weights."""
    if isinstance(pipe.objective, LatentDDPMObjective):
        return LatentDDPMObjective(snr_gamma=5.0, noise_offset=0.1, posterior=flow_matching.get("posterior", "sample"))
    if isinstance(pipe.objective, DDPMObjective):
        return DDPMObjective(snr_gamma=5.0, random_flip=True)
    return Objective(**flow_matching)


def draws_of(pipe, objective, count=1):
    """Random slots for ``count`` samples."""
    random, shape = Draws(7).of(np.arange(count)), (count, *pipe.latent_shape(*size_of(pipe)))
    return {slot: objective.draw(slot, shape, 1000, random) for slot in objective.draws}


def lora_module(pipe, fuse=(), is_moved=True, kind="lora", **objective):
    """A module that trains a LoRA, or another adapter, on the network, moved away from its start, where B is zero."""
    module = DiffusionTrainingModule()
    module.pipe, module.fuse = pipe, fuse
    module.switch_pipe_to_training_mode(pipe, lora_base_model=pipe.network, lora_rank=2, lora_alpha=3.0, adapter=kind,
                                        objective=objective_of(pipe, weighting_scheme="diffsynth", **objective))
    if is_moved:
        move_lora(pipe, kind=kind)
    return module


def move_lora(pipe, size=0.3, kind="lora"):
    adapter, rng, network = adapter_called(kind), np.random.default_rng(3), getattr(pipe, pipe.network)
    moved = {n: (size * rng.standard_normal(array.shape)).astype(np.float32) + (array if MAGNITUDE in n else 0)
             for n, array in adapter.tensors(network).items()}
    adapter.load(network, moved)


def step_of(module, mode="pynative"):
    cut = module.training_cut()
    optimizer = AdamW(module.trainable_parameters(), learning_rate=1e-2)
    return cut, ProgramTrainStep(module, cut, optimizer, mode=mode)


def inputs_of(module, cut, count=1):
    """The inputs of a step, for a batch of ``count`` rows."""
    pipe = module.pipe
    rows = [in_bucket(module.prepare(row(pipe, k), cut), size_of(pipe), pipe).slots for k in range(count)]
    slots = {n: np.stack([r[n] for r in rows]) for n in cut.cache} | draws_of(module.pipe, module.pipe.objective, count)
    return [Tensor(slots[n]) for n in (*cut.cache, *cut.draws)]


def loss_and_gradients(step, inputs):
    values, gradients = step.value_and_grad(tuple(inputs))
    return values[1].asnumpy(), [g.asnumpy() for g in gradients]


def assert_close(found, wanted, tolerance, what="", size=None):
    """Within ``tolerance`` of the largest wanted number, or of ``size``."""
    assert found.shape == wanted.shape, what
    size = np.abs(wanted).max() if size is None else size
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(size, 1e-20), err_msg=what)


def largest(arrays):
    return max((np.abs(a).max() for a in arrays), default=0.0)


# -- programs and units ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_programs_build(tiny_model, name):
    pipe = pipeline(tiny_model(name), name)
    objective = objective_of(pipe, posterior="sample")
    cut = pipe.training_program(objective, pipe.training_schedule("sft").sigmas).cut(("loss",), (pipe.network,))
    assert cut.models("step") == (pipe.network,) and pipe.network not in cut.models("prepare")
    assert set(cut.draws) == set(objective.draws) and ("moments" if name in WITH_VAE else "input_latents") in cut.cache
    assert all(not unit.is_host for unit in cut.step)
    assert pipe.denoise.input_params[:2] == pipe.sampled_draws
    assert pipe.sampling_program().cut(pipe.denoise.output_params).draws == pipe.sampled_draws
    assert pipe.sampled_draws == ("latents", "timestep_index" if name in DIFFUSION else "sigma")
    for fused in pipe.fusible:
        program = pipe.training_program(objective, pipe.training_schedule("dreambooth").sigmas)
        assert fused in [u.name for u in program.cut(("loss",), (pipe.network,), (fused,)).step]
    assert not any(m in pipe.models for m in pipe.model_names), "building a program loads no model"


class Projected(nn.Cell):
    """A unit and one number made of all its float outputs, to differentiate."""

    def __init__(self, unit, outputs):
        super().__init__(auto_prefix=False)
        rng = np.random.default_rng(11)
        self.unit = unit
        self.floats = tuple(k for k, o in enumerate(outputs) if o.dtype == FLOAT)
        self.directions = tuple(Tensor(rng.standard_normal(o.shape).astype(np.float32)) for o in outputs)

    def construct(self, *inputs):
        outputs = self.unit(*inputs)
        total = Tensor(0.0, FLOAT)
        for k in self.floats:
            total = total + (outputs[k] * self.directions[k]).sum()
        return total, outputs


def value_and_gradients(unit, inputs, outputs, mode):
    """Outputs, and gradients for all float inputs and all weights of the unit's models."""
    cell = Projected(unit, outputs)
    weights = ms.ParameterTuple([p for p in unit.get_parameters() if p.dtype == FLOAT])
    positions = tuple(k for k, x in enumerate(inputs) if x.dtype == FLOAT)

    def run(*x):
        return unit(*x)

    if not cell.floats or not (positions or weights):
        return CompiledStep(run, unit.name, mode)(*inputs), []
    function = ms.value_and_grad(cell, positions or None, weights or None, has_aux=True)

    def both(*x):
        values, gradients = function(*x)
        return values, gradients

    values, gradients = CompiledStep(both, unit.name, mode)(*inputs)
    if positions and weights:
        gradients = (*gradients[0], *gradients[1])
    return values[1], list(gradients) if isinstance(gradients, (tuple, list)) else [gradients]


def test_every_tensor_unit_is_the_same_eager_and_compiled_in_value_and_gradient(pipe, name):
    objective = objective_of(pipe, weighting_scheme="cosmap", posterior="sample", prior_loss_weight=None)
    program = pipe.training_program(objective, pipe.training_schedule("sft").sigmas)
    seen_as = "video" if pipe.medium == "video" else "input_image"
    slots = {"prompt": row(pipe)["prompt"], seen_as: row(pipe)[pipe.medium]}
    slots |= dict(zip(("width", "height", "num_frames"), size_of(pipe)[::-1]))
    slots |= {k: Tensor(v) for k, v in draws_of(pipe, objective).items()}
    seen = set()
    for unit in program.units:
        before = dict(slots)
        slots = pipe.run([unit], slots)
        if unit.is_host:
            continue
        seen.add(unit.name)
        unit.attach(pipe)
        for parameter in unit.get_parameters():
            parameter.requires_grad = True
        reads = [p.removesuffix("?") for p in unit.input_params]
        inputs = [before[read] for read in reads if read in before]  # what is absent comes last
        outputs = [slots[p] for p in unit.output_params]
        eager, eager_gradients = value_and_gradients(unit, inputs, outputs, "pynative")
        compiled, compiled_gradients = value_and_gradients(unit, inputs, outputs, "graph")
        for a, b, slot in zip(eager, compiled, unit.output_params):
            assert_close(b.asnumpy(), a.asnumpy(), 2e-6, f"{unit.name}.{slot}")
        assert len(eager_gradients) == len(compiled_gradients)
        eager_gradients = [g.asnumpy() for g in eager_gradients]
        compiled_gradients = [g.asnumpy() for g in compiled_gradients]
        # of the unit's largest gradient: some are sums that cancel to 0 (a bias of keys under a softmax)
        size = largest(eager_gradients)
        for k, (a, b) in enumerate(zip(eager_gradients, compiled_gradients)):
            assert_close(b, a, 1e-5, f"gradient {k} of {unit.name}", size)
        assert not unit.onload_model_names or size > 0, f"{unit.name} has no gradient"
    wanted = {"lookup_noise", "add_noise", "prediction_loss"} if name in DIFFUSION else {"flow_match_loss"}
    wanted |= {"encode_prompt", "encode_image"} if name in WITH_VAE else {"random_flip"}
    assert wanted | {"denoise"} <= seen


# -- the split, the batch, the two ways ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", each(WITH_VAE))
def test_split_equals_single_stage(tiny_model, name):
    results = []
    for fuse in ((), ("encode_image",)):
        module = lora_module(pipeline(tiny_model(name), name), fuse, posterior="sample")
        cut, step = step_of(module)
        assert ("moments" in cut.cache) == (not fuse) and ("pixels" in cut.cache) == bool(fuse)
        results.append(loss_and_gradients(step, inputs_of(module, cut)))
    (loss, gradients), (fused_loss, fused_gradients) = results
    assert loss == fused_loss  # bit for bit
    assert all(np.array_equal(a, b) for a, b in zip(gradients, fused_gradients))
    assert largest(gradients) > 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.few(3)
def test_the_cache_gives_what_prepare_gave(tiny_model, name, tmp_path):
    modules = []
    for stage in ("data_process", "train"):
        module = DiffusionTrainingModule()
        module.pipe = pipeline(tiny_model(name), name)
        module.switch_pipe_to_training_mode(module.pipe, lora_base_model=module.pipe.network, lora_rank=2,
                                            task=f"sft:{stage}")
        modules.append(module)
    first, second = modules
    rows = [row(first.pipe, k) for k in range(2)]
    cache = launch_data_process_task(Accelerator(1, "graph", DEVICE), rows, first, ModelLogger(tmp_path))
    rows, *_ = open_cache(cache.folder, second, second.training_cut())
    for k in range(2):
        wanted = in_bucket(first.prepare(row(first.pipe, k), first.training_cut()), size_of(first.pipe), first.pipe)
        assert rows[k].bucket == wanted.bucket and rows[k].slots.keys() == wanted.slots.keys()
        assert all(np.array_equal(rows[k].slots[n], wanted.slots[n]) for n in wanted.slots)
    assert first.pipe.network not in first.pipe.models and set(second.pipe.models) == {second.pipe.network}
    shape = second.pipe.latent_shape(*size_of(second.pipe))  # from the configs the cache brings
    assert shape == first.pipe.latent_shape(*size_of(first.pipe))


def test_a_batch_of_two_is_two_batches_of_one(pipe):
    module = lora_module(pipe)
    cut, step = step_of(module)
    both = inputs_of(module, cut, 2)
    singles = [loss_and_gradients(step, [x[k:k + 1] for x in both]) for k in range(2)]
    loss, gradients = loss_and_gradients(step, both)
    assert singles[0][0] != pytest.approx(singles[1][0], rel=1e-3), "the two rows and their sigmas differ"
    assert loss == pytest.approx((singles[0][0] + singles[1][0]) / 2, rel=1e-6)
    for g, a, b in zip(gradients, singles[0][1], singles[1][1]):
        assert_close(g, (a + b) / 2, 5e-6, size=largest(gradients))  # sums over twice as many tokens, in float32


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_the_documents_forward_gives_the_loss_of_the_compiled_step(pipe, posterior):
    module = lora_module(pipe, posterior=posterior)
    pipe.random = Draws(7).of(np.arange(1))  # those of `draws_of`
    eager = float(module.forward(row(pipe)).asnumpy())
    cut, step = step_of(module, "graph")
    assert float(step(*inputs_of(module, cut))[0].asnumpy()) == pytest.approx(eager, rel=2e-6)


# -- files -----------------------------------------------------------------------------------------------------------


def test_every_component_survives_saving_and_loading(tiny_model, name, pipe, tmp_path):
    sources = []
    for component in pipe.store.components:
        if not component.class_name:
            continue
        weights = state_dict(getattr(pipe, component.name))
        saved = load_state_dict(tiny_model(name) / component.folder)
        for key, value in weights.items():
            assert np.array_equal(value, saved[key]), key
        # shards of 100 kB, so that a model is in several
        config = json.loads((tiny_model(name) / component.folder / "config.json").read_text())
        assert {k for k in config if k not in ("_class_name", "architectures")} <= set(pipe.config(component.name))
        save_sharded(tmp_path / component.name, weights, max_shard_bytes=100_000, config=config)
        sources.append(ModelConfig(str(tmp_path / component.name)))
    again = family(name).pipeline.from_pretrained(sources)
    for component in pipe.store.components:
        if component.class_name:
            wanted = state_dict(getattr(pipe, component.name))
            for key, value in state_dict(getattr(again, component.name)).items():
                assert np.array_equal(value, wanted[key]), key


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_saved_adapter_gives_the_same_velocity_in_a_fresh_pipeline(tiny_model, name, pipe, tmp_path, kind):
    module = lora_module(pipe, kind=kind)
    cut = module.training_cut()
    inputs = dict(zip((*cut.cache, *cut.draws), inputs_of(module, cut)))
    slots = {k: v for k, v in inputs.items() if k not in ("moments", *cut.draws)}
    slots |= {"latents": inputs["noise"], "sigma": Tensor(np.float32([0.7])), "guidance": Tensor(np.float32([3.5])),
              "timestep_index": Tensor(np.int32([700]))}
    module.save(tmp_path / "lora.safetensors")
    fresh = pipeline(tiny_model(name), name)
    plain = fresh.model_fn(**slots).asnumpy()
    count = fresh.load_lora(getattr(fresh, fresh.network), tmp_path / "lora.safetensors")
    assert count == len(adapted_layers(getattr(pipe, pipe.network)))
    wanted = pipe.model_fn(**slots).asnumpy()
    assert_close(fresh.model_fn(**slots).asnumpy(), wanted, 1e-5)  # W + s B A is rounded once more when fused
    assert np.abs(wanted - plain).max() > 1e-2 * np.abs(wanted).max()
    resumed = DiffusionTrainingModule()
    resumed.pipe = pipeline(tiny_model(name), name)
    resumed.switch_pipe_to_training_mode(resumed.pipe, lora_base_model=pipe.network, lora_rank=2, lora_alpha=1.0,
                                         lora_checkpoint=tmp_path / "lora.safetensors", adapter=kind)
    assert_close(resumed.pipe.model_fn(**slots).asnumpy(), wanted, 1e-5)  # though its scale is another


# -- sampling --------------------------------------------------------------------------------------------------------


def compilations(pipe):
    """How often the sampling step was compiled since it was forgotten."""
    return sum(step.compilations for step in pipe.compiled_steps.values())


def test_sampling_depends_on_the_seed_and_on_the_weights_of_the_moment(pipe):
    def sample(seed=1):
        options = {"height": SIDE, "width": SIDE, "seed": seed, "num_inference_steps": 2}
        options |= {"num_frames": 5} if pipe.medium == "video" else {}
        picture = pipe(prompt="a red cat", **options) if "prompt" in pipe.inputs else pipe(**options)[0]
        return np.asarray(picture).astype(int)

    first = sample()
    assert first.shape == (*size_of(pipe), 3)
    assert np.array_equal(first, sample()) and not np.array_equal(first, sample(seed=2))
    assert compilations(pipe) == 1
    module = lora_module(pipe, is_moved=False)
    # the LoRA adds zero, but compiled anew another order of sums may move a rounding to a pixel
    assert np.abs(first - sample()).max() <= 1
    cut, step = step_of(module, "graph")
    for k in range(3):
        step(*inputs_of(module, cut))
        if k == 0:
            trained = sample()
    assert not np.array_equal(trained, sample()), "the compiled sampling step does not see what was trained"
    move_lora(pipe)
    assert not np.array_equal(first, sample())
    assert compilations(pipe) == 1


@pytest.mark.parametrize("name", each(WITH_VAE))
def test_sampling_depends_on_the_condition_and_compiles_once(tiny_model, name):
    pipe = pipeline(tiny_model(name), name)
    plain = pipe.condition("a red cat", guidance=Tensor(np.float32([3.5])))
    other = pipe.condition("x", guidance=Tensor(np.float32([3.5])))
    latents = ops.zeros((1, *pipe.latent_shape(*size_of(pipe))), FLOAT)
    sigma = Tensor(np.float32([0.5]))
    assert not np.array_equal(pipe.denoiser(plain)(latents, sigma).asnumpy(),
                              pipe.denoiser(other)(latents, sigma).asnumpy())
    assert compilations(pipe) == 1
