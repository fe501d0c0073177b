"""Nothing slow before a mistake is found: no model is loaded, no row prepared and no file written."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ms_diffsynth import models
from ms_diffsynth.training import prepared

TRAIN = ("--mode", "pynative", "--sample_prompts", "[]", "--lora_rank", 2)


@pytest.fixture
def nothing_slow(monkeypatch):
    """Fails when a model is loaded or a row prepared."""
    def refuse(what):
        return lambda *arguments, **options: pytest.fail(f"{what} before the mistake was found")

    monkeypatch.setattr(models.ModelStore, "get", refuse("a model was loaded"))
    monkeypatch.setattr(prepared, "prepare_row", refuse("a row was prepared"))


def by_epochs(*words):
    """Three images in batches of two: two steps an epoch."""
    return ("--max_train_steps", "null", "--num_epochs", 3, *words)


MISTAKES = {
    "a schedule as long as its warm-up": (by_epochs("--lr_scheduler", "cosine", "--lr_warmup_steps", 6), 64,
                                          "total steps=6: expected more than lr_warmup_steps=6 for lr_scheduler"),
    "a warm-up longer than the epochs": (by_epochs("--lr_warmup_steps", 7), 64,
                                         "lr_warmup_steps=7: expected at most the 6 steps of the run"),
    "with accumulation": (by_epochs("--lr_scheduler", "linear", "--lr_warmup_steps", 3, "--gradient_accumulation_steps",
                                    2), 64, "total steps=3: expected more than lr_warmup_steps=3"),
    "with a larger batch": (by_epochs("--batch_size", 3, "--lr_warmup_steps", 4), 64, "at most the 3 steps of the run"),
    "an epsilon that is 0 in float32": (("--adam_epsilon", 1e-320), 64, "eps"),
    "an optimizer's own argument": (("--optimizer", "adafactor", "--optimizer_args", "decay_rate=2"), 64,
                                    "decay_rate=2"),
    "a column that is no file": (("--data_file_keys", "prompt"), 65, ""),
    "an output folder that is empty": (("--output_path", ""), 64, "output_path is empty"),
    "an output folder below a file": (("--output_path", "toy.yaml/out"), 74, "toy.yaml/out cannot be written"),
    "a cache that is empty": (("--cache_dir", ""), 64, "cache_dir is empty"),
    "a cache below a file": (("--cache_dir", "toy.yaml/cache"), 74, "toy.yaml/cache cannot be written"),
    "a LoRA that is not there": (("--lora_checkpoint", "absent.safetensors"), 66, "absent.safetensors does not exist"),
    "a sampler of another family": (("--sampler", "ddim"), 64, "sampler='ddim': expected one of"),
    "references of samples that are not there": (("--sample_edit_images", "absent.png"), 64, "sample_edit_images: "
                                                 "absent.png does not exist. Put the file there, or correct its name."),
    "one of two control images": (("--sample_control_images", "toy.yaml;absent.png"), 64,
                                  "2 files of sample images cannot be used:\n  sample_control_images: toy.yaml is not"),
    "template inputs that are no JSON": (("--template_model_id_or_path", ".", "--extra_inputs", "template_inputs",
                                          "--sample_template_inputs", "scale=1"), 64, "expected a JSON object"),
    "a template that is not there": (("--template_model_id_or_path", "absent", "--extra_inputs", "template_inputs"), 64,
                                     "'absent' is neither a path that exists nor a model"),
    "samples without a prompt": (("--sample_steps", 2), 64, "sample_steps=2 without sample_prompts"),
    "real images that are not there": (("--sample_prompts", "a", "--evaluation_steps", 2, "--evaluation_reference",
                                        "absent"), 65, "absent"),
    "a further input of other models": (("--extra_inputs", "edit_image"), 64, "extra_inputs names 'edit_image': this "
                                        "model takes no such input; expected some of template_inputs. Models that take "
                                        "edit_image: FLUX.1-Kontext, FLUX.2 and Qwen-Image-Edit.\n"),
    "held-out images that are not there": (("--validation_steps", 2, "--validation_base_path", "absent"), 65, "absent"),
    "a checkpoint that is not there": (("--resume", "absent"), 78, "there is no such folder"),
    "no token": (("--push_to_hub", "true", "--hub_model_id", "me/it"), 69, "there is no token"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("nothing_slow")
def test_a_mistake_is_found_before_anything_slow(run, config, monkeypatch, name):
    words, code, says = MISTAKES[name]
    for variable in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    found, _, err = run("train", config, *TRAIN, *words)
    assert (found, says in err) == (code, True), err
    assert not Path("out").exists() and not Path("cache").exists()


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize("rows, words, says", [
    ([{"image": ["a.png", "a.png"], "prompt": "a"}], (), "is a list; expected the name of one file"),
    ([{"image": "a.png", "prompt": "a"}], ("--task", "direct_distill"), "no seed, which task=direct_distill reads"),
    ([{"image": "a.png"}], (), "no column prompt"),
], ids=["a list", "a task's column", "no prompt"])
def test_columns_that_do_not_fit_are_found_before_anything_slow(run, config, tmp_path, rows, words, says):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16)).save("data/a.png")
    Path("data/metadata.json").write_text(json.dumps(rows))
    code, _, err = run("train", config, *TRAIN, "--dataset_base_path", "data", "--dataset_metadata_path",
                       "data/metadata.json", *words)
    assert code == 65 and says in err and not Path("out").exists(), err


def test_class_images_of_another_shape_are_found_before_anything_slow(run, config, tmp_path, nothing_slow):
    Path("class").mkdir()
    Image.new("RGB", (16, 32)).save("class/a.png")
    code, _, err = run("train", config, *TRAIN, "--task", "dreambooth", "--with_prior_preservation", "true",
                       "--class_base_path", "class", "--class_prompt", "a thing", "--height", "null", "--width", "null",
                       "--max_pixels", 1024, "--buckets", 3)
    assert code == 65 and "the class data set has no image of bucket" in err, err


def test_the_checkpoint_of_another_family_is_found_before_anything_slow(run, config, tiny_model, monkeypatch):
    assert run("train", config, *TRAIN, "--max_train_steps", 1, "--save_steps", 1)[0] == 0
    path = next(Path("out/checkpoints").glob("step-*"))
    monkeypatch.setattr(models.ModelStore, "get", lambda *a: pytest.fail("a model was loaded"))
    for resume in ("auto", path):
        code, _, err = run("train", config, *TRAIN, "--family", "flux", "--model_paths", tiny_model("flux"), "--resume",
                           resume)
        assert code == 78 and "saved by another run" in err and "ToyImagePipeline" in err, err


@pytest.mark.parametrize("words", [
    ("sample", "toy", "MODEL", "--prompt", "a", "--output", ""), ("sample", "toy", "", "--prompt", "a"),
    ("tiny", "toy", ""),
    ("cache", "inspect", " "), ("push", "", "me/it"), ("evaluate", "--generated", "", "--reference", "x"),
    ("launch", "--workers", "2", "--log_dir", "", "train")], ids=" ".join)
def test_the_empty_name_of_a_folder_is_no_folder(run, toy_model, tmp_path, words):
    code, _, err = run(*(toy_model if word == "MODEL" else word for word in words))
    assert code == 64 and "is empty: expected the name of a file or folder" in err, err
    assert not list(tmp_path.iterdir())


# -- a run that is done ----------------------------------------------------------------------------------------------


def test_a_run_with_nothing_left_to_do_says_so(run, config):
    assert run("train", config, *TRAIN, *by_epochs("--num_epochs", 1))[0] == 0
    def content():
        return {path: path.read_bytes() for path in Path("out").rglob("[!.]*") if path.is_file()}

    before = content()
    code, _, err = run("train", config, *TRAIN, *by_epochs("--num_epochs", 1), "--resume", "auto")
    assert code == 0 and "nothing left to do: the run has 2 of 2 steps" in err and "num_epochs" in err, err
    assert content() == before


def test_epochs_that_are_done_stay_done_with_another_batch_size(run, config):
    """Two epochs of three images one by one, then one epoch in batches of three; also from within an epoch."""
    assert run("train", config, *TRAIN, *by_epochs("--num_epochs", 2, "--batch_size", 1))[0] == 0
    shutil.copytree("out", "whole")
    more = ("--resume", "auto", "--accept_changes", "batch_size")
    code, _, err = run("train", config, *TRAIN, *by_epochs("--num_epochs", 3, "--batch_size", 3), *more)
    assert code == 0 and "trained 7 steps" in err, err
    code, _, err = run("train", config, *TRAIN, *by_epochs("--num_epochs", 2, "--batch_size", 3), *more[:2],
                       "--output_path", "whole", "--accept_changes", "batch_size")
    assert code == 0 and "nothing left to do: the run has 6 of 6 steps" in err, err
    assert run("train", config, *TRAIN, "--max_train_steps", 2, "--num_epochs", 2, "--batch_size", 1, "--output_path",
               "part")[0] == 0
    code, _, err = run("train", config, *TRAIN, *by_epochs("--num_epochs", 2, "--batch_size", 2), *more,
                       "--output_path", "part")
    assert code == 0 and "trained 5 steps" in err, f"one batch of the first epoch is left, and two: {err}"


