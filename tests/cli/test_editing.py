"""Editing from the command line: rows with and without references trained, split, resumed and sampled."""
from __future__ import annotations

import argparse
import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from arrays import noise_image
from PIL import Image

from ms_diffsynth.cli import sample
from ms_diffsynth.config import load_config
from ms_diffsynth.formats.weights import save_state_dict
from ms_diffsynth.run.build import build_datasets
from ms_diffsynth.run.pipeline import build_pipeline
from ms_diffsynth.run.samples import sample_references

TRAIN = ("train", "--family", "flux", "--dataset_base_path", "pairs", "--dataset_metadata_path", "pairs/m.jsonl",
         "--extra_inputs", "edit_image", "--edit_max_pixels", 1024, "--max_sequence_length", 8, "--lora_rank", 2,
         "--mode", "pynative", "--device", "CPU", "--batch_size", 2, "--num_epochs", 1, "--height", 32, "--width", 32)
SAMPLES = ("--sample_prompts", '["make it red", "a cat"]', "--num_inference_steps", 1)


@pytest.fixture
def pairs(tmp_path):
    """Four rows with one reference, two without, two with two."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for k in range(4):
        noise_image(32, 32, k).save(folder / f"{k}.png")
        noise_image(64, 32, k + 10).save(folder / f"r{k}.png")
    edits = ["r0.png", None, ["r1.png", "2.png"], "r2.png", "r3.png", None, ["r2.png", "1.png"], "r1.png"]
    rows = [{"image": f"{k % 4}.png", "prompt": f"do {k}"} | ({"edit_image": given} if given else {})
            for k, given in enumerate(edits)]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def losses(folder):
    with Path(folder, "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_one_stage_and_two_with_samples_beside_their_references(run, pairs, tiny_model):
    model = ("--model_paths", tiny_model("flux"))
    code, _, err = run(*TRAIN, *model, *SAMPLES, "--output_path", "one")
    assert code == 0 and "6 of 8 rows have references; in one/pairs.png they are on the left" in err, err
    assert len(losses("one")) == 4 and Path("one/samples/before_after.png").is_file()
    code, _, err = run(*TRAIN, *model, "--output_path", "two", "--cache_dir", "cache")
    assert code == 0 and losses("two") == losses("one") and Path("two/pairs.png").is_file(), err
    code, out, err = run("sample", "--run", "one", "--edit_image", "pairs/r0.png", "--edit_image", "pairs/1.png",
                         "--num_inference_steps", 1, "--mode", "pynative", "--device", "CPU", "--output", "s")
    assert code == 0 and len(out.splitlines()) == 2, err
    with Image.open(out.splitlines()[0]) as image:  # of the run's size
        assert image.size == (32, 32) and "Edit images: r0.png; 1.png" in image.info["parameters"]
    code, out, err = run("sample", "--run", "one", "--num_inference_steps", 1, "--mode", "pynative", "--device", "CPU",
                         "--output", "s")
    assert code == 0 and len(out.splitlines()) == 2, err
    assert "one was trained with edit_image, and none is given: images are made without. Give --edit_image." in err


def of_run(*words):
    """What ``sample --run out`` is about to make: the arguments of each image, and all others."""
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    args = parser.parse_args(["--run", "out", *words])
    args.own = []
    sample._of_run(args)
    sample._check(args)
    return sample._calls(args), args


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The folder of a run of four images of references and control images."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "c.png", "m.png"):
        noise_image(32, 32).save(tmp_path / name)
    save_state_dict(tmp_path / "out/step-2.safetensors", {"x": np.zeros(1, np.float32)}, {"step": "2"})
    (tmp_path / "out/config.yaml").write_text("""
model: {family: flux, model_paths: m, lora_base_model: dit}
data: {dataset_base_path: ., extra_inputs: "edit_image", edit_max_pixels: 1024, height: 32, width: 48}
run: {max_train_steps: 2, sample_prompts: [one, two], output_path: out, sample_edit_images: ["a.png;b.png", c.png],
      sample_control_images: [c.png], sample_control_masks: [m.png]}
""")


def test_a_run_is_sampled_with_its_size_and_each_prompt_with_its_files(out):
    (one, two), args = of_run()
    assert one["edit_image"] == [Path("a.png"), Path("b.png")] and two["edit_image"] == [Path("c.png")]
    assert one["control_image"] == two["control_image"] == [Path("c.png")] and two["control_mask"] == Path("m.png")
    assert (one["height"], one["width"], args.edit_max_pixels) == (32, 48, 1024)


def test_settings_of_a_run_for_files_that_are_not_given_are_left_out(out, capsys):
    (call,), args = of_run("--prompt", "three", "--height", "64")
    assert not {"edit_image", "control_image", "control_mask"} & set(call) and call["height"] == 64
    assert args.edit_max_pixels is None
    assert "out was trained with edit_image, and none is given" in capsys.readouterr().err
    (call,), args = of_run("--prompt", "three", "--edit_image", "b.png")
    assert call["edit_image"] == [Path("b.png")] and args.edit_max_pixels == 1024


def test_the_rows_whose_references_samples_have_are_named(pairs, tiny_model, caplog):
    caplog.set_level(logging.INFO)
    config = load_config(None, family="flux", model_paths=str(tiny_model("flux")), dataset_base_path="pairs",
                         dataset_metadata_path="pairs/m.jsonl", extra_inputs="edit_image", sample_prompts=["a", "b"],
                         lora_base_model="dit", num_epochs=1)
    pipe = build_pipeline(config)
    pipe.use_input("edit_image")
    assert [len(images) for images in sample_references(config, pipe, build_datasets(config).instance)] == [1, 2]
    assert "have the references of the rows 0.png, 2.png; others are named by" in caplog.text


MISTAKES = {
    "folders without the input": (("--edit_folders", "before"), "edit_folders=before would not be used: set "
                                  "extra_inputs=edit_image."),
    "folders outside": (("--extra_inputs", "edit_image", "--edit_folders", "../before"),
                        "edit_folders has '../before': expected a folder inside dataset_base_path."),
    "folders and metadata": (("--extra_inputs", "edit_image", "--edit_folders", "before"),
                             "with dataset_metadata_path: remove one."),
    "a folder twice": (("--extra_inputs", "edit_image", "--edit_folders", "a,a/"), "names a folder twice"),
    "a limit without the input": (("--edit_max_pixels", 1024), "edit_max_pixels=1024 would not be used"),
    "class images": (("--extra_inputs", "edit_image", "--task", "dreambooth", "--with_prior_preservation", "true",
                      "--class_base_path", "."), "with_prior_preservation=true with edit_image: class images have no"),
    "references for some prompts": (("--extra_inputs", "edit_image", "--sample_edit_images", "a.png,b.png",
                                     "--sample_prompts", '["a", "b", "c"]'), "sample_edit_images names 2, sample_"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_settings_that_cannot_be_meant(run, config, name):
    words, says = MISTAKES[name]
    code, _, err = run("train", config, *words)
    assert code == 64 and says in err, err


@pytest.mark.parametrize("words, says", [
    (("--edit_image", "absent.png"), "edit_image=absent.png: no such file"),
    (("--edit_max_pixels", 1024), "edit_max_pixels without edit_image"),
    (("--edit_template", "second"), "edit_template=second: expected one of first, plus"),
    (("--controlnet", "canny"), "controlnet without control_image, which it is for: name the file"),
])
def test_flags_of_sample_that_cannot_be_meant(run, words, says, toy_model):
    code, _, err = run("sample", "toy", toy_model, "--prompt", "a", *words)
    assert code == 64 and says in err, err


def test_references_stand_side_by_side():
    from ms_diffsynth.data.images import side_by_side

    found = np.asarray(side_by_side([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (40, 40), "blue")], 32))
    assert found.shape == (32, 16 + 1 + 32, 3)
    np.testing.assert_array_equal(found[0, [0, 15, 16, 17, 48]],
                                  [(255, 0, 0), (255, 0, 0), (255, 255, 255), (0, 0, 255), (0, 0, 255)])
