"""Split training and ``ms-diffsynth cache`` on the command line."""
from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import environment

from ms_diffsynth import models
from ms_diffsynth.formats.weights import load_state_dict

QUIET = ("--sample_prompts", "[]")


def weights(folder):
    return load_state_dict(sorted(Path(folder).glob("*.safetensors"))[-1])


def equal(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_two_commands_and_one_give_what_a_single_stage_gives(run, config):
    assert run("train", config, *QUIET)[0] == 0
    code, out, err = run("train", config, "--task", "sft:data_process", "--output_path", "cache")
    assert code == 0 and out == "" and "3 rows, 3 prepared" in err and "training" not in err
    assert "loaded: text_encoder" in err
    assert sorted(p.name for p in Path("cache").iterdir()) == ["cache.json", "entries"]
    code, _, err = run("train", config, "--task", "sft:train", "--dataset_base_path", "cache", "--output_path", "two")
    assert code == 0 and "loaded: dit" in err
    assert "this stage does not need text_encoder, vae: not loaded" not in Path("two/config.yaml").read_text()
    code, _, err = run("train", config, "--cache_dir", "cache", "--output_path", "three", *QUIET)
    assert code == 0 and "0 prepared, 3 there already" in err
    assert equal(weights("out"), weights("two")) and equal(weights("out"), weights("three"))


OVERRIDES = ("--sample_prompts", '["a red square", {"prompt": "a blue square", "negative_prompt": "a ball", "seed": 9, '
             '"cfg_scale": 3, "num_inference_steps": 3}]', "--sample_cfg_scale", "2.5",
             "--sample_negative_prompt", "a circle")


@pytest.mark.slow
def test_sample_images_of_a_split_run_are_those_of_one_stage_and_need_no_encoder(run, config, monkeypatch):
    loads, load = [], models.load_component

    def noting(component, source, dtype, without=()):
        loads.append((component.name, tuple(without)))
        return load(component, source, dtype, without)

    monkeypatch.setattr(models, "load_component", noting)
    assert run("train", config, *OVERRIDES)[0] == 0
    loads.clear()
    assert run("train", config, *OVERRIDES, "--cache_dir", "cache", "--output_path", "split")[0] == 0
    assert sorted(loads) == [("dit", ()), ("text_encoder", ()), ("vae", ()), ("vae", ("encoder",))], "each once"
    loads.clear()
    code, _, err = run("train", config, *OVERRIDES, "--task", "sft:train", "--dataset_base_path", "cache",
                       "--output_path", "two")
    assert code == 0 and sorted(loads) == [("dit", ()), ("vae", ("encoder",))]
    assert "loaded: dit" in err and ", vae.decoder" in err and "text_encoder 0" not in err
    one, *others = (Path(folder) / "samples" for folder in ("out", "split", "two"))
    for name in ("step-0.png", "step-4.png", "before_after.png"):
        assert all((one / name).read_bytes() == (other / name).read_bytes() for other in others)
    assert np.asarray(Image.open(one / "step-0.png")).std() > 0

    code, out, _ = run("cache", "inspect", "cache")
    assert code == 0 and "sample prompts: 'a ball', 'a blue square', 'a circle', 'a red square'" in out
    assert run("cache", "prune", "cache")[1].startswith("0 entries")
    loads.clear()
    code, _, err = run("train", config, "--task", "sft:train", "--dataset_base_path", "cache", "--output_path", "three",
                       "--sample_prompts", '["a cube", "a red square"]')
    assert code == 78 and not loads and not Path("three").exists()
    assert "lacks the sample prompt 'a cube'" in err and "--sample_prompts '[]'" in err
    command = shlex.split(err[err.index("ms-diffsynth train CONFIG"):err.index("; or remove")])[1:]
    assert run(*(config if word == "CONFIG.yaml" else word for word in command))[0] == 0
    assert [name for name, _ in loads] == ["text_encoder"], "nothing else is missing"
    assert "'a blue square', 'a circle', 'a cube'" in run("cache", "inspect", "cache")[1], "the others are kept"


@pytest.mark.fault
def test_two_writers_at_once_agree(config, python):
    command = [sys.executable, "-m", "ms_diffsynth.cli.main", "train", str(config), "--task", "sft:data_process",
               "--output_path", "cache"]
    assert python("-c", "import ms_diffsynth").returncode == 0
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
               for _ in range(2)]
    for writer in writers:
        _, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
    assert len(list(Path("cache/entries").rglob("*.safetensors"))) == 3 + 3, "of rows and of their texts"
    found = python("-m", "ms_diffsynth.cli.main", "cache", "inspect", "cache")
    assert found.returncode == 0 and found.stdout.startswith("cache: complete")


def test_inspect_and_prune(run, config):
    assert run("train", config, "--task", "sft:data_process", "--output_path", "cache")[0] == 0
    code, out, err = run("cache", "inspect", "cache")
    assert code == 0 and err == "" and "instance: 3 rows" in out and "prompt_embeds: float32 [16, 16] (3)" in out
    assert "images: 16 x 16 (3)" in out and "models.vae: " in out and "not used" not in out
    flags = ("--task", "sft:data_process", "--output_path", "cache", "--height", 32, "--width", 32)
    assert run("train", config, *flags)[0] == 0
    assert "6 entries" in run("cache", "inspect", "cache")[1]
    assert run("cache", "prune", "cache")[1].startswith("6 entries removed")
    assert run("cache", "prune", "cache")[1].startswith("0 entries removed")
    entry = next(Path("cache/entries").rglob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-1])
    code, out, _ = run("cache", "inspect", "cache")
    assert code == 78 and out.startswith("cache: damaged") and "is damaged" in out
    entry.unlink()
    code, out, _ = run("cache", "inspect", "cache")
    assert code == 78 and "is missing" in out
    code, _, err = run("cache", "inspect", "nowhere")
    assert code == 78 and "there is no such folder" in err
