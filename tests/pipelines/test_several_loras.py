"""Several LoRAs in one pipeline, taken out again to the bit; and one that is there before another is trained."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from low_rank import inject_lora
from mindspore import Tensor

from ms_diffsynth import load_config, runtime
from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.formats.adapters import A, B
from ms_diffsynth.formats.lora import save_lora
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.models import Source, load_component
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.pipelines.flux.pipeline import COMPONENTS
from ms_diffsynth.registry import family
from ms_diffsynth.run.build import build_module
from ms_diffsynth.run.checks import check_settings
from ms_diffsynth.run.pipeline import build_pipeline
from ms_diffsynth.run.samples import build_sampler
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.module import DiffusionTrainingModule


@pytest.fixture(scope="module", autouse=True)
def _eager():
    runtime.configure("pynative", DEVICE)


@pytest.fixture
def pipe(tiny_model):
    return family("toy").pipeline.from_pretrained(str(tiny_model("toy")))


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for k in range(2):
        pair = random.standard_normal((2, 16)).astype(np.float32), random.standard_normal((16, 2)).astype(np.float32)
        save_lora(path := tmp_path / f"{k}.safetensors", {"layer_1": pair}, alpha=2)
        paths.append(path)
    return paths


def change(path):
    tensors = load_state_dict(path)
    return tensors[f"transformer.layer_1.{B}"] @ tensors[f"transformer.layer_1.{A}"]


def test_each_with_its_factor_and_out_again_to_the_bit(pipe, files):
    before = state_dict(pipe.dit)
    digest = pipe.weights_digest("dit")
    assert pipe.load_lora(pipe.dit, files, [0.8, -0.5]) == 2
    after = state_dict(pipe.dit)
    expected = before["layer_1.weight"] + 0.8 * change(files[0]) - 0.5 * change(files[1])
    np.testing.assert_allclose(after["layer_1.weight"], expected, atol=2e-6)
    assert pipe.weights_digest("dit") != digest
    pipe.clear_lora()
    for name, array in state_dict(pipe.dit).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert pipe.weights_digest("dit") == digest
    pipe.clear_lora()  # nothing is left to take out


def test_out_again_are_weights_of_a_training(pipe, files, tmp_path):
    trained = np.full((16, 16), 0.25, np.float32)
    save_state_dict(tmp_path / "w.safetensors", {"layer_1.weight": trained})
    pipe.load_weights(tmp_path / "w.safetensors")
    pipe.load_lora(None, files[0])
    assert (state_dict(pipe.dit)["layer_1.weight"] != trained).any()
    pipe.clear_lora()
    np.testing.assert_array_equal(state_dict(pipe.dit)["layer_1.weight"], trained)


def test_what_cannot_be_taken_out_is_told(pipe, files):
    with pytest.raises(ConfigError, match="1 factors for 2 LoRA files"):
        pipe.load_lora(pipe.dit, files, [1.0])
    alone = family("toy").pipeline(models={"dit": pipe.dit})
    alone.load_lora(alone.dit, files[0])
    with pytest.raises(ConfigError, match="'dit' was not read from files"):
        alone.clear_lora()


def test_a_preset_lora_is_in_the_weights_and_the_trained_one_is_the_difference(pipe, files, tmp_path):
    before = state_dict(pipe.dit)["layer_1.weight"]
    module = DiffusionTrainingModule()
    module.pipe = pipe
    module.switch_pipe_to_training_mode(pipe, lora_base_model="dit", lora_rank=2, preset_lora_path=files[0])
    cell = dict(pipe.dit.cells_and_names())["layer_1"]
    np.testing.assert_allclose(cell.base.weight.asnumpy(), before + change(files[0]), atol=2e-6)
    module.save(tmp_path / "trained.safetensors")
    assert not load_state_dict(tmp_path / "trained.safetensors")[f"transformer.layer_1.{B}"].any()
    with pytest.raises(ConfigError, match="preset_lora_model=vae: expected a model of the training step: dit"):
        module.switch_pipe_to_training_mode(pipe, lora_base_model="dit", lora_rank=2, preset_lora_path=files[0],
                                            preset_lora_model="vae")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_preset_lora_is_left_out_and_in_again_to_the_bit(pipe, files, kind):
    before = state_dict(pipe.dit)["layer_1.weight"]
    module = DiffusionTrainingModule()
    module.pipe = pipe
    module.switch_pipe_to_training_mode(pipe, lora_base_model="dit", lora_rank=2, preset_lora_path=files[0],
                                        adapter=kind)
    cell = dict(pipe.dit.cells_and_names())["layer_1"]
    squares = [cell.squares] if kind == "dora" else []  # squared norms of the frozen weight's rows
    preset = [p.asnumpy().copy() for p in (cell.base.weight, *squares)]
    trained = [p.asnumpy().copy() for p in cell.own_parameters()]
    with pytest.raises(ZeroDivisionError), pipe.without_loras():
        np.testing.assert_array_equal(cell.base.weight.asnumpy(), before)
        for norms in squares:
            np.testing.assert_allclose(norms.asnumpy(), (before**2).sum(1), rtol=1e-5)
        raise ZeroDivisionError  # a sampler that fails leaves the weights that are trained on
    for found, wanted in zip((cell.base.weight, *squares, *cell.own_parameters()), (*preset, *trained)):
        np.testing.assert_array_equal(found.asnumpy(), wanted)


def test_sample_images_without_the_preset_are_those_of_the_model(files, tiny_model, tmp_path):
    """A LoRA that has learnt nothing yet, on top of a preset that stays out of samples."""
    def images(**given):
        config = load_config(family="toy", model_paths=str(tiny_model("toy")), dataset_base_path=str(tmp_path),
                             num_epochs=1, sample_prompts=["a cat"], height=32, width=32, num_inference_steps=2,
                             lora_rank=2, **given)
        pipe = build_pipeline(config)
        if given:
            build_module(config, pipe)
        sampler, _ = build_sampler(config, pipe)
        return np.asarray(sampler()[0])

    plain, preset = images(), {"preset_lora_path": str(files[0])}
    np.testing.assert_array_equal(images(**preset, preset_lora_in_samples=False), plain)
    assert (images(**preset) != plain).any()


@pytest.mark.parametrize(("given", "says"), [
    ({}, "preset_lora_in_samples=false without preset_lora_path"),
    ({"preset_lora_path": "", "trainable_models": "dit"}, "trainable_models=dit: its weights are trained"),
    ({"preset_lora_path": "", "fp8_models": "vae,dit"}, "fp8_models=vae,dit: its weights are in 8 bits"),
])
def test_a_preset_that_cannot_be_left_out_is_refused(files, tmp_path, given, says):
    given = {name: value or str(files[0]) for name, value in given.items()}
    config = load_config(family="toy", dataset_base_path=str(tmp_path), num_epochs=1, output_path=str(tmp_path / "run"),
                         preset_lora_in_samples=False, **given)
    with pytest.raises(ConfigError, match=says):
        check_settings(Accelerator(1, "pynative", DEVICE), config)


def test_a_preset_lora_of_another_model_is_refused(pipe, tmp_path):
    save_lora(tmp_path / "x.safetensors", {"blocks.0": (np.ones((1, 4), np.float32), np.ones((4, 1), np.float32))}, 1)
    module = DiffusionTrainingModule()
    module.pipe = pipe
    with pytest.raises(WeightError, match=r"(?s)preset_lora_path=.*none of its 1 layers.*transformer\.blocks\.0"):
        module.switch_pipe_to_training_mode(pipe, lora_base_model="dit", preset_lora_path=tmp_path / "x.safetensors")


def test_a_lora_on_the_last_layer_of_t5s_blocks(tiny_model):
    """Its code asks wo for the dtype of its weight."""
    component = next(c for c in COMPONENTS if c.name == "text_encoder_2")
    encoder = load_component(component, Source(tiny_model("flux") / "text_encoder_2"), ms.float32)
    ids = Tensor(np.arange(8)[None], ms.int32)
    before = encoder(ids)[0].asnumpy()
    inject_lora(encoder, ["wi_0", "wo"], 2)
    np.testing.assert_array_equal(encoder(ids)[0].asnumpy(), before)
