"""What training saved is used: sampled, loaded, trained further; whole models, and LoRAs of any model."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from PIL import Image
from records import column

from ms_diffsynth.cli.main import main
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import family

EAGER = ["--device", DEVICE, "--mode", "pynative"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data/cat.png")
    (tmp_path / "data/cat.txt").write_text("a cat")
    return tmp_path / "data"


@pytest.fixture
def train(data, tmp_path, tiny_model):
    """``train(family, name, *flags)`` -> the file of two steps in the folder ``name``."""
    def run(name, out, *flags):
        model = str(tiny_model(name))
        code = main(["train", "--family", name, "--model_paths", model, "--dataset_base_path", str(data),
                     "--height", "32", "--width", "32", "--max_train_steps", "2", "--save_steps", "2",
                     "--output_path", str(tmp_path / out), *EAGER, *flags])
        assert code == 0
        return tmp_path / out / "step-2.safetensors"
    return run


def sampled(name, folder, output, *flags):
    assert main(["sample", name, str(folder), "--prompt", "a cat", "--height", "32", "--width", "32", "--output",
                 str(output), "--num_inference_steps", "1", "--device", DEVICE, *flags]) == 0
    return np.asarray(Image.open(next(Path(output).glob("*.png"))), np.int32)


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_a_lora_of_a_text_encoder_is_used_where_it_was_saved(name, train, tiny_model, tmp_path):
    model = "text_encoder_1" if name == "flux" else "text_encoder"
    how = ["--lora_base_model", model, "--lora_target_modules", "q_proj,k_proj,v_proj", "--learning_rate", "0.05"]
    file = train(name, "first", *how)
    assert all(key.startswith("text_encoder.") for key in load_state_dict(file))
    again = train(name, "again", *how, "--lora_checkpoint", str(file))
    assert column(tmp_path / "again")[0] != column(tmp_path / "first")[0]  # it began where the first one ended
    assert load_state_dict(again).keys() == load_state_dict(file).keys()
    plain = sampled(name, tiny_model(name), tmp_path / "plain")
    assert np.abs(sampled(name, tiny_model(name), tmp_path / "with", "--lora", str(file)) - plain).max() > 0
    pipe = family(name).pipeline.from_pretrained(str(tiny_model(name)))
    count = len(load_state_dict(file)) // 2
    assert pipe.load_lora(getattr(pipe, model), file) == count
    with pytest.raises(WeightError, match="holds no LoRA"):
        pipe.load_lora(pipe.dit, file)


def test_a_file_of_several_models_goes_into_each(train, tiny_model, tmp_path):
    one = load_state_dict(train("flux", "dit", "--lora_rank", "2"))
    two = load_state_dict(train("flux", "text", "--lora_base_model", "text_encoder_1", "--lora_rank", "2",
                                "--lora_target_modules", "q_proj"))
    save_state_dict(tmp_path / "both.safetensors", one | two)
    pipe = family("flux").pipeline.from_pretrained(str(tiny_model("flux")))
    before = {model: state_dict(getattr(pipe, model)) for model in ("dit", "text_encoder_1")}
    assert pipe.load_lora(None, tmp_path / "both.safetensors") == len(one | two) // 2
    for model, weights in before.items():
        now = state_dict(getattr(pipe, model))
        assert any(not np.array_equal(now[name], array) for name, array in weights.items())
    save_state_dict(tmp_path / "odd.safetensors", one | {f"{key}.x": array for key, array in two.items()})
    with pytest.raises(WeightError, match="is not part of a LoRA"):
        pipe.load_lora(None, tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name, models", [("flux", "dit"), ("flux", "dit,text_encoder_1"), ("toy", "text_encoder")])
def test_a_full_fine_tune_is_trained_further(name, models, train, tiny_model, tmp_path):
    file = train(name, "first", "--trainable_models", models, "--learning_rate", "0.01")
    saved = load_state_dict(file)
    pipe = family(name).pipeline.from_pretrained(str(tiny_model(name)))
    pipe.load_weights(file, is_lazy=True)
    assert not set(models.split(",")) & set(pipe.models)  # nothing is loaded for it
    for model in models.split(","):
        now = state_dict(getattr(pipe, model))
        pipe.unload_models([model])
        again = state_dict(getattr(pipe, model))
        wanted = {n.removeprefix(f"pipe.{model}."): a for n, a in saved.items()
                  if n.startswith(f"pipe.{model}.") or (model == "dit" and not n.startswith("pipe."))}
        assert all(np.array_equal(now[n], a) and np.array_equal(again[n], a) for n, a in wanted.items())
    cached = ["--cache_dir", str(tmp_path / "cache")]
    runs = [train(name, kind, "--trainable_models", models, "--weights", str(file), *flags)
            for kind, flags in (("second", []), ("cached", cached if models == "dit" else []))]
    one, two = map(load_state_dict, runs)
    assert one.keys() == two.keys() == saved.keys() and all(np.array_equal(one[n], two[n]) for n in one)
    assert any(not np.array_equal(one[n], saved[n]) for n in one)
    assert column(tmp_path / "second")[0] != column(tmp_path / "first")[0]
    assert sampled(name, tiny_model(name), tmp_path / "images", "--weights", str(file)).shape == (32, 32, 3)
    assert main(["train", "--family", name, "--model_paths", str(tiny_model(name)), "--dataset_base_path",
                 str(tmp_path / "data"), "--max_train_steps", "1", "--output_path", str(tmp_path / "other"), *EAGER,
                 "--weights", str(tmp_path / "absent.safetensors")]) == 66
