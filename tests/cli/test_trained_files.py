"""What training saved is used: sampled, loaded, trained further; whole models, and LoRAs of any model."""
from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor, ops
from PIL import Image
from records import column

from ms_diffsynth import DiffusionTrainingModule, ModelConfig, runtime
from ms_diffsynth.cli.main import main
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import family, family_of
from ms_diffsynth.storage.files import Calls

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


@pytest.mark.parametrize("name", ["flux", pytest.param("flux2", marks=pytest.mark.slow)])
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", *(pytest.param(name, marks=pytest.mark.slow)
                                           for name in ("flux2", "qwen_image", "sd3", "z_image"))])
def test_a_run_of_a_whole_network_leaves_a_pipeline(name, train, tiny_model, tmp_path, capsys):
    """run/model is the base with the trained network; nothing else was copied. It is sampled, as the run itself is."""
    base = tiny_model(name)
    file = train(name, "run", "--trainable_models", "dit", "--learning_rate", "0.01", "--save_steps", "1",
                 "--ema_decay", "0.5", "--use_ema")
    model, trained = tmp_path / "run/model", load_state_dict(tmp_path / "run/step-2-ema.safetensors")
    index = json.loads((model / "model_index.json").read_text())
    assert index == json.loads((base / "model_index.json").read_text()) and family_of(model) == name
    before, after = load_state_dict(base / "transformer"), load_state_dict(model / "transformer")
    assert before.keys() == after.keys()
    assert all(np.array_equal(array, trained.get(key, before[key])) for key, array in after.items())
    assert any(not np.array_equal(array, before[key]) for key, array in trained.items())
    others = [path for folder in index if folder[0] != "_" and folder != "transformer"
              for path in (model / folder).glob("*.safetensors")]
    assert others and all(path.samefile(base / path.relative_to(model)) for path in others)
    of_model = sampled(name, model, tmp_path / "one")
    capsys.readouterr()
    how = ["--prompt", "a cat", "--height", "32", "--width", "32", "--num_inference_steps", "1", "--device", DEVICE]
    assert main(["sample", "--run", str(tmp_path / "run"), *how, "--output", str(tmp_path / "two")]) == 0
    assert "step-2-ema.safetensors" in capsys.readouterr().err
    of_run = np.asarray(Image.open(next((tmp_path / "two").glob("*.png"))), np.int32)
    weights = sampled(name, base, tmp_path / "three", "--weights", str(file.with_name("step-2-ema.safetensors")))
    assert (of_run == of_model).all() and (of_run == weights).all()


@pytest.mark.slow
def test_a_run_of_a_network_without_prompts_is_sampled(train, tiny_model, tmp_path):
    """By its own command, by the pipeline that it left, and by its weights."""
    file = train("ddpm_unet", "run", "--trainable_models", "unet", "--learning_rate", "0.01")
    words = ["--num_inference_steps", "2", "--seed", "3", *EAGER]
    base, found = str(tiny_model("ddpm_unet")), []
    for k, source in enumerate((["--run", str(tmp_path / "run")], ["ddpm_unet", str(tmp_path / "run")],
                                [base, "--weights", str(file)], [base])):
        assert main(["sample", *source, *words, "--output", str(tmp_path / str(k))]) == 0
        found.append(np.asarray(Image.open(tmp_path / str(k) / "000-seed3.png")))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all() and (found[0] != found[3]).any()


@pytest.mark.parametrize("how", ["linked", "another disk", "stored in 8 bits", "some files"])
def test_what_is_not_trained_is_written_once(how, tiny_model, tmp_path, monkeypatch, caplog):
    runtime.configure("pynative", DEVICE)
    base, out, copies = tiny_model("flux"), tmp_path / "model", []
    if how == "another disk":
        def refuse(source, path):
            copies.append(path)
            raise OSError(errno.EXDEV, "another disk")
        monkeypatch.setattr(Calls, "link", staticmethod(refuse))
    configs = [ModelConfig(str(base / "transformer"))] if how == "some files" else str(base)
    module = DiffusionTrainingModule()
    module.pipe = family("flux").pipeline.from_pretrained(configs)
    more = {"fp8_models": "text_encoder_2"} if how == "stored in 8 bits" else {}
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="dit.x_embedder", **more)
    for value in (1, 2):
        ops.assign(module.pipe.dit.x_embedder.bias, Tensor(np.full(module.pipe.dit.x_embedder.bias.shape, value),
                                                           module.pipe.dit.x_embedder.bias.dtype))
        module.save_models(tmp_path)
        assert (load_state_dict(out / "transformer")["x_embedder.bias"] == value).all()
    if how == "some files":
        assert [path.name for path in out.iterdir()] == ["transformer"]
        assert caplog.text.count("has transformer alone: no files of text_encoder, text_encoder_2, vae were given") == 1
        return
    assert len(copies) == (3 if how == "another disk" else 0)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        files = list((out / part).glob("*.safetensors"))
        assert files and all(path.samefile(base / part / path.name) != bool(copies) for path in files)
        assert all(path.read_bytes() == (base / part / path.name).read_bytes() for path in files)
    family("flux").pipeline.from_pretrained(str(out)).load_models_to_device(["vae", "text_encoder_1"])


@pytest.mark.slow
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
