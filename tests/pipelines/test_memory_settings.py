"""use_gradient_checkpointing and fp8_models through a whole training run of the tiny FLUX.1."""
from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.registry import family
from ms_diffsynth.train.distributed import Accelerator
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.loop import launch_training_task
from ms_diffsynth.train.module import DiffusionTrainingModule
from ms_diffsynth.train.split import launch_data_process_task, loaded_bytes

ROWS = [{"image": Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), np.uint8)),
         "prompt": f"picture {k}"} for k in range(2)]


@pytest.fixture(autouse=True, scope="module")
def runtime_restored():
    yield
    runtime.configure("graph", "CPU")


def module(folder, task="sft", **how):
    made = DiffusionTrainingModule()
    made.pipe = family("flux").pipeline.from_pretrained(str(folder))
    made.pipe.max_sequence_length = 16
    made.switch_pipe_to_training_mode(made.pipe, task=task, **({"lora_base_model": "dit", "lora_rank": 2} | how))
    return made


def losses(folder, out, **how):
    made = module(folder, **how)
    launch_training_task(Accelerator(1, "pynative", "CPU"), ROWS, made, ModelLogger(out), learning_rate=1e-2,
                         max_train_steps=3, num_epochs=None)
    with open(out / "loss.csv", newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)], made


def test_recompute_changes_no_bit_and_eight_bits_little(tiny_flux, tmp_path):
    plain, _ = losses(tiny_flux, tmp_path / "plain")
    again, made = losses(tiny_flux, tmp_path / "again", use_gradient_checkpointing=True)
    assert again == plain and all(block.is_recomputed for block in made.pipe.dit.transformer_blocks)
    offloaded, _ = losses(tiny_flux, tmp_path / "offload", use_gradient_checkpointing_offload=True)
    assert offloaded == plain
    stored, made = losses(tiny_flux, tmp_path / "stored", fp8_models="dit")
    one, other = np.array(plain, float), np.array(stored, float)
    assert not np.array_equal(one, other) and np.abs(one - other).max() < 0.01 * np.abs(one).max()
    full = sum(p.size * p.itemsize for p in module(tiny_flux).pipe.dit.get_parameters())
    assert loaded_bytes(made.pipe)["dit"] < 0.5 * full


def test_eight_bits_of_an_encoder_shape_the_cache(tiny_flux, tmp_path):
    def cache(**how):
        return launch_data_process_task(Accelerator(1, "pynative", "CPU"), ROWS,
                                        module(tiny_flux, "sft:data_process", **how), ModelLogger(tmp_path / "cache"))

    models = cache().manifest["fingerprint"]["models"]
    stored = cache(fp8_models="text_encoder_2,dit").manifest["fingerprint"]["models"]
    assert [name for name in models if models[name] != stored[name]] == ["text_encoder_2"]


@pytest.mark.parametrize("how, says", [
    ({"fp8_models": "dti"}, "fp8_models: 'dti' is no model of FluxImagePipeline"),
    ({"fp8_models": "dit", "lora_base_model": None, "trainable_models": "dit"}, "is trained"),
])
def test_what_cannot_be_stored_is_refused(tiny_flux, how, says):
    with pytest.raises(ConfigError, match=says):
        module(tiny_flux, **how)


def test_a_model_may_be_named_by_its_files(tiny_flux):
    made = module(tiny_flux)
    made.pipe.given_as["black-forest-labs/FLUX.1-dev:text_encoder_2/*.safetensors"] = "text_encoder_2"
    made.switch_pipe_to_training_mode(made.pipe, lora_base_model="dit", task="sft:data_process",
                                      fp8_models="black-forest-labs/FLUX.1-dev:text_encoder_2/*.safetensors")
    assert made.pipe.weight_changes == {"text_encoder_2": ["8 bits"]}
