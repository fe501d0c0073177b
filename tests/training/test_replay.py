"""Replay: a recorded step again, to the bit, and the first tensor in it that was not finite; the run stays as it is."""
from __future__ import annotations

import csv
import json
import shutil
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import toy_run
from device import DEVICE
from mindspore import Tensor, ops
from toy_run import Module, dataset_of, digests, files, rows

from ms_diffsynth import FlowMatchSFTLoss, UnifiedDataset
from ms_diffsynth.debug.replay import Replay, replay_training_step
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import CheckpointError, ConfigError, OutputError
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.storage.lock import lock_folder
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.two_stage import launch_data_process_task

MODES = ("pynative", "graph")
SLOW_GRAPH = ("pynative", pytest.param("graph", marks=pytest.mark.slow))


class Documented(Module):
    """The documents' script: units one by one, then the loss."""

    def forward(self, data):
        shared, posi, nega = self.get_pipeline_inputs(data)
        for unit in self.pipe.units:
            shared, posi, nega = self.pipe.unit_runner(unit, self.pipe, shared, posi, nega)
        return FlowMatchSFTLoss(self.pipe, **shared, **posi)


def train(path, module, dataset, *how, **options):
    return toy_run.train(path, module, dataset, *how, **{"num_epochs": 2, **options})


def replay(path, step, module, dataset, mode="pynative", accumulation=1, **options):
    before = digests(path)
    found = replay_training_step(Accelerator(accumulation, mode, DEVICE), dataset, module, path, step,
                                 **{"learning_rate": 1e-2, "num_epochs": 2, **options})
    after = digests(path)
    assert after.pop(f"replay-step-{step}.json") and after == before, "nothing else of the run changes"
    assert json.loads((path / f"replay-step-{step}.json").read_text()) == json.loads(json.dumps(found.record()))
    return found


def first_of(found):
    """The first finding in words, and the rows it is about."""
    rows_ = found.record()["findings"][0]["rows"]
    return found.findings[0].describe(), [(row["row"], row["name"], row["sample"]) for row in rows_]


def sample_at(path, step):
    """Names of the rows in the event of a skipped step, by sample."""
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    event, = (e for e in events if e["event"] == "skipped" and e["at"] == step)
    return {row["sample"]: row for row in event["rows"]}


@pytest.fixture
def poison(monkeypatch):
    """``poison(sample, value)``: the noise of one sample is multiplied by a value."""
    return lambda sample, value: toy_run.poison(monkeypatch, sample, value, "noise")


# -- a step that was finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.few(1)
def test_a_finite_step_is_equal_to_the_bit(folder, tmp_path, mode, capfd):
    options = {"batch_size": 2, "use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "num_epochs": 4,
               "checkpoint_steps": 3, "keep_checkpoints": 9, "save_steps": 2, "loss_scale": 1024.0, "mode": mode}
    train(tmp_path / "run", Module(folder), rows(5), **options)
    capfd.readouterr()
    found = replay(tmp_path / "run", 11, Module(folder), rows(5), **options)  # in the middle of the last epoch
    with open(tmp_path / "run" / "loss.csv", newline="") as file:
        row = list(csv.DictReader(file))[10]
    assert found.found == found.recorded == {name: row[name] for name in found.found} and float(row["loss"]) > 0
    assert found.is_reproduced and found.is_finite and found.findings == [] and found.eager is None
    assert (found.after, found.start, found.mode) == (9, "checkpoints/step-00000009", mode)
    text = found.describe()
    assert f"step 11 in {mode} mode, from checkpoints/step-00000009\n  loss {row['loss']}, gradient norm" in text
    assert ": finite\n  equal to loss.csv to the bit, and so is the step before it\n  rows: row" in text
    assert "first not finite" not in text and "replaying 2/2" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["no checkpoint yet", "damaged", "own forward", "class images"])
@pytest.mark.few(2)
def test_other_kinds_of_runs_and_of_beginnings(folder, tmp_path, kind, caplog):
    path, make, step = tmp_path / "run", lambda: Module(folder), 5
    options = {"batch_size": 2, "checkpoint_steps": 2, "keep_checkpoints": 9}
    if kind == "own forward":
        make = lambda: Documented(folder)  # noqa: E731
        options["num_workers"] = 2
    elif kind == "class images":
        objective = Objective(weighting_scheme="none", prior_loss_weight=1.0, posterior="sample")
        make = lambda: Module(folder, "dreambooth", objective)  # noqa: E731
        options["class_dataset"] = rows(3, 50)
    elif kind == "no checkpoint yet":
        step = 2
    train(path, make(), rows(5), **options)
    if kind == "damaged":
        (path / "checkpoints/step-00000004/state.json").write_bytes(b"{}")
    found = replay(path, step, make(), rows(5), **options)
    assert found.is_reproduced and found.is_finite
    assert found.after == {"no checkpoint yet": 0, "damaged": 2}.get(kind, 4)
    assert (kind == "damaged") == ("checkpoint skipped" in caplog.text)
    assert (kind == "no checkpoint yet") == ("from the initial weights" in found.describe())
    if kind == "class images":
        assert [row.get("set") for row in found.rows[0]] == [None, None, "class", "class"]


def test_a_number_that_is_not_the_recorded_one(folder, tmp_path):
    path = tmp_path / "run"
    train(path, Module(folder), rows(3), checkpoint_steps=0)
    lines = (path / "loss.csv").read_text().splitlines()
    cells = lines[4].split(",")
    cells[2] = f"{np.nextafter(np.float32(cells[2]), np.float32(9)):.9g}"  # one bit of the loss of step 4
    del lines[2]  # step 2 was torn
    (path / "loss.csv").write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:], "7,1"]) + "\n")
    found = replay(path, 5, Module(folder), rows(3), checkpoint_steps=0)
    assert not found.is_reproduced and len(found.differences) == 1 and found.compared == 4
    assert found.differences[0].startswith("step 4: loss ") and found.differences[0].endswith(f" recorded {cells[2]}")
    assert f"  differs from loss.csv: {found.differences[0]}" in found.describe()
    assert "equal to loss.csv" not in found.describe()


# -- a step that was not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.few(1)
def test_bad_noise_of_one_sample_is_found(folder, tmp_path, poison, mode):
    poison(9, np.nan)
    path, options = tmp_path / "run", {"batch_size": 2, "checkpoint_steps": 2, "keep_checkpoints": 9, "mode": mode}
    train(path, Module(folder), files(tmp_path / "data", 5), **options)
    found = replay(path, 5, Module(folder), dataset_of(tmp_path / "data"), **options)
    row = sample_at(path, 5)[9]
    assert row["name"] == f"{row['row'] - 1}.png" and len(sample_at(path, 5)) == 2
    assert first_of(found) == ("the input noise of unit flow_match_path", [(row["row"], row["name"], 9)])
    first = found.findings[0]
    assert (first.nan, first.inf, first.size, first.shape) == (64, 0, 128, (2, 4, 4, 4)) and first.greatest < 10
    assert found.is_reproduced and not found.is_finite and found.after == 4 and found.eager["loss"] == "nan"
    assert f"in {row['name']} (row {row['row']}, sample 9)\n  then the output latents" in found.describe()
    assert "not finite, so it changed nothing\n  equal to loss.csv to the bit\n" in found.describe()


@pytest.mark.parametrize("mode", SLOW_GRAPH)
def test_the_module_whose_output_overflows(folder, tmp_path, poison, mode):
    poison(4, 1e36)

    def make():
        module = Module(folder)
        weight = module.pipe.dit.layer_1.base.weight
        ops.assign(weight, Tensor(np.full(weight.shape, 1e4, np.float32)))
        return module

    options = {"num_epochs": 1, "mode": mode}
    train(tmp_path / "run", make(), rows(5), **options)
    found = replay(tmp_path / "run", 5, make(), rows(5), **options)
    assert first_of(found)[0] == "the output of dit.layer_1.base in unit denoise"
    # infinities of both signs may meet in a product, which gives NaN: that depends on its order of summation
    assert first_of(found)[1][0][2] == 4 and found.findings[0].inf + found.findings[0].nan > 0
    assert found.is_reproduced and found.after == 0 and not found.is_finite


def test_a_bad_weight(folder, tmp_path):
    modules = [Module(folder) for _ in range(2)]
    for module in modules:
        ops.assign(module.pipe.dit.condition.bias, Tensor(np.full(16, np.nan, np.float32)))
    train(tmp_path / "run", modules[0], rows(3), num_epochs=1)
    found = replay(tmp_path / "run", 2, modules[1], rows(3), num_epochs=1)
    assert first_of(found) == ("the parameter bias of dit.condition in unit denoise", [])


@pytest.mark.parametrize("mode", SLOW_GRAPH)
def test_gradients_that_the_loss_scale_makes_overflow(folder, tmp_path, mode):
    """B of a LoRA is zero at first, so that its factor alpha / rank shows in nothing but B's own gradient."""
    make, path = lambda: Module(folder, lora_base_model="dit", lora_rank=2, lora_alpha=1e9), tmp_path / "run"
    options = {"num_epochs": 1, "loss_scale": 1e34, "learning_rate": 1e-3, "mode": mode}
    train(path, make(), rows(3), **options)
    found = replay(path, 1, make(), rows(3), **options)
    assert found.is_reproduced and not found.is_finite and np.isfinite(float(found.found["loss"]))
    first = found.findings[0]
    assert first_of(found)[0] == "the gradient of parameter lora_B of dit.layer_2 in unit denoise"
    assert first.shape == (16, 2) and first.inf > 0 and first.rows == ()


def test_a_scaled_loss_and_squares_of_gradients_that_overflow(folder, tmp_path):
    for scale, what in ((3e38, "the scaled loss of the step"), (1e25, "the gradient norm of the step")):
        path, options = tmp_path / str(scale), {"num_epochs": 1, "loss_scale": scale}
        train(path, Module(folder), rows(4), **options)
        large = [k for k, loss in enumerate(np.loadtxt(path / "loss.csv", delimiter=",", skiprows=1)[:, 2], 1)
                 if loss > 1.2 or scale < 1e38]
        found = replay(path, large[0], Module(folder), rows(4), **options)
        assert first_of(found) == (what, []) and np.isfinite(float(found.found["loss"]))
    assert "every gradient is finite, the sum of their squares is not" in found.describe()


def test_a_growing_scale_is_that_of_the_step(folder, tmp_path, monkeypatch):
    """A dynamic scale halves after the step: under the probes it is what it was."""
    monkeypatch.setattr(ms.amp, "StaticLossScaler", lambda scale: ms.amp.DynamicLossScaler(scale, 16, 1))
    options = {"num_epochs": 3, "loss_scale": 2.0**50, "learning_rate": 1e-6}
    train(tmp_path / "run", Module(folder), rows(3), **options)
    skipped = np.loadtxt(tmp_path / "run" / "loss.csv", delimiter=",", skiprows=1)[:, 5]
    step = int(np.argmax(skipped)) + 1
    assert skipped[step - 1] == 1 and step > 2
    found = replay(tmp_path / "run", step, Module(folder), rows(3), **options)
    assert first_of(found)[0] == "the gradient norm of the step" and found.is_reproduced


@pytest.mark.parametrize("mode", SLOW_GRAPH)
def test_the_third_of_three_micro_steps(folder, tmp_path, poison, mode):
    poison(7, -np.inf)
    options = {"accumulation": 3, "num_epochs": 2, "mode": mode}  # five rows: groups of three and of two
    train(tmp_path / "run", Module(folder), files(tmp_path / "data", 5), **options)
    found = replay(tmp_path / "run", 3, Module(folder), dataset_of(tmp_path / "data"), **options)
    assert [[row["sample"] for row in micro_step] for micro_step in found.rows] == [[5], [6], [7]]
    row = sample_at(tmp_path / "run", 3)[7]
    assert first_of(found) == ("the input noise of unit flow_match_path", [(row["row"], row["name"], 7)])
    assert found.findings[0].micro_step == 3 and found.is_reproduced and len(sample_at(tmp_path / "run", 3)) == 3
    assert f"  micro-step 3: {row['name']} (row {row['row']}, sample 7)" in found.describe()


def test_a_bad_entry_of_a_cache(folder, tmp_path):
    first = Module(folder, "sft:data_process")
    launch_data_process_task(Accelerator(1, "pynative", DEVICE), files(tmp_path / "data", 5), first,
                             ModelLogger(tmp_path / "cache"))
    cache = Cache(tmp_path / "cache")
    row = cache.rows("instance")[3]
    text = cache.entry(row.key).text
    slots = cache.entry(text).slots
    slots["prompt_embeds"][0, 0] = np.inf
    cache.write(text, slots)
    data, options = UnifiedDataset(str(tmp_path / "cache")), {"batch_size": 5, "num_epochs": 1}
    train(tmp_path / "run", Module(folder, "sft:train"), data, **options)
    found = replay(tmp_path / "run", 1, Module(folder, "sft:train"), data, **options)
    what, whose = first_of(found)
    assert what == "the input prompt_embeds of unit denoise" and [name for _, name, _ in whose] == ["3.png"]
    assert whose[0][0] == 4 and sample_at(tmp_path / "run", 1)[whose[0][2]]["name"] == "3.png"


def test_what_is_not_finite_before_the_step_is_looked_for_there(folder, tmp_path, monkeypatch):
    """A picture that comes out of preprocessing with a NaN: the unit that prepares is named, not the step's."""
    def make():
        module = Module(folder)
        plain = module.pipe.preprocess_image

        def preprocess(image):
            pixels = plain(image).asnumpy()
            if image.getpixel((0, 0)) == rows(5)[2]["image"].getpixel((0, 0)):
                pixels[0, 0, 0, 0] = np.nan
            return Tensor(pixels)

        module.pipe.preprocess_image = preprocess
        return module

    options = {"batch_size": 5, "num_epochs": 1}
    train(tmp_path / "run", make(), files(tmp_path / "data", 5), **options)
    found = replay(tmp_path / "run", 1, make(), dataset_of(tmp_path / "data"), **options)
    what, whose = first_of(found)
    assert what == "the input pixels of unit encode_image" and [name for _, name, _ in whose] == ["2.png"]
    assert "the input moments of unit sample_latents" in [f.describe() for f in found.findings]


@pytest.mark.parametrize("value, what", [(np.nan, "the input latents of unit denoise"), (1e25, "the loss of the step")])
def test_the_row_of_an_own_forward(folder, tmp_path, poison, value, what):
    poison(2, value)
    options = {"batch_size": 2, "accumulation": 2, "num_epochs": 1, "num_workers": 0}
    train(tmp_path / "run", Documented(folder), files(tmp_path / "data", 4), **options)
    found = replay(tmp_path / "run", 1, Documented(folder), dataset_of(tmp_path / "data"), **options)
    row = sample_at(tmp_path / "run", 1)[2]
    assert first_of(found) == (what, [(row["row"], row["name"], 2)] if np.isnan(value) else [])  # a loss is of all rows
    assert found.is_reproduced and found.mode == "pynative" and found.findings[0].micro_step == 2


def test_a_step_that_is_finite_when_it_is_run_eagerly():
    found = Replay(step=1, after=0, start="the initial weights", mode="graph", recorded={}, compared=1, differences=[],
                   rows=[[]], found={"loss": "nan", "grad_norm": "nan", "is_skipped": "1"}, findings=[],
                   eager={"loss": "0.5", "grad_norm": "1", "is_skipped": "0"})
    assert "run eagerly, all of it is finite (loss 0.5, gradient norm 1)" in found.describe()


# -- what cannot be replayed -----------------------------------------------------------------------------------------


def test_another_run_is_refused_field_by_field(folder, tmp_path):
    path, other = tmp_path / "run", tmp_path / "other"
    train(path, Module(folder), files(tmp_path / "data", 5), checkpoint_steps=2)
    train(other, Module(folder), dataset_of(tmp_path / "data"), checkpoint_steps=0, args=SimpleNamespace(note="a"))
    for run, step in ((path, 9), (path, 1), (other, 3)):
        note = {"args": SimpleNamespace(note="a")} if run == other else {}
        with pytest.raises(CheckpointError, match=r"learning_rate: 0\.01 .*, 0\.02 now"):
            replay(run, step, Module(folder), dataset_of(tmp_path / "data"), learning_rate=0.02, **note)
    with pytest.raises(CheckpointError, match=r'note: "a" .*, "b" now\nSet them back'):
        replay(other, 3, Module(folder), dataset_of(tmp_path / "data"), args=SimpleNamespace(note="b"))
    found = replay(path, 9, Module(folder), dataset_of(tmp_path / "data"), learning_rate=0.02,
                   accept_changes=("learning_rate",))
    assert [line for line in found.differences if "learning_rate" in line] == [
        "step 9: learning_rate 0.02, recorded 0.01"]
    (path / "replay-step-9.json").unlink()
    files(tmp_path / "data", 6)
    with pytest.raises(CheckpointError, match=r"data\.rows: 5 when saved, 6 now"):
        replay(path, 9, Module(folder), dataset_of(tmp_path / "data"))
    assert not list(tmp_path.rglob("replay-*"))


def test_a_run_that_went_on_from_another_one(folder, tmp_path):
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    train(whole, Module(folder), rows(3), num_epochs=1, checkpoint_steps=2, keep_checkpoints=9)
    shutil.copytree(whole, tmp_path / "kept")
    checkpoint = str(whole / "checkpoints/step-00000002")
    options = {"num_epochs": 2, "resume": checkpoint, "learning_rate": 1e-2, "checkpoint_steps": 0}
    train(branch, Module(folder), rows(3), **options)
    found = replay(branch, 4, Module(folder), rows(3), num_epochs=2)
    assert found.is_reproduced and found.after == 2 and found.start == checkpoint
    with pytest.raises(CheckpointError, match=r"was resumed from .*step-00000002, so step 2 is not its own.*whole"):
        replay(branch, 2, Module(folder), rows(3), num_epochs=2)
    assert digests(whole) == digests(tmp_path / "kept")
    shutil.rmtree(whole)
    with pytest.raises(CheckpointError, match="step-00000002 is not a checkpoint, but not there"):
        replay(branch, 4, Module(folder), rows(3), num_epochs=2)


def test_no_run_no_step_and_a_run_that_is_going_on(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not contain a run: loss\.csv"):
        replay_training_step(Accelerator(1, "pynative", DEVICE), rows(3), Module(folder), tmp_path / "nowhere", 1)
    assert not (tmp_path / "nowhere").exists()
    train(tmp_path / "run", Module(folder), rows(3), num_epochs=1)
    for step in (0, 4, -1):
        with pytest.raises(ConfigError, match=rf"step={step}: .*loss.csv has the steps 1 to 3"):
            replay(tmp_path / "run", step, Module(folder), rows(3), num_epochs=1)
    with lock_folder(tmp_path / "run"), pytest.raises(OutputError, match="is in use by another run: process"):
        replay(tmp_path / "run", 2, Module(folder), rows(3), num_epochs=1)
