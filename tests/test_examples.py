"""The examples load, run, and say what they do."""
from __future__ import annotations

import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from ms_diffsynth.cli.main import main
from ms_diffsynth.config import load_config
from ms_diffsynth.data import Clips, UnifiedDataset
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.registry import family
from ms_diffsynth.run.task import train

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").rglob("*.yaml"))
SHORT = sorted((ROOT / "examples").glob("*/train.py"))
SCRIPT = ROOT / "examples/train.py"
CAT = ROOT / "examples/data/dreambooth_cat_fluent"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_loads_and_names_its_command_and_data(path):
    config, text = load_config(path), path.read_text()
    assert f"ms-diffsynth train {path.relative_to(ROOT)}" in text
    makers = ("make_images.py", "make.py", "data/smileys64")
    is_made = any(f"{name} {config.data.dataset_base_path}\n" in text for name in makers)
    assert is_made or (ROOT / (config.data.dataset_metadata_path or config.data.dataset_base_path)).exists()
    assert config.data.class_base_path is None or (ROOT / config.data.class_base_path).is_dir()
    assert family(config.model.family)


WRITTEN = [path for path in FILES if path.stem.endswith("_910b") and "Written by: " in path.read_text()]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_files_for_an_ascend_are_what_init_writes(path, tmp_path):
    """What fits which device is tested in tests/cli/test_init.py."""
    (tmp_path / "examples/flux2").mkdir(parents=True)
    for name in ("data", "flux2/model_training"):
        (tmp_path / "examples" / name).symlink_to(ROOT / "examples" / name)
    head = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert main(shlex.split(re.search("Written by: ms-diffsynth (.*?) Memory: ", head)[1])) == 0
    assert Path(path.relative_to(ROOT)).read_text() == path.read_text()


@pytest.mark.parametrize("path", SHORT, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_short_script_says_what_is_special_about_its_family(path, monkeypatch):
    """It loads a file and sets what differs."""
    monkeypatch.chdir(ROOT)
    config = runpy.run_path(str(path))["config"]
    assert config.model.family == path.parent.name and f"python {path.relative_to(ROOT)}" in path.read_text()
    assert f"ms-diffsynth tiny {config.model.family} {config.model.model_paths}" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", SHORT, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_short_script_trains(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = runpy.run_path(str(path))["config"]
    family(config.model.family).write_tiny(tmp_path / "model", 0)
    short = dataclasses.replace(
        config, model=dataclasses.replace(config.model, model_paths=str(tmp_path / "model")),
        optimizer=dataclasses.replace(config.optimizer, lr_warmup_steps=0),
        run=dataclasses.replace(config.run, max_train_steps=2, sample_prompts=(), sample_steps=None,
                                output_path=str(tmp_path / "run"), mode="pynative"))
    logger = train(short)
    assert logger.num_steps == 2 and logger.saved


def run_script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--family", "flux", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


@pytest.fixture(scope="module")
def flags(tiny_model):
    """Flags of a run of two steps on a tiny FLUX.1."""
    return ["--model_paths", tiny_model("flux"), "--dataset_base_path", CAT, "--dataset_metadata_path",
            CAT / "metadata.csv", "--max_sequence_length", 8, "--height", 32, "--width", 32, "--max_train_steps", 2,
            "--mode", "pynative", "--lora_rank", 2, "--lora_target_modules", "to_q,to_k", "--num_inference_steps", 1]


def same_run(one, two):
    """Whether two runs had the same losses and trained the same weights, to the bit."""
    losses = [[line.rsplit(",", 1)[0] for line in Path(out, "loss.csv").read_text().splitlines()] for out in (one, two)]
    first, second = (load_state_dict(Path(out, "step-2.safetensors")) for out in (one, two))
    return losses[0] == losses[1] and first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_script_does_what_the_command_line_does(monkeypatch, flags):
    assert run_script(monkeypatch, *flags, "--sample_prompts", "a cat", "--output_path", "out") == 0
    assert Path("out/samples/before_after.png").is_file()
    assert main(["train", "--family", "flux", *map(str, flags), "--output_path", "command"]) == 0
    assert same_run("out", "command")


def test_the_script_trains_in_two_stages(monkeypatch, flags, capsys):
    """On a cache made by the command line; one of other pictures is refused, by the script as by the command line."""
    command = ["train", "--family", "flux", *map(str, flags)]
    stage_one = ("--task", "sft:data_process", "--sample_prompts", "a cat", "--output_path", "cache")
    assert main([*command, *stage_one]) == 0
    stage_two = ("--task", "sft:train", "--dataset_base_path", "cache")
    assert run_script(monkeypatch, *flags, *stage_two, "--sample_prompts", "a cat", "--output_path", "out") == 0
    assert Path("out/samples/before_after.png").is_file()
    assert run_script(monkeypatch, *flags, "--cache_dir", "cache", "--output_path", "both") == 0
    assert same_run("out", "both") and "0 prepared, 9 there already" in capsys.readouterr().err
    other = [*stage_two, "--height", "48", "--output_path", "none"]
    assert run_script(monkeypatch, *flags, *other) == main([*command, *other]) == 78
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and "pictures.instance.image.ImageCropAndResize.height: 32, expected 48" in first
    assert not Path("none").exists()


@pytest.mark.parametrize("words, code, expected", [
    (["--learning_rat", "1"], 64, "ConfigError: train.py does not know --learning_rat. Did you mean '--learning_ra"),
    (["--dataset_base_path", "absent", "--num_epochs", "1"], 65, "DataError: absent is not a folder"),
    (["--dataset_base_path", str(CAT), "--instance_prompt", "a", "--num_epochs", "1"], 64, "ConfigError: neither mod"),
])
def test_the_script_tells_mistakes_without_a_traceback(monkeypatch, capsys, words, code, expected):
    assert run_script(monkeypatch, *words, "--output_path", "out") == code
    assert capsys.readouterr().err.startswith(expected) and not Path("out").exists()


def test_moving_emoji_move_as_their_captions_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path), "--count", "45", "--only", "cat"])
    runpy.run_path(str(ROOT / "examples/moving_emoji/make.py"), run_name="__main__")
    clips = Clips(lengths=(17,), rate=16.0)
    data = UnifiedDataset(str(tmp_path), str(tmp_path / "metadata.csv"), data_file_keys="video", clips=clips,
                          main_data_operator=UnifiedDataset.default_video_operator(str(tmp_path), clips, 4096))
    held_out = (tmp_path / "held_out.csv").read_text().splitlines()[1:]
    assert len(data) + len(held_out) == 45 and len({row["motion"] for row in data.rows}) == 9
    found = set()
    for k, row in enumerate(data.rows):
        assert row["prompt"].endswith(f"{row['emoji']} {row['motion']}") and "cat" in row["emoji"]
        if row["motion"] in found or not row["motion"].startswith(("moving", "growing", "shrinking")):
            continue
        ink = 255.0 - data[k]["video"].astype(float).mean(-1)  # [17, 64, 64]
        total = ink.sum((1, 2))
        centre = {"y": (ink.sum(2) @ np.arange(64)) / total, "x": (ink.sum(1) @ np.arange(64)) / total, "size": total}
        axis, sign = {"moving left to right": ("x", 1), "moving right to left": ("x", -1), "moving up": ("y", -1),
                      "moving down": ("y", 1), "growing": ("size", 1), "shrinking": ("size", -1)}[row["motion"]]
        assert (sign * np.diff(centre[axis]) > 0).all(), row
        found.add(row["motion"])
    assert len(found) == 6
