"""``ms-diffsynth train --resume auto`` after a kill, a signal, a hang; one run in a folder; exit codes."""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from records import table

from ms_diffsynth.cli.main import main
from ms_diffsynth.registry import family
from ms_diffsynth.storage.checkpoint import latest
from ms_diffsynth.storage.lock import lock_folder

BRIGHTNESS = Path(__file__).parents[2] / "examples/flux2/templates/brightness"
STEPS = 24
FLAGS = ("--mode", "pynative", "--sample_prompts", "[]", "--max_train_steps", str(STEPS), "--save_steps", "6",
         "--use_ema", "true")

HANG = """
import sys, time
from ms_diffsynth.cli.main import main
from ms_diffsynth.training.trainer import Trainer
original = Trainer.train_on
def train_on(self, *batch):
    if self.logger.num_steps == 8:
        (self.logger.output_path / "hanging").touch()
        time.sleep(60)
    return original(self, *batch)
Trainer.train_on = train_on
sys.exit(main(sys.argv[1:]))
"""
SLOW_SAVES = """
import sys, time
from pathlib import Path
from ms_diffsynth.cli.main import main
from ms_diffsynth.training.hooks import checkpoints
original = checkpoints.save_checkpoint
def save(root, step, *given, **how):
    Path(f"out/saving-{step}").touch()
    while step > 6 and not Path("may-be-saved").exists():
        time.sleep(0.01)
    return original(root, step, *given, **how)
checkpoints.save_checkpoint = save
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy_model, pictures):
    """The folder of a run that is never cut, configured as the others are."""
    folder = tmp_path_factory.mktemp("whole") / "out"  # files of weights say the name of their run
    values = {"family": "toy", "model_paths": toy_model, "lora_rank": 2, "dataset_base_path": pictures,
              "dataset_metadata_path": pictures / "metadata.csv", "height": 16, "width": 16, "learning_rate": 1e-2,
              "batch_size": 2, "output_path": folder}
    assert main(["train", *FLAGS, *(str(word) for name in values for word in (f"--{name}", values[name]))]) == 0
    return folder


@pytest.fixture
def start(config, begin):
    """``start(flag, ..., code=...)`` trains in a process of its own."""

    def call(*flags, code="import sys; from ms_diffsynth.cli.main import main; sys.exit(main(sys.argv[1:]))"):
        return begin("-c", code, "train", str(config), *FLAGS, *flags)

    return call


def wait_until(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]


def has_steps(count):
    path = Path("out/loss.csv")
    return lambda: path.exists() and path.read_text().count("\n") > count


def go_on(run, config, whole):
    """Train until the end, and compare with the run that was not cut."""
    code, _, err = run("train", config, *FLAGS, "--resume", "auto")
    assert code == 0 and "resumed from " in err
    assert table("out") == table(whole) and len(table("out")) == STEPS + 1
    for name in ("step-18.safetensors", "step-24.safetensors", "step-24-ema.safetensors"):
        assert Path("out", name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.fault
def test_kill_9_at_a_random_step(run, config, start, whole):
    steps = random.randrange(7, 20)
    process = start("--resume", "auto")
    wait_until(has_steps(steps), process)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and latest("out/checkpoints").step in range(6, STEPS, 6), steps
    go_on(run, config, whole)


@pytest.mark.fault
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.few(1)
def test_a_signal(run, config, start, whole, number, code):
    process = start()
    wait_until(has_steps(8), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    done = len(table("out")) - 1
    assert f"stopped by {number.name} after step {done} of 24: resume from out/checkpoints/step-{done:08d}" in err
    assert latest("out/checkpoints").step == done >= 8 and Path(f"out/step-{done}-ema.safetensors").exists()
    assert '"event": "stopped"' in Path("out/events.jsonl").read_text().splitlines()[-1]
    assert Path("out/.lock").read_bytes() == b""
    go_on(run, config, whole)


@pytest.mark.fault
def test_a_process_that_hangs(run, config, start, whole):
    process = start("--grace_seconds", "0.5", code=HANG)
    wait_until(Path("out/hanging").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "SIGTERM was 0.5 s ago" in err and "in train_on" in err
    assert latest("out/checkpoints").step == 6
    go_on(run, config, whole)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("signals, code", [(1, 143), (2, 143)])
def test_a_signal_while_a_state_is_saved(run, config, start, whole, signals, code):
    process = start(code=SLOW_SAVES)
    wait_until(Path("out/saving-12").exists, process)
    process.send_signal(signal.SIGTERM)
    if signals == 1:
        Path("may-be-saved").touch()
    while signals == 2 and process.poll() is None:  # those that follow within a second are taken for the first one
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    process.communicate(timeout=30)
    assert process.returncode == code and latest("out/checkpoints").step == (12 if signals == 1 else 6)
    if signals == 2:
        go_on(run, config, whole)


@pytest.mark.fault
def test_two_runs_in_one_folder(run, config):
    with lock_folder("out"):
        code, _, err = run("train", config, *FLAGS)
        assert code == 74 and f"out is in use by another run: process {os.getpid()} on host" in err
        assert [p.name for p in Path("out").iterdir()] == [".lock"], "not even config.yaml"


@pytest.mark.fault
def test_a_new_run_in_the_folder_of_an_old_one_is_refused_before_any_model_is_loaded(run, config):
    assert run("train", config, *FLAGS, "--max_train_steps", "2")[0] == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    for flags, expected in ((), "Resume it by --resume auto"), (("--resume", "nowhere"), "there is no such folder"):
        code, _, err = run("train", config, *FLAGS, *flags, "--model_paths", "absent")
        assert code == 78 and expected in err
    flags = ("--resume", "auto", "--learning_rate", "2e-2")
    code, _, err = run("train", config, *FLAGS, *flags)
    assert code == 78 and "learning_rate: 0.01 when saved, 0.02 now" in err and "max_train_steps" not in err
    assert {p: p.read_bytes() for p in before} == before
    code, _, err = run("train", config, *FLAGS, *flags, "--max_train_steps", "4", "--accept_changes", "learning_rate")
    assert code == 0 and "accepted: learning_rate: 0.01 when saved, 0.02 now" in err
    assert [row.split(",")[3] for row in table("out")] == ["learning_rate", "0.01", "0.01", "0.02", "0.02"]


@pytest.mark.parametrize("flags, expected", [
    (("--resume", "runs/old", "--task", "sft:data_process"), "resume=runs/old with task=sft:data_process: remove it"),
    (("--accept_changes", "seed"), "accept_changes=seed would not be used: set resume"),
    (("--keep_checkpoints", "1"), "expected 2 <= keep_checkpoints"),
    (("--grace_seconds", "0"), "expected 0 < grace_seconds")])
def test_settings_that_cannot_be_meant(run, config, flags, expected):
    code, _, err = run("train", config, *flags)
    assert code == 64 and expected in err and not Path("out").exists()


@pytest.mark.fault
@pytest.mark.slow
def test_a_template(run, tmp_path):
    """2 epochs at once, and the second one of them after a first."""
    family("flux2").write_tiny(tmp_path / "model", 0)
    rows = [{"image": f"{k}.png", "prompt": "grey", "template_inputs": {"scale": k / 3}} for k in range(3)]
    for k, row in enumerate(rows):
        Image.new("RGB", (32, 32), (80 * k,) * 3).save(tmp_path / row["image"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    template = shutil.copytree(BRIGHTNESS, tmp_path / "brightness")
    words = ["train", "--family", "flux2", "--model_paths", tmp_path / "model", "--dataset_base_path", tmp_path,
             "--dataset_metadata_path", tmp_path / "metadata.jsonl", "--height", 32, "--width", 32,
             "--extra_inputs", "template_inputs", "--template_model_id_or_path", template, "--trust_template_code",
             "--trainable_models", "template_model", "--max_sequence_length", 16, "--mode", "pynative"]
    assert run(*words, "--num_epochs", 2, "--output_path", "whole")[0] == 0
    for epochs in (1, 2):
        assert run(*words, "--num_epochs", epochs, "--output_path", "out", "--resume", "auto")[0] == 0
    assert table("out") == table("whole") and len(table("out")) == 7
    assert Path("out/epoch-1.safetensors").read_bytes() == Path("whole/epoch-1.safetensors").read_bytes()
    with open(template / "model.py", "a") as file:
        file.write("# changed\n")
    code, _, err = run(*words, "--num_epochs", 3, "--output_path", "out", "--resume", "auto")
    assert code == 78 and "template_model" in err
