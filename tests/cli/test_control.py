"""Control images from the command line: ControlNets trained in one stage and two, resumed and sampled from."""
from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from arrays import noise_image
from PIL import Image

TRAIN = ("train", "--dataset_base_path", "rows", "--dataset_metadata_path", "rows/m.jsonl", "--extra_inputs",
         "control_image", "--max_sequence_length", 8, "--mode", "pynative", "--device", "CPU", "--batch_size", 2,
         "--num_epochs", 1, "--height", 32, "--width", 32)
NEW = ("--family", "flux", "--controlnet", "new", "--controlnet_layers", 1, "--controlnet_single_layers", 1,
       "--trainable_models", "controlnet", "--learning_rate", 1e-2)
SAMPLES = ("--sample_prompts", '["a cat", "a dog"]', "--num_inference_steps", 1)


@pytest.fixture
def rows(tmp_path):
    """Four rows with control images of several sizes, one of them with two."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for k in range(4):
        noise_image(32, 32, k).save(folder / f"{k}.png")
        noise_image(16 << k % 3, 16 << k % 3, k + 10).save(folder / f"c{k}.png")
    found = [{"image": f"{k}.png", "prompt": f"a cat {k}", "control_image": f"c{k}.png", "control_mask": f"c{k}.png"}
             for k in range(4)]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def losses(folder):
    with Path(folder, "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_new_controlnet_in_one_stage_and_two(run, rows, tiny_model):
    model = ("--model_paths", tiny_model("flux"))
    code, _, err = run(*TRAIN, *NEW, *model, *SAMPLES, "--output_path", "one")
    assert code == 0, err
    assert len(losses("one")) == 2 and Path("one/samples/before_after.png").is_file()
    index = json.loads(Path("one/model/model_index.json").read_text())
    assert index["controlnet"] == ["diffusers", "FluxControlNetModel"]
    assert index["_class_name"] == "FluxControlNetPipeline"
    code, _, err = run(*TRAIN, *NEW, *model, "--output_path", "two", "--cache_dir", "cache")
    assert code == 0 and losses("two") == losses("one"), err
    flags = ("--control_image", "rows/c2.png", "--num_inference_steps", 1, "--mode", "pynative", "--device", "CPU",
             "--height", 32, "--width", 32)
    code, out, err = run("sample", "--run", "one", *flags, "--output", "s")
    assert code == 0 and len(out.splitlines()) == 2, err
    code, again, err = run("sample", "flux", tiny_model("flux"), "--controlnet", "one/model/controlnet", "--prompt",
                           "a cat", "--max_sequence_length", 8, *flags, "--output", "t")
    assert code == 0, err
    with Image.open(out.splitlines()[0]) as first, Image.open(again.splitlines()[0]) as second:
        assert first.tobytes() == second.tobytes() and "ControlNet: controlnet" in second.info["parameters"]
    code, _, err = run(*TRAIN, *NEW, *model, "--output_path", "one", "--resume", "auto", "--num_epochs", 2)
    assert code == 0 and len(losses("one")) == 4, err


@pytest.mark.slow
@pytest.mark.parametrize("name, variant, extra", [
    ("flux", "fill", "control_mask"), ("qwen_image", "inpaint", "control_image,control_mask")])
def test_a_lora_with_holes_to_fill(run, rows, name, variant, extra):
    assert run("tiny", name, "model", "--variant", variant)[0] == 0
    train = (*TRAIN[:TRAIN.index("--max_sequence_length")], *TRAIN[TRAIN.index("--mode"):], "--family", name,
             "--model_paths", "model", "--lora_rank", 2, "--extra_inputs", extra)
    code, _, err = run(*train, *SAMPLES, "--output_path", "one")
    assert code == 0 and Path("one/samples/before_after.png").is_file(), err
    code, _, err = run(*train, "--output_path", "cache", "--task", "sft:data_process")
    assert code == 0, err
    code, _, err = run(*train, "--output_path", "two", "--task", "sft:train", "--dataset_base_path", "cache",
                       "--dataset_metadata_path", "null")
    assert code == 0 and losses("two") == losses("one"), err
    code, out, err = run("sample", "--run", "one", "--control_image", "rows/1.png", "--control_mask", "rows/c1.png",
                         "--num_inference_steps", 1, "--mode", "pynative", "--device", "CPU", "--output", "s")
    assert code == 0 and len(out.splitlines()) == 2, err


def test_a_control_image_of_other_proportions_is_named(run, rows, tiny_model):
    noise_image(32, 48, 9).save(rows / "c1.png")
    code, _, err = run(*TRAIN, *NEW, "--model_paths", tiny_model("flux"), "--output_path", "one")
    assert code == 65 and "control_image has 48 x 32 pixels and the image 32 x 32" in err, err


def test_two_masks_of_a_row_are_named(run, rows):
    assert run("tiny", "flux", "model", "--variant", "fill")[0] == 0
    row = {"image": "0.png", "prompt": "a cat", "control_mask": ["c1.png", "c2.png"]}
    (rows / "m.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = run(*TRAIN, "--family", "flux", "--model_paths", "model", "--extra_inputs", "control_mask",
                       "--lora_rank", 2, "--output_path", "one")
    assert code == 65 and "control_mask is a list of 2; expected the name of one mask" in err, err


MISTAKES = {
    "a controlnet without input": (("--controlnet", "new"), "controlnet would not be used: set extra_inputs=control_"),
    "layers of a known one": (("--controlnet", "net", "--controlnet_layers", 2, "--extra_inputs", "control_image"),
                              "controlnet_layers would not be used: they are of a new ControlNet"),
    "a mode without input": (("--control_mode", 2), "control_mode would not be used"),
    "class images": (("--extra_inputs", "control_image", "--task", "dreambooth", "--with_prior_preservation", "true",
                      "--class_base_path", "."), "with_prior_preservation=true with control images"),
    "images for some prompts": (("--extra_inputs", "control_image", "--sample_control_images", "a.png,b.png",
                                 "--sample_prompts", '["a", "b", "c"]'), "sample_control_images names 2, sample_"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_settings_that_cannot_be_meant(run, config, name):
    words, says = MISTAKES[name]
    code, _, err = run("train", config, *words)
    assert code == 64 and says in err, err


@pytest.mark.parametrize("words, says", [
    (("--control_image", "absent.png"), "control_image=absent.png: no such file"),
    (("--control_mode", 2), "control_mode without control_image"),
    (("--control_range", 0, 0.5), "control_range without control_image"),
])
def test_flags_of_sample_that_cannot_be_meant(run, words, says, toy_model):
    code, _, err = run("sample", "toy", toy_model, "--prompt", "a", *words)
    assert code == 64 and says in err, err
