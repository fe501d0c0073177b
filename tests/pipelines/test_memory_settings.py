"""use_gradient_checkpointing, fp8_models and split training through whole runs of the tiny FLUX.1."""
from __future__ import annotations

import shutil

import numpy as np
import pytest
from device import DEVICE
from PIL import Image
from records import records

from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.errors import CacheError, ConfigError
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.registry import family
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.two_stage import launch_data_process_task, loaded_bytes, open_cache

ROWS = [{"image": Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), np.uint8)),
         "prompt": f"picture {k}"} for k in range(2)]


def module(folder, task="sft", name="flux", tokenizers=None, **how):
    made = DiffusionTrainingModule()
    made.pipe = family(name).pipeline.from_pretrained(str(folder), **(tokenizers or {}))
    made.pipe.max_sequence_length = 16
    made.switch_pipe_to_training_mode(made.pipe, task=task, **({"lora_base_model": "dit", "lora_rank": 2} | how))
    return made


def losses(folder, out, **how):
    made = module(folder, **how)
    launch_training_task(Accelerator(1, "pynative", DEVICE), ROWS, made, ModelLogger(out), learning_rate=1e-2,
                         max_train_steps=3, num_epochs=None)
    return [row["loss"] for row in records(out)], made


@pytest.mark.slow
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


def cache(path, folder, **how):
    return launch_data_process_task(Accelerator(1, "pynative", DEVICE), ROWS, module(folder, "sft:data_process", **how),
                                    ModelLogger(path))


def test_eight_bits_of_an_encoder_shape_the_cache(tiny_flux, tmp_path):
    models = cache(tmp_path, tiny_flux).manifest["fingerprint"]["models"]
    stored = cache(tmp_path, tiny_flux, fp8_models="text_encoder_2,dit").manifest["fingerprint"]["models"]
    assert [name for name in models if models[name] != stored[name]] == ["text_encoder_2"]


def test_a_cache_of_another_tokenizer_library_is_refused(tiny_flux, tmp_path, monkeypatch):
    """CLIP's tokens follow the version of ftfy, which no file of the model shows."""
    made = cache(tmp_path, tiny_flux)
    assert set(made.manifest["fingerprint"]["libraries"]) == {"ftfy", "sentencepiece", "transformers"}
    second = module(tiny_flux, "sft:train")
    open_cache(made.folder, second, second.training_cut())
    monkeypatch.setattr("ms_diffsynth.training.two_stage.version", lambda package: "1.0")
    with pytest.raises(CacheError, match=r"libraries\.ftfy: .*, expected \"1\.0\""):
        open_cache(made.folder, second, second.training_cut())


def test_stage_two_refuses_a_cache_of_another_tokenizer_or_family(tiny_flux, tmp_path):
    def is_refused(folder, says, **how):
        with pytest.raises(CacheError, match=says):
            launch_training_task(Accelerator(1, "pynative", DEVICE), UnifiedDataset(str(folder)),
                                 module(tiny_flux, "sft:train", **how), ModelLogger(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    made = cache(tmp_path / "cache", tiny_flux)
    shipped = {c.name: c.default_folder for c in family("flux").pipeline.components if c.default_folder}
    tokenizers = {f"{name}_config": ModelConfig(str(shutil.copytree(folder, tmp_path / name)))
                  for name, folder in shipped.items()}
    same = module(tiny_flux, "sft:train", tokenizers=tokenizers)
    assert open_cache(made.folder, same, same.training_cut())[0].rows == len(ROWS)
    for name in shipped:
        with open(tmp_path / name / "special_tokens_map.json", "a") as file:
            file.write("\n")
        is_refused(made.folder, rf"configuration: models\.{name}: .*expected", tokenizers=tokenizers)
        tokenizers.pop(f"{name}_config")
    family("toy").write_tiny(tmp_path / "toy", 0)
    toy = cache(tmp_path / "cache of toy", tmp_path / "toy", name="toy")
    is_refused(toy.folder, 'pipeline: "ToyImagePipeline", expected "FluxImagePipeline"')


@pytest.mark.parametrize("how, says", [
    ({"fp8_models": "dti"}, "fp8_models: 'dti' is not a model of FluxImagePipeline"),
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
    assert made.pipe.store.weight_changes == {"text_encoder_2": ["8 bits"]}
