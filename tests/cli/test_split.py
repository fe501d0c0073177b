"""Split training and ``ms-diffsynth cache`` on the command line."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import environment

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
    assert code == 0 and "loaded: dit" in err and err.count("sample images need the models") == 1
    assert "this stage does not need text_encoder, vae: not loaded" not in Path("two/config.yaml").read_text()
    code, _, err = run("train", config, "--cache_dir", "cache", "--output_path", "three", *QUIET)
    assert code == 0 and "0 prepared, 3 there already" in err
    assert equal(weights("out"), weights("two")) and equal(weights("out"), weights("three"))


def test_pictures_sampled_after_a_split_run_are_the_same(run, config):
    assert run("train", config)[0] == run("train", config, "--cache_dir", "cache", "--output_path", "split")[0] == 0
    for name in ("step-0.png", "step-4.png"):
        one, two = (np.asarray(Image.open(f"{folder}/samples/{name}")) for folder in ("out", "split"))
        assert np.array_equal(one, two)


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
