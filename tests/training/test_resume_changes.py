"""Resume: a run that is made longer, or whose settings, data, weights or versions have changed."""
from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
from PIL import Image
from toy_run import SIDE, Module, dataset_of, digests, equal, files, rows, state, table, toy_model, train

from ms_diffsynth import UnifiedDataset
from ms_diffsynth.config import SETTINGS
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import CheckpointError, ConfigError, WeightError
from ms_diffsynth.registry import family
from ms_diffsynth.storage.checkpoint import latest
from ms_diffsynth.training import same_run, state as state_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


def test_a_finished_run_is_made_longer(folder, tmp_path):
    train(tmp_path / "whole", Module(folder), rows(5), num_epochs=None, max_train_steps=9, batch_size=2)
    for steps in (4, 4, 9):  # the second one finds nothing to do
        train(tmp_path / "run", Module(folder), rows(5), num_epochs=None, max_train_steps=steps, batch_size=2,
              resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.fault
def test_where_the_learning_rate_depends_on_the_length_it_is_a_change(folder, tmp_path):
    def run(**more):
        return train(tmp_path / "run", Module(folder), rows(3), **({"num_epochs": 1, "lr_scheduler": "linear"} | more))

    run()
    with pytest.raises(CheckpointError, match=r"num_epochs: 1 when saved, 2 now\n.*--accept_changes num_epochs"):
        run(num_epochs=2, resume="auto")
    run(num_epochs=2, resume="auto", accept_changes=("num_epochs",))
    assert [row.split(",")[3] for row in table(tmp_path / "run")[4:]] == ["0.005", "0.00333333333", "0.00166666667"]


@pytest.mark.fault
def test_changed_settings_are_refused_one_by_one_and_accepted_one_by_one(folder, tmp_path):
    def run(module=None, **more):
        return train(tmp_path / "run", module or Module(folder), rows(3), **{"num_epochs": 1, **more})

    run()
    before = digests(tmp_path / "run")
    changes = {"learning_rate": 2e-2, "seed": 3, "batch_size": 2, "resume": "auto", "num_epochs": 2}
    with pytest.raises(CheckpointError) as error:
        run(**changes)
    assert str(error.value).splitlines()[1:] == [
        "  learning_rate: 0.01 when saved, 0.02 now", "  seed: 42 when saved, 3 now",
        "  batch_size: 1 when saved, 2 now", "Set them back, or accept the change by --accept_changes "
        "learning_rate,seed,batch_size, or choose another output_path to start afresh with --resume none."]
    with pytest.raises(CheckpointError, match=r"than this one:\n  seed: 42 when saved, 3 now\nSet"):
        run(**changes, accept_changes=("learning_rate", "batch_size"))
    with pytest.raises(CheckpointError, match=r"posterior: \"mean\" when saved, \"sample\" now"):
        run(Module(folder, objective=Objective(posterior="sample")), resume="auto")
    with pytest.raises(CheckpointError, match=r"mode: \"pynative\" when saved, \"graph\" now"):
        run(mode="graph", resume="auto")
    with pytest.raises(ConfigError, match=r"accept_changes names sed: .*Did you mean 'seed'\?"):
        run(**changes, accept_changes=("sed",))
    assert digests(tmp_path / "run") == before, "refused before anything is written"
    run(**changes, accept_changes=("learning_rate", "batch_size", "seed", "max_train_steps"))
    assert [row.split(",")[3] for row in table(tmp_path / "run")[1:]] == ["0.01"] * 3 + ["0.02"] * 2, (
        "one epoch of two is left, in two batches")
    assert latest(tmp_path / "run/checkpoints").state["identity"]["seed"] == 3, "accepted for good"


def test_a_changed_loss_scale_is_obeyed_and_an_average_begins_at_the_weights(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3), loss_scale=64.0)
    trained = latest(tmp_path / "run/checkpoints").read("weights")
    train(tmp_path / "run", Module(folder), rows(3), loss_scale=8.0, use_ema=True, num_epochs=2, learning_rate=0.0,
          resume="auto", accept_changes=("loss_scale", "use_ema", "learning_rate"))
    arrays, _ = state(tmp_path / "run")
    assert arrays["loss_scale/scale_value"] == 8
    assert all(np.array_equal(arrays[f"ema/ema.{name}"], value) for name, value in trained.items())


def test_the_average_of_weights_from_a_file_begins_at_them(folder, tmp_path):
    train(tmp_path / "run", Module(folder, trainable_models="dit"), rows(3), learning_rate=0.0, use_ema=True)
    arrays, _ = state(tmp_path / "run")
    weights = {name: array for name, array in arrays.items() if name.startswith("weights/")}
    assert len(weights) == 6
    assert all(np.array_equal(arrays[name.replace("weights/", "ema/ema.")], weights[name]) for name in weights)


@pytest.mark.fault
def test_another_lora_is_refused_even_when_it_is_accepted(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3))
    with pytest.raises(WeightError, match="Resume with the model, LoRA"):
        train(tmp_path / "run", Module(folder, lora_base_model="dit", lora_rank=3), rows(3), resume="auto")


def test_what_may_change_is_a_setting_or_an_option():
    others = same_run.MAY_CHANGE - SETTINGS.keys()
    assert others == {"num_workers", "find_unused_parameters"}


@pytest.mark.fault
@pytest.mark.parametrize("change, expected", [
    ("caption", ["data.digest"]), ("picture", ["data.digest"]), ("row", ["data.rows", "data.digest"]),
    ("fewer", ["data.rows", "data.digest"]), ("size", ["data.pictures"]), ("weights", ["weights.dit"]), ("place", [])])
@pytest.mark.few(3)
def test_changed_data_and_weights(folder, tmp_path, change, expected):
    dataset, model, counts = files(tmp_path / "data"), folder, {"row": 4, "fewer": 2}
    train(tmp_path / "run", Module(folder), dataset)
    metadata = tmp_path / "data/metadata.csv"
    if change == "caption":
        metadata.write_text(metadata.read_text().replace("picture 1", "a picture"))
        dataset = dataset_of(tmp_path / "data")
    elif change == "picture":
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "data/1.png")
    elif change in counts:
        dataset = files(tmp_path / "data", counts[change])
    elif change == "size":
        dataset.main_data_operator = UnifiedDataset.default_image_operator(str(tmp_path / "data"), height=32, width=32)
    elif change == "weights":
        model = tmp_path / "other"
        family("toy").write_tiny(tmp_path / "new", 1)
        shutil.copytree(folder, model)
        shutil.copytree(tmp_path / "new/transformer", model / "transformer", dirs_exist_ok=True)
    else:
        shutil.copytree(tmp_path / "data", tmp_path / "moved")
        dataset, model = dataset_of(tmp_path / "moved"), shutil.copytree(folder, tmp_path / "model")
    more = {"num_epochs": 2, "resume": "auto"}
    if expected:
        with pytest.raises(CheckpointError) as error:
            train(tmp_path / "run", Module(model), dataset, **more)
        lines = str(error.value).splitlines()[1:-1]
        assert [line.partition(":")[0].strip() for line in lines] == expected
        assert change not in counts or lines[0] == f"  data.rows: 3 when saved, {counts[change]} now"
    train(tmp_path / "run", Module(model), dataset, **more, accept_changes=("data", "weights"))
    assert len(table(tmp_path / "run")) == 1 + 3 + counts.get(change, 3), "the first epoch is done, the second is left"


@pytest.mark.fault
def test_other_versions_are_told(folder, tmp_path, monkeypatch, caplog):
    train(tmp_path / "run", Module(folder), rows(3))
    monkeypatch.setattr(state_module, "version", lambda name: "0.1")
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", Module(folder), rows(3), resume="auto")
    assert "the same bits are not promised" in caplog.text and "mindspore: " in caplog.text
