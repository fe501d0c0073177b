"""Validation loss: the same numbers in every mode, batch size and stage, of rows that are never trained on."""
from __future__ import annotations

import csv
import signal
import time

import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor
from toy_run import Module, Own, dataset_of, differing_bits, files, rows, state, toy_model, train

from ms_diffsynth import UnifiedDataset
from ms_diffsynth.config import load_config
from ms_diffsynth.diffusion.distillation import DirectDistillation
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.diffusion.weighting import table as weights_of
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, DataError
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.hooks.validation import LEVELS, Validation
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.signals import Stopped
from ms_diffsynth.training.two_stage import launch_data_process_task

HELD_OUT = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


def validate(path, module, mode="pynative", **options):
    """A run of four steps with three held-out rows; its validation.csv."""
    given = {"validation_dataset": rows(HELD_OUT, 40), "validation_steps": 2, "num_epochs": None, "max_train_steps": 4,
             "batch_size": 2}
    train(path, module, rows(4), mode, **given | options)
    return found(path)


def found(path):
    with open(path / "validation.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_before_every_and_at_the_end_alike_in_both_modes(folder, tmp_path, capfd):
    eager = validate(tmp_path / "eager", Module(folder), max_train_steps=5)
    compiled = validate(tmp_path / "compiled", Module(folder), "graph", max_train_steps=5)
    assert [row["step"] for row in eager] == [row["step"] for row in compiled] == [0, 2, 4, 5]
    assert len(eager[0]) == 2 + LEVELS and eager[-1]["loss"] < eager[0]["loss"]
    for one, two in zip(eager, compiled):
        assert list(one) == list(two) and one["loss"] == pytest.approx(np.mean(list(one.values())[2:]), rel=1e-7)
        np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-6)
    shown = capfd.readouterr().err
    assert f"val {eager[2]['loss']:.4f}" in shown and f"step 5: validation loss {eager[3]['loss']:.4f} of 3" in shown


def test_each_number_is_the_loss_at_its_noise_level(folder, tmp_path):
    """Recomputed from the equations of flow matching, with the network alone."""
    row, module = validate(tmp_path / "run", Module(folder), max_train_steps=1)[0], Module(folder)
    pipe, draws = module.pipe, Draws(42)
    losses = np.zeros((HELD_OUT, LEVELS))
    for number, data in enumerate(rows(HELD_OUT, 40)):
        slots = module.prepare(data, module.training_cut())
        known = {name: Tensor(value[None]) for name, value in slots.items()}
        units = [unit for unit in pipe.units if unit.name == "sample_latents"]
        clean = pipe.run(units, known)["input_latents"].asnumpy()
        for k in range(LEVELS):
            level = int((k + 0.5) / LEVELS * len(pipe.sigmas))
            sigma = pipe.sigmas[level]
            noise = draws.normal("validation/noise", np.array([number * LEVELS + k]), clean.shape[1:])
            latents = Tensor((1 - sigma) * clean + sigma * noise)
            velocity = pipe.model_fn(**known, latents=latents, sigma=Tensor(np.float32([sigma])),
                                     guidance=Tensor(np.float32([1.0]))).asnumpy()
            weight = weights_of(pipe.objective.weighting_scheme, pipe.sigmas)[level]
            losses[number, k] = weight * np.mean((velocity - (noise - clean)) ** 2)
    np.testing.assert_allclose(list(row.values())[2:], losses.mean(axis=0), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_it_does_not_depend_on_the_batch_size(folder, tmp_path, mode):
    one, two = (validate(tmp_path / str(size), Module(folder), mode, batch_size=size, max_train_steps=1)[0]
                for size in (1, 3))
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_two_stages_give_the_numbers_of_one(folder, tmp_path, mode):
    data, held_out = files(tmp_path / "data", 4), files(tmp_path / "held_out", HELD_OUT, 40)
    options = {"validation_dataset": held_out, "validation_steps": 2, "num_epochs": 1}
    train(tmp_path / "one", Module(folder), data, mode, **options)
    launch_data_process_task(Accelerator(1, mode, DEVICE), dataset_of(tmp_path / "data"),
                             Module(folder, "sft:data_process"), ModelLogger(tmp_path / "cache"),
                             validation_dataset=dataset_of(tmp_path / "held_out"))
    second = Module(folder, "sft:train")
    train(tmp_path / "two", second, UnifiedDataset(str(tmp_path / "cache")), mode, validation_steps=2, num_epochs=1)
    assert (tmp_path / "one/validation.csv").read_bytes() == (tmp_path / "two/validation.csv").read_bytes()
    assert "text_encoder" not in second.pipe.models


def test_validating_changes_nothing_of_the_run(folder, tmp_path):
    validate(tmp_path / "with", Module(folder), use_ema=True)
    validate(tmp_path / "more", Module(folder), use_ema=True, validation_steps=1)
    assert differing_bits(state(tmp_path / "with")[0], state(tmp_path / "more")[0]) == 0


def test_with_a_moving_average_it_is_that_of_the_averaged_weights(folder, tmp_path):
    plain, averaged = (validate(tmp_path / name, Module(folder), use_ema=name == "averaged", ema_decay=0.5)
                       for name in ("plain", "averaged"))
    assert plain[0] == averaged[0] and plain[-1]["loss"] < averaged[-1]["loss"] < averaged[0]["loss"]


def test_a_resumed_run_has_the_rows_of_one_that_was_not_cut(folder, tmp_path):
    validate(tmp_path / "whole", Module(folder), max_train_steps=6)
    validate(tmp_path / "cut", Module(folder), max_train_steps=4)
    validate(tmp_path / "cut", Module(folder), max_train_steps=6, resume="auto")
    assert (tmp_path / "whole/validation.csv").read_bytes() == (tmp_path / "cut/validation.csv").read_bytes()


def test_class_images_are_left_out(folder, tmp_path):
    objective = Objective(weighting_scheme="none", prior_loss_weight=1.0)
    alone = Objective(weighting_scheme="none")
    prior = validate(tmp_path / "prior", Module(folder, objective=objective), class_dataset=rows(2, 60))
    assert prior[0] == validate(tmp_path / "alone", Module(folder, objective=alone))[0]


def test_a_task_without_noise_levels_has_one_column(folder, tmp_path):
    data = [row | {"seed": k} for k, row in enumerate(rows(HELD_OUT))]
    module = Module(folder, "direct_distill", DirectDistillation(distill_steps=2))
    train(tmp_path / "run", module, data, validation_dataset=data, validation_steps=2, num_epochs=1)
    assert [sorted(row) for row in found(tmp_path / "run")] == [["loss", "step"]] * 3


def test_rows_that_are_held_out_are_chosen_by_the_seed_and_not_trained_on(tmp_path):
    data = files(tmp_path / "data", 10)
    kept, held_out = data.split(0.3, 42)
    names = [row["image"] for row in data.rows]
    assert len(held_out) == 3 and len(kept) == 7
    assert sorted(row["image"] for part in (kept, held_out) for row in part.rows) == sorted(names)
    assert [row["image"] for row in kept.rows] == [name for name in names if name in {r["image"] for r in kept.rows}]
    assert data.split(0.3, 42)[1].rows == held_out.rows != data.split(0.3, 43)[1].rows
    assert data.fingerprint() != kept.fingerprint() and kept.numbers == [names.index(r["image"]) for r in kept.rows]
    with pytest.raises(DataError, match=r"has 1 rows: a share of 0.5 held out leaves none"):
        files(tmp_path / "one", 1).split(0.5, 0)


def test_what_cannot_be_validated(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"validation_steps=2 with Own.forward: .*Remove forward"):
        validate(tmp_path / "own", Own(folder))
    with pytest.raises(ConfigError, match="validation_steps=2, but no images are held out"):
        validate(tmp_path / "none", Module(folder), validation_dataset=None)


@pytest.mark.parametrize("settings, text", [
    ({"validation_steps": 5}, "validation_steps=5 without images that are held out: set validation_share"),
    ({"validation_share": 0.1}, "validation_share would not be used: set validation_steps"),
    ({"validation_share": 0.1, "validation_steps": 5, "validation_base_path": "d"}, "are both set"),
    ({"validation_share": 0.7, "validation_steps": 5}, "expected 0 < validation_share <= 0.5")])
def test_settings_that_do_not_fit(settings, text):
    with pytest.raises(ConfigError, match=text):
        load_config(family="toy", dataset_base_path="data", num_epochs=1, **settings)


@pytest.mark.fault
def test_a_signal_in_the_first_validation_is_obeyed(folder, tmp_path, monkeypatch):
    """Nothing is written of it; the resumed run makes it."""
    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)  # unless it is given up

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Validation, "_losses", interrupted)
        validate(tmp_path / "run", Module(folder))
    assert not (tmp_path / "run/validation.csv").exists() and (tmp_path / "run/step-0.safetensors").is_file()
    assert [row["step"] for row in validate(tmp_path / "run", Module(folder), resume="auto")] == [0, 2, 4]
