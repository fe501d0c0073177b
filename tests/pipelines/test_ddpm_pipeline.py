"""Unconditional pictures: files, settings, training without prompts, sampling. Eager; compiled in test_contract.py."""
from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from mindspore import ops
from PIL import Image

from ms_diffsynth.diffusion.ddpm import DDPMObjective, NoiseSchedule
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, DataError, OutputError, WeightError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.hub.publish import choose
from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.pipelines.ddpm_unet.pipeline import UnconditionalImagePipeline, build_unet
from ms_diffsynth.pipelines.ddpm_unet.tiny import CONFIG
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule

SIDE = 8  # pixels


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("ddpm_unet")


def module_on(folder, **objective):
    module = DiffusionTrainingModule()
    module.pipe = UnconditionalImagePipeline.from_pretrained(str(folder))
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="unet", objective=DDPMObjective(**objective))
    return module


def pictures(count=4):
    rng = np.random.default_rng(0)
    return [{"image": Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))} for _ in range(count)]


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_has_the_format_of_diffusers_and_loads_again(folder, tmp_path):
    module = module_on(folder, prediction_type="v_prediction")
    module.pipe.save_pretrained(tmp_path / "saved")
    files = {p.relative_to(tmp_path / "saved").as_posix() for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert files == {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
                     "unet/diffusion_pytorch_model.safetensors"}
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["unet"] == ["diffusers", "UNet2DModel"]
    again = UnconditionalImagePipeline.from_pretrained(str(tmp_path / "saved"))
    assert again.noise_schedule == NoiseSchedule(prediction_type="v_prediction"), "what was trained is what is sampled"
    weights = state_dict(again.unet)
    assert all(np.array_equal(value, weights[name]) for name, value in state_dict(module.pipe.unet).items())
    assert "down_blocks.1.attentions.0.to_q.weight" in load_state_dict(tmp_path / "saved/unet")
    with pytest.raises(OutputError, match="not empty"):
        again.save_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "saved", replace=True)


@pytest.mark.parametrize("has_average", [False, True], ids=["weights", "their moving average"])
def test_the_folder_of_a_run_that_trains_all_of_the_network_is_a_pipeline(folder, tmp_path, has_average, eager):
    module = module_on(folder, prediction_type="v_prediction")
    logger = ModelLogger(tmp_path / "run", "pipe.unet.")
    logger.start({})
    logger.ema = EMA(module.trainable_parameters()) if has_average else None
    before, weight = state_dict(module.pipe.unet), module.trainable_parameters()[0]
    for number in range(2):  # the second replaces the first
        ops.assign(weight, weight + 1)
        logger.save_model(Accelerator(1, "pynative", DEVICE), module, f"step-{number}.safetensors")
    again = UnconditionalImagePipeline.from_pretrained(str(tmp_path / "run"))
    assert again.noise_schedule == NoiseSchedule(prediction_type="v_prediction")
    expected = before if has_average else state_dict(module.pipe.unet)
    found = state_dict(again.unet)
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())
    assert {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json",
            "unet/diffusion_pytorch_model.safetensors"} <= set(choose(tmp_path / "run"))


def test_the_folder_of_a_lora_is_none(folder, tmp_path):
    module = DiffusionTrainingModule()
    module.pipe = UnconditionalImagePipeline.from_pretrained(str(folder))
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="unet", lora_rank=2)
    logger = ModelLogger(tmp_path / "run")
    logger.start({})
    logger.save_model(Accelerator(1, "pynative", DEVICE), module, "step-0.safetensors")
    assert not (tmp_path / "run/model_index.json").exists() and not (tmp_path / "run/unet").exists()


def test_the_schedule_comes_from_its_file_or_is_ddpms_own_and_that_is_said(folder, tmp_path, caplog):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(NoiseSchedule(beta_end=0.01).to_config()))
    network = ModelConfig(str(folder / "unet"))
    given = UnconditionalImagePipeline.from_pretrained([network, ModelConfig(str(tmp_path / "scheduler_config.json"))])
    assert given.noise_schedule.beta_end == 0.01
    beside = UnconditionalImagePipeline.from_pretrained(network)  # its folder lies beside scheduler/
    assert beside.noise_schedule == NoiseSchedule() and not caplog.records
    (tmp_path / "alone").mkdir()
    for file in (folder / "unet").iterdir():
        (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
    with caplog.at_level(logging.WARNING):
        alone = UnconditionalImagePipeline.from_pretrained(ModelConfig(str(tmp_path / "alone")))
        assert alone.noise_schedule == alone.noise_schedule == NoiseSchedule()
    assert caplog.text.count("the family's own schedule is taken") == 1


@pytest.mark.parametrize("change, expected", [
    ({"num_class_embeds": 10}, "num_class_embeds=10: expected one without classes"),
    ({"in_channels": 1, "out_channels": 1}, "in_channels=1, out_channels=1: expected one without classes, of three"),
    ({"out_channels": 6}, "out_channels=6"),
])
def test_a_network_that_does_not_fit(change, expected):
    with pytest.raises(WeightError, match=expected):
        build_unet(CONFIG | change)


def test_a_lora_has_no_place_in_a_saved_pipeline(folder, tmp_path):
    module = DiffusionTrainingModule()
    module.pipe = UnconditionalImagePipeline.from_pretrained(str(folder))
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="unet", lora_rank=2)
    with pytest.raises(WeightError, match="carries a LoRA"):
        module.pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -- what is trained -------------------------------------------------------------------------------------------------


def test_an_objective_of_flow_matching_is_refused_and_none_is_the_familys(folder):
    pipe = UnconditionalImagePipeline.from_pretrained(str(folder))
    assert pipe.objective_for(None) == DDPMObjective()
    for objective in (Objective(), Objective(weighting_scheme="diffsynth", posterior="sample")):
        with pytest.raises(ConfigError, match="is an objective of flow matching, but UnconditionalImagePipeline"):
            pipe.objective_for(objective)


def test_sides_that_cannot_be_halved(folder):
    pipe = UnconditionalImagePipeline.from_pretrained(str(folder))
    assert pipe.latent_shape(SIDE, 6) == (3, SIDE, 6)
    with pytest.raises(ConfigError, match=r"8 x 7 pixels: this network halves the sides 1 times, .* multiples of 2"):
        pipe.latent_shape(SIDE, 7)


def test_rows_need_no_prompt_but_a_picture(folder):
    module = module_on(folder)
    shared, posi, nega = module.get_pipeline_inputs(pictures(1)[0])
    assert shared["input_image"].size == (SIDE, SIDE) and posi == nega == {} and module.row_fields == ["image"]
    with pytest.raises(DataError, match=r"a row has no 'image': it has prompt. Expected the columns 'image'"):
        module.get_pipeline_inputs({"prompt": "a face"})


@pytest.mark.slow
def test_training_by_the_loop_learns_and_its_weights_load_into_a_fresh_pipeline(folder, tmp_path, eager):
    module = module_on(folder, random_flip=True, snr_gamma=5.0, prediction_type="v_prediction")
    assert module.training_cut().draws == ("noise", "timestep_index", "flip_draw")
    before = state_dict(module.pipe.unet)
    logger = ModelLogger(tmp_path / "run", "pipe.unet.")
    launch_training_task(Accelerator(1, "pynative", DEVICE), pictures(), module, logger, learning_rate=3e-3,
                         num_epochs=None, batch_size=4, max_train_steps=8, save_steps=8)
    losses = [loss for _, loss in logger.losses]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    trained = state_dict(module.pipe.unet)
    assert all(not np.array_equal(before[name], trained[name]) for name in before), "every weight is trained"
    fresh = UnconditionalImagePipeline.from_pretrained(str(folder))
    first = fresh(seed=1, num_inference_steps=1, height=SIDE, width=SIDE)[0]
    fresh.load_weights(tmp_path / "run/step-8.safetensors")
    assert all(np.array_equal(value, trained[name]) for name, value in state_dict(fresh.unet).items())
    assert np.asarray(first).tobytes() != np.asarray(fresh(seed=1, num_inference_steps=1, height=SIDE,
                                                           width=SIDE)[0]).tobytes()


def test_weights_that_do_not_fit(folder, tmp_path):
    pipe = UnconditionalImagePipeline.from_pretrained(str(folder))
    with pytest.raises(WeightError, match="32 superfluous"):
        pipe.load_weights(_lora_file(folder, tmp_path))


def _lora_file(folder, tmp_path) -> Path:
    module = DiffusionTrainingModule()
    module.pipe = UnconditionalImagePipeline.from_pretrained(str(folder))
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="unet", lora_rank=2)
    module.save(tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"sampler": "ddpm"}], ids=["ddim", "ddim, eta 1", "ddpm"])
def test_pictures_depend_on_the_seed_and_not_on_the_batch(folder, eager, options):
    pipe = UnconditionalImagePipeline.from_pretrained(str(folder))

    def sample(batch_size, seed):
        found = pipe(batch_size=batch_size, seed=seed, num_inference_steps=3, height=SIDE, width=SIDE, **options)
        return [np.asarray(picture).astype(int) for picture in found]

    first, second = sample(2, 5)
    assert first.shape == (SIDE, SIDE, 3) and np.abs(first - second).max() > 50
    assert np.abs(first - sample(1, 5)[0]).max() <= 1 and np.abs(first - sample(1, 6)[0]).max() > 50


def test_the_size_and_the_number_of_steps_are_the_networks_and_the_samplers_own(folder, eager):
    pipe, steps = UnconditionalImagePipeline.from_pretrained(str(folder)), []
    pipe._sampling_step = lambda: lambda latents, index: steps.append(int(index.asnumpy()[0])) or (latents,)
    picture = pipe(seed=0)[0]
    assert picture.size == (32, 32) and len(steps) == 50 and steps[0] == 980 and steps[-1] == 0


@pytest.mark.parametrize("options, expected", [
    ({"sampler": "ddmp"}, "sampler='ddmp': expected one of ddim, ddpm. Did you mean 'ddpm'"),
    ({"eta": 2.0}, "eta=2.0 with sampler='ddim': expected 0 to 1"),
    ({"eta": 0.5, "sampler": "ddpm"}, "expected 0 to 1 for ddim, and 0 for ddpm"),
    ({"num_inference_steps": 2000}, "num_inference_steps=2000: expected 1 to 1000"),
    ({"height": 33}, "33 x 32 pixels"),
])
def test_what_cannot_be_sampled(folder, eager, options, expected):
    with pytest.raises(ConfigError, match=expected):
        UnconditionalImagePipeline.from_pretrained(str(folder))(**options)
