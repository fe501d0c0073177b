"""``ms-diffsynth sample``."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from hub_server import HubServer, only_this_machine
from PIL import Image

from ms_diffsynth import Accelerator, DiffusionTrainingModule, ModelLogger, __version__, launch_training_task
from ms_diffsynth.formats.lora import save_lora
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.registry import family

SMALL = ("--height", 16, "--width", 24, "--num_inference_steps", 2)


def picture(path):
    return np.asarray(Image.open(path))


def lora(path, **modules):
    """A LoRA file with the given (in, out) sizes."""
    draw = np.random.default_rng(0).standard_normal
    save_lora(path, {name: (draw((2, i)).astype(np.float32), draw((o, 2)).astype(np.float32))
                     for name, (i, o) in modules.items()}, alpha=2)
    return path


def test_a_model_of_a_hub_without_what_sampling_does_not_read(run, tiny_model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    folder = tiny_model("flux")
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with HubServer() as hub:
        hub.add("me/own", files | {"flux1-all-in-one.safetensors": b"24 GB", "transformer/notes.bin": b"x"})
        only_this_machine(monkeypatch)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
                            f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        words = ("--prompt", "a", "--max_sequence_length", 16, *SMALL[:-2], "--num_inference_steps", 1,
                 "--mode", "pynative")
        assert run("sample", "me/own", *words, "--output", "hub")[0] == 0
        assert set(hub.downloads()) == {name for name in files if name != "README.md"}
        assert run("sample", "flux", folder, *words, "--output", "folder")[0] == 0
        assert np.array_equal(picture("hub/000-seed0.png"), picture("folder/000-seed0.png"))
        hub.status = 503  # what is here serves
        assert run("sample", "me/own", *words, "--output", "again")[0] == 0
        assert np.array_equal(picture("again/000-seed0.png"), picture("folder/000-seed0.png"))
        code, _, err = run("sample", "me/other", *words)
        assert code == 69 and "me/other" in err and not Path("samples").exists()


def test_one_picture_a_prompt_the_same_every_time(run, toy_model):
    words = ("sample", "toy", toy_model, "--prompt", "a", "--prompt", "b", "--seed", 5, *SMALL)
    code, out, _ = run(*words)
    assert code == 0 and out.splitlines() == ["samples/000-seed5.png", "samples/001-seed6.png"]
    assert picture("samples/000-seed5.png").shape == (16, 24, 3)
    assert run(*words, "--output", "again", "--mode", "pynative")[0] == 0
    difference = picture("samples/001-seed6.png").astype(int) - picture("again/001-seed6.png")
    assert np.abs(difference).max() <= 1  # graph and eager round to the same byte, or the next one


def test_a_lora_changes_the_picture_by_its_scale(run, tmp_path, toy_model):
    path = lora(tmp_path / "l.safetensors", layer_1=(16, 16))
    words = ("sample", "toy", toy_model, "--prompt", "a", *SMALL, "--mode", "pynative", "--output")
    assert run(*words, "none")[0] == 0
    code, _, err = run(*words, "one", "--lora", path)
    assert code == 0 and f"{path}: fused into 1 layers" in err
    assert run(*words, "zero", "--lora", path, "--lora_scale", 0)[0] == 0
    none, one, zero = (picture(f"{name}/000-seed0.png") for name in ("none", "one", "zero"))
    assert (none == zero).all() and (none != one).any()


def test_8_bits_change_the_picture_a_little_and_are_in_the_png(run, toy_model):
    words = ("sample", "toy", toy_model, "--prompt", "a", *SMALL, "--mode", "pynative", "--output")
    assert run(*words, "whole")[0] == run(*words, "stored", "--fp8_models", "dit")[0] == 0
    code, _, err = run(*words, "stored", "--fp8_models", "dti")
    assert code == 64 and "Did you mean 'dit'?" in err
    whole, stored = (picture(f"{name}/000-seed0.png").astype(int) for name in ("whole", "stored"))
    assert 0 < np.abs(whole - stored).max() < 40
    assert "8 bits: dit" in Image.open("stored/000-seed0.png").text["parameters"]


def test_a_run_is_sampled_as_its_own_sample_images_are(run, config):
    entries = '["a red square", {"prompt": "a blue square", "cfg_scale": 3, "height": 32, "width": 16}]'
    assert run("train", config, "--sample_prompts", entries, "--sample_negative_prompt", "a ball", "--sample_cfg_scale",
               "2", "--max_train_steps", "1", "--save_steps", "1")[0] == 0
    assert run("sample", "--run", "out", "--num_inference_steps", 2, "--mode", "pynative")[0] == 0
    one, two = (Image.open(f"samples/00{k}-seed{k}.png") for k in (0, 1))
    assert "Negative prompt: a ball" in one.text["parameters"] and "CFG scale: 2.0" in one.text["parameters"]
    assert two.size == (16, 32) and "CFG scale: 3.0" in two.text["parameters"]


@pytest.mark.parametrize("words, code, expected", [
    (["--num_inference_steps", 0], 64, "num_inference_steps=0: expected 1 <= num_inference_steps <= 1000"),
    (["--height", 0, "--seed", -1], 64, "height=0: expected 1 <= height <= 16384; seed=-1: expected 0 <= seed"),
    (["--mode", "grahp"], 64, "mode='grahp': expected one of graph, pynative. Did you mean 'graph'?"),
    (["--device", "GPU"], 64, "device='GPU': expected one of CPU, Ascend."),
    (["--lora", "absent.safetensors"], 64, "lora=absent.safetensors: no such file."),
    (["--max_sequence_length", 8], 64, "max_sequence_length=8: prompts of the family toy have one fixed length."),
    (["--output", "taken"], 74, "output=taken is a file"),
    (["--input_image", "absent.png"], 64, "input_image=absent.png: no such file."),
    (["--denoising_strength", 0.5], 64, "denoising_strength without input_image"),
    (["--input_image", "red.png", "--denoising_strength", 0], 64, "denoising_strength=0.0: expected a number above 0"),
    (["--input_image", "red.png", "--denoising_strength", 2], 64, "denoising_strength=2.0: expected"),
    (["--input_image", "taken"], 65, "taken"),
    (["--tiled", "--tile_size", 0], 64, "tile_size=0: expected a positive integer"),
    (["--tiled", "--tile_size", 8, "--tile_stride", 9], 64, "tile_stride=9: expected at most tile_size=8"),
    (["--tile_size", 8], 64, "tile_size without tiled: expected --tiled too"),
])
def test_bad_flags(run, toy_model, tmp_path, words, code, expected):
    (tmp_path / "taken").write_text("")
    Image.new("RGB", (24, 16), "red").save(tmp_path / "red.png")
    found, _, err = run("sample", "toy", toy_model, "--prompt", "a", *words)
    assert found == code and expected in err and not (tmp_path / "samples").exists()


@pytest.mark.parametrize("modules, expected", [
    ({"layer_3": (16, 16)}, "none of its 1 layers is a module of the model. It has layer_3; the mo"),
    ({"layer_1": (16, 20)}, "1 of 1 LoRA modules do not fit ToyTransformer: layer_1"),
])
def test_a_lora_that_does_not_fit(run, tmp_path, toy_model, modules, expected):
    path = lora(tmp_path / "l.safetensors", **modules)
    code, _, err = run("sample", "toy", toy_model, "--prompt", "a", "--lora", path)
    assert code == 66 and expected in err.replace("transformer.", "") and not (tmp_path / "samples").exists()


def test_a_model_that_is_not_there(run, tmp_path):
    code, _, err = run("sample", "toy", tmp_path / "absent", "--prompt", "a")
    assert code == 66 and "absent does not exist" in err


def test_a_family_without_prompts(run, tmp_path):
    assert run("tiny", "ddpm_unet", "ddpm")[0] == 0
    words = ("sample", "ddpm_unet", "ddpm", "--num_inference_steps", 2, "--mode", "pynative")
    code, out, _ = run(*words, "--count", 2, "--seed", 5)
    assert code == 0 and out.splitlines() == ["samples/000-seed5.png", "samples/001-seed5.png"]
    assert picture("samples/000-seed5.png").shape == (32, 32, 3)
    weights = next((tmp_path / "ddpm/unet").glob("*.safetensors"))
    changed = {name: array * np.float32(1.5) for name, array in load_state_dict(weights).items()}
    save_state_dict(tmp_path / "w.safetensors", changed)
    assert run(*words, "--count", 1, "--seed", 5, "--weights", "w.safetensors", "--output", "other")[0] == 0
    assert (picture("other/000-seed5.png") != picture("samples/000-seed5.png")).any()
    code, _, err = run(*words, "--prompt", "a cat")
    assert code == 64 and "prompt: the family ddpm_unet has no use for it. Remove it." in err


def test_weights_of_full_training_are_put_into_the_models_they_are_of(run, tmp_path, toy_model):
    """Of the network, and of a text encoder trained beside it; the image is that of the model that was trained."""
    pixels = {"image": Image.fromarray(np.full((32, 32, 3), 90, np.uint8)), "prompt": "a"}
    module = DiffusionTrainingModule()
    module.pipe = family("toy").pipeline.from_pretrained(str(toy_model))
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="dit,text_encoder.embedding")
    launch_training_task(Accelerator(1, "pynative", DEVICE), [pixels], module,
                         ModelLogger(tmp_path / "run", "pipe.dit."), learning_rate=0.1, max_train_steps=3, save_steps=3,
                         num_epochs=None)
    trained = module.pipe(prompt="a", height=32, width=32, seed=1, num_inference_steps=2)
    words = ("sample", "toy", toy_model, "--prompt", "a", "--seed", 1, "--num_inference_steps", 2, "--height", 32,
             "--width", 32, "--mode", "pynative")
    code, _, err = run(*words, "--weights", tmp_path / "run/step-3.safetensors")
    assert code == 0 and "6 tensors of dit, 1 tensors of text_encoder" in err
    assert np.array_equal(picture("samples/000-seed1.png"), np.asarray(trained))
    assert run(*words, "--output", "plain")[0] == 0
    assert (picture("plain/000-seed1.png") != picture("samples/000-seed1.png")).any()
    save_state_dict(tmp_path / "odd.safetensors", {"layer_9.weight": np.zeros((2, 2), np.float32)})
    code, _, err = run(*words, "--weights", tmp_path / "odd.safetensors", "--output", "none")
    assert code == 66 and "1 superfluous: layer_9.weight" in err and not Path("none").exists()


def test_a_family_with_prompts_wants_one(run, toy_model):
    code, _, err = run("sample", "toy", toy_model)
    assert code == 64 and "no prompt: images of the family toy follow one. Give --prompt." in err


def test_from_an_image(run, toy_model):
    """Less of it is made anew at a lower strength; its size is that of the image; tiles change nothing in toy's VAE."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)).save("own.png")
    words = ("sample", "toy", toy_model, "--prompt", "a", "--mode", "pynative", "--num_inference_steps", 4)
    names = {"half": ("--denoising_strength", 0.5), "all": (), "tiles": ("--denoising_strength", 0.5, "--tiled",
                                                                       "--tile_size", 4, "--tile_stride", 2)}
    for name, more in names.items():
        assert run(*words, "--input_image", "own.png", *more, "--output", name)[0] == 0
    half, everything, tiles = (picture(f"{name}/000-seed0.png").astype(int) for name in names)
    assert half.shape == everything.shape == (40, 24, 3) and (half != everything).any()
    assert np.abs(half - tiles).max() <= 1
    assert run(*words, "--height", 40, "--width", 24, "--output", "noise")[0] == 0
    assert np.array_equal(picture("noise/000-seed0.png"), everything)
    assert run(*words, "--input_image", "own.png", "--height", 16, "--output", "low")[0] == 0
    assert picture("low/000-seed0.png").shape == (16, 24, 3)


def test_a_family_that_starts_from_noise_alone(run, tmp_path):
    assert run("tiny", "ddpm_unet", "ddpm")[0] == 0
    Image.new("RGB", (32, 32)).save("own.png")
    code, _, err = run("sample", "ddpm_unet", "ddpm", "--input_image", "own.png", "--tiled")
    assert code == 64 and "input_image, tiled: the family ddpm_unet has no use for it. Remove it." in err


@pytest.mark.parametrize("how", [["--lora_rank", 2], ["--trainable_models", "dit"]])
@pytest.mark.few(1)
def test_a_run_is_sampled_with_what_it_saved_last(run, config, toy_model, how):
    assert run("train", config, "--max_train_steps", 4, "--save_steps", 2, "--mode", "pynative", "--learning_rate",
               "0.1", *how)[0] == 0
    words = (*SMALL, "--mode", "pynative", "--seed", 0)
    code, _, err = run("sample", "--run", "out", "--step", 2, *words, "--output", "earlier")
    assert code == 0 and "out/step-2.safetensors: " in err
    code, _, err = run("sample", "--run", "out", "--step", 3, *words, "--output", "absent")
    assert code == 64 and "step=3: out has saved weights of 2, 4." in err and not Path("absent").exists()
    code, out, err = run("sample", "--run", "out", *words, "--output", "of_run")
    assert code == 0 and "out/step-4.safetensors: " in err
    assert len(out.splitlines()) == 2  # the run's own sample_prompts
    file = ("--weights" if "--trainable_models" in how else "--lora", "out/step-4.safetensors")
    assert run("sample", "toy", toy_model, *words, "--prompt", "a red square", *file, "--output", "by_hand")[0] == 0
    assert run("sample", "toy", toy_model, *words, "--prompt", "a red square", "--output", "plain")[0] == 0
    of_run, by_hand, plain = (picture(f"{name}/000-seed0.png") for name in ("of_run", "by_hand", "plain"))
    assert (of_run == by_hand).all() and (of_run != plain).any()


@pytest.mark.parametrize("words, text", [
    (["--run", "nowhere"], "nowhere has no config.yaml"), (["--run", "out", "toy", "x"], "expected a run or a model"),
    (["--run", "out"], "has saved no weights yet"), ([], "no model: expected MODEL"),
    (["toy", "x", "--step", 2], "step=2 without --run"),
])
def test_runs_that_cannot_be_sampled(run, config, words, text):
    Path("out").mkdir()
    Path("out/config.yaml").write_text(config.read_text())
    code, _, err = run("sample", *words, "--prompt", "a")
    assert code == 64 and text in err


def test_several_loras_with_factors(run, tmp_path, toy_model):
    path = lora(tmp_path / "l.safetensors", layer_1=(16, 16))
    words = ("sample", "toy", toy_model, "--prompt", "a", *SMALL, "--mode", "pynative", "--output")
    code, _, err = run(*words, "twice", "--lora", f"{path}:0.25", "--lora", f"{path}:0.75")
    assert code == 0 and f"{path}: fused into 1 layers, 0.25 times" in err
    assert run(*words, "once", "--lora", path)[0] == 0
    assert run(*words, "gone", "--lora", f"{path}:0.5", "--lora", f"{path}:-0.5")[0] == 0
    assert run(*words, "none")[0] == 0
    names = ("twice", "once", "gone", "none")
    twice, once, gone, none = (picture(f"{name}/000-seed0.png").astype(int) for name in names)
    assert np.abs(twice - once).max() <= 1 and np.abs(gone - none).max() <= 1 and (once != none).any()
    assert run(*words, "named", "--lora", f"dit={path}:0.5", "--lora", f"dit={path}:-0.5")[0] == 0
    np.testing.assert_array_equal(picture("named/000-seed0.png"), gone)
    code, _, err = run(*words, "unknown", "--lora", f"dits={path}")
    assert code == 64 and "Did you mean 'dit'?" in err
    code, _, err = run(*words, "odd", "--lora", f"{path}:5000")
    assert code == 64 and "expected a factor from -1000 to 1000" in err


def test_nothing_is_overwritten_and_an_image_says_how_it_was_made(run, tmp_path, toy_model):
    (tmp_path / "deep").mkdir()
    path = lora(tmp_path / "deep" / "l.safetensors", layer_1=(16, 16))
    words = ("sample", "toy", toy_model, "--prompt", "猫 a cat, <red>", *SMALL, "--mode", "pynative")
    assert run(*words)[1] == "samples/000-seed0.png\n"
    before = Path("samples/000-seed0.png").read_bytes()
    again = (*words, "--negative_prompt", "b", "--cfg_scale", 2, "--lora", f"{path}:0.5", "--seed", 7)
    assert run(*again)[1] == "samples/001-seed7.png\n"
    assert Path("samples/000-seed0.png").read_bytes() == before
    told = Image.open("samples/001-seed7.png").text["parameters"]
    assert told.splitlines()[:2] == ["猫 a cat, <red>", "Negative prompt: b"]
    assert told.splitlines()[2] == (f"Steps: 2, Sampler: euler, CFG scale: 2.0, Seed: 7, Size: 24x16, Model: "
                                    f"{toy_model.name}, LoRA: l.safetensors:0.5, Version: ms_diffsynth {__version__}")
    assert str(tmp_path) not in told
    assert "CFG scale: 1.0, Seed: 0" in Image.open("samples/000-seed0.png").text["parameters"]  # the family's own
