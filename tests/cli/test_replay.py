"""``ms-diffsynth replay``: from the run's folder alone; what it prints, its exit codes, and what it leaves alone."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from toy_run import poison

from ms_diffsynth.storage.lock import lock_folder

FLAGS = ("--sample_prompts", "[]", "--checkpoint_steps", "1", "--keep_checkpoints", "9")


@pytest.fixture
def bad_noise(monkeypatch):
    """The noise of sample 5, which is in step 3, is not a number."""
    poison(monkeypatch, 5, stream="noise")


def tree():
    """SHA-256 of every file of the run, locks excepted."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("out").rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.few(1)
def test_a_step_that_was_not_finite(run, config, bad_noise, mode):
    assert run("train", config, *FLAGS, "--mode", mode)[0] == 0
    event, = (e for e in map(json.loads, Path("out/events.jsonl").read_text().splitlines()) if e["event"] == "skipped")
    row, = (row for row in event["rows"] if row["sample"] == 5)
    before = tree()
    code, out, err = run("replay", "out", 3)
    lines = out.splitlines()
    assert code == 0 and lines[:3] == [f"step 3 in {mode} mode, from checkpoints/step-00000002",
                                       "  loss nan, gradient norm nan: not finite, so it changed nothing",
                                       "  equal to loss.csv to the bit"]
    assert "first not finite, when it is run eagerly: the input noise of unit flow_match_path" in lines
    assert f"  in {row['name']} (row {row['row']}, sample 5)" in lines and row["name"].endswith(".png")
    assert lines[-1] == "out/replay-step-3.json" and "replaying 1/1" in err
    after = tree()
    assert json.loads(Path("out/replay-step-3.json").read_text())["findings"][0]["rows"] == [row]
    assert after.pop("out/replay-step-3.json") and after == before


def test_a_finite_step_a_changed_setting_and_other_mistakes(run, config, pictures, tmp_path):
    assert run("train", config, *FLAGS, "--mode", "pynative")[0] == 0
    before = tree()
    with lock_folder("out"):
        assert run("replay", "out", 4)[0] == 74
    code, out, err = run("replay", "out", 4, "--learning_rate", "2e-2")
    assert code == 78 and "learning_rate: 0.01 when saved, 0.02 now" in err and out == ""
    code, _, err = run("replay", "out", 9)
    assert code == 64 and "step=9: out/loss.csv has the steps 1 to 4. Expected one of them." in err
    for folder in ("nowhere", "."):
        code, _, err = run("replay", folder, 1)
        assert code == 64 and f"{folder} has no config.yaml" in err and not Path("nowhere").exists()
    assert run("replay", "out", "x")[0] == 64
    assert tree() == before

    moved = tmp_path / "moved"
    Path("out").rename(moved)
    code, out, _ = run("replay", moved, 4)
    loss = (moved / "loss.csv").read_text().splitlines()[4].split(",")[2]
    assert code == 0 and out.startswith("step 4 in pynative mode, from checkpoints/step-00000003\n  loss " + loss)
    assert ": finite\n  equal to loss.csv to the bit\n  rows: " in out

    (moved / "loss.csv").write_text((moved / "loss.csv").read_text().replace(loss, "0.5"))
    code, out, _ = run("replay", moved, 4)
    assert code == 1 and f"  differs from loss.csv: step 4: loss {loss}, recorded 0.5" in out


def test_stage_two_of_split_training_and_a_cache(run, config):
    assert run("train", config, *FLAGS, "--mode", "pynative", "--cache_dir", "cache")[0] == 0
    code, out, err = run("replay", "out", 4)
    assert code == 0 and "equal to loss.csv to the bit" in out and "loaded: text" not in err
    assert run("train", config, *FLAGS, "--mode", "pynative", "--task", "sft:train", "--dataset_base_path", "cache",
               "--dataset_metadata_path", "null", "--output_path", "two")[0] == 0
    code, out, _ = run("replay", "two", 2)
    assert code == 0 and "equal to loss.csv to the bit" in out and ".png (row " in out
