"""Evaluation while a run goes on: what it writes, with which weights, and that it goes on with the run."""
from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
from mindspore import ops
from PIL import Image
from records import records
from toy_run import SIDE, Module, rows, train

from ms_diffsynth.config import load_config
from ms_diffsynth.data.plots import kid_curve
from ms_diffsynth.errors import ConfigError, DataError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.run.samples import build_sampler
from ms_diffsynth.training.hooks.evaluation import COLUMNS
from ms_diffsynth.training.signals import Stopped


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp("real")
    for k, row in enumerate(rows(6)):
        row["image"].save(path / f"{k}.png")
    return path


class Run:
    """A run of the toy family that evaluates four gray pictures, as bright as what it trains is large."""

    def __init__(self, folder, real, output):
        self.module, self.output, self.real, self.seen = Module(folder), output, real, []

    def sampler(self, count=2):
        size = float(sum(ops.abs(p).sum() for p in self.module.trainable_parameters()))
        self.seen.append((count, size))
        return [Image.new("RGB", (SIDE, SIDE), (int(10 * size) % 256, 40 * k, 0)) for k in range(count)]

    def train(self, steps, **options):
        options = {"evaluation_steps": 2, "evaluation_count": 4, "evaluation_reference": str(self.real)} | options
        train(self.output, self.module, rows(4), max_train_steps=steps, num_epochs=None, sampler=self.sampler,
              **options)
        return self


def events(folder):
    return [record for line in (folder / "events.jsonl").read_text().splitlines()
            if (record := json.loads(line))["event"] == "evaluation"]


def test_before_between_and_at_the_end(folder, real, tmp_path):
    run = Run(folder, real, tmp_path / "run").train(5)
    found = records(run.output, "evaluation.csv")
    assert tuple(found[0]) == COLUMNS and [row["step"] for row in found] == ["0", "2", "4", "5"]
    assert [count for count, _ in run.seen] == [2, 4, 4, 4, 4, 2]  # samples at the begin and at the end only
    told = events(run.output)
    assert [(e["step"], e["pictures"], e["reference"]) for e in told] == [(k, 4, str(real)) for k in (0, 2, 4, 5)]
    assert all(abs(float(row[name]) - e[name]) < 1e-6 for row, e in zip(found, told) for name in COLUMNS[1:])
    assert len({row["kid"] for row in found}) == 4  # other weights, other pictures
    assert sorted(path.name for path in (run.output / "samples").glob("nearest-*.png")) == [
        f"nearest-step-{k}.png" for k in (0, 2, 4, 5)]
    assert Image.open(run.output / "kid.png").size == (800, 480)


def test_the_moving_average_is_what_is_evaluated(folder, real, tmp_path):
    run = Run(folder, real, tmp_path / "run").train(4, use_ema=True, ema_decay=0.5, save_steps=4)
    average = load_state_dict(str(tmp_path / "run/step-4-ema.safetensors"))
    size = float(sum(np.abs(value).sum() for value in average.values()))
    assert run.seen[-1][1] == pytest.approx(size, rel=1e-5)
    assert run.sampler()[0] and run.seen[-1][1] != pytest.approx(size, rel=1e-5)  # afterwards: the weights themselves


@pytest.mark.slow
def test_it_goes_on_with_the_run(folder, real, tmp_path):
    whole = Run(folder, real, tmp_path / "whole").train(5)
    Run(folder, real, tmp_path / "cut").train(3, checkpoint_steps=2)
    resumed = Run(folder, real, tmp_path / "cut").train(5, resume="auto", checkpoint_steps=2)
    found, expected = records(resumed.output, "evaluation.csv"), records(whole.output, "evaluation.csv")
    assert [row["step"] for row in found] == ["0", "2", "3", "4", "5"]  # the first run ended with 3
    assert [row for row in found if row["step"] != "3"] == expected


@pytest.mark.slow
def test_a_signal_gives_up_the_pictures_and_saves_first(folder, real, tmp_path):
    run = Run(folder, real, tmp_path / "cut")
    made = run.sampler

    def sampler(count=2):
        if run.seen and run.seen[-1][0] == 4 and len(run.seen) > 2:  # the evaluation after step 4
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
            not_given_up.append(count)
        return made(count)

    run.sampler, not_given_up = sampler, []
    with pytest.raises(Stopped):
        run.train(5, checkpoint_steps=2, use_ema=True)
    assert not not_given_up and [row["step"] for row in records(run.output, "evaluation.csv")] == ["0", "2"]
    run = Run(folder, real, tmp_path / "cut").train(5, resume="auto", checkpoint_steps=2, use_ema=True)
    assert [row["step"] for row in records(run.output, "evaluation.csv")] == ["0", "2", "4", "5"]
    whole = Run(folder, real, tmp_path / "other").train(5, use_ema=True)
    assert records(run.output, "evaluation.csv") == records(whole.output, "evaluation.csv")


def test_what_cannot_be_meant(folder, real, tmp_path):
    run = Run(folder, real, tmp_path / "run")
    run.sampler = None
    with pytest.raises(ConfigError, match="no images are made: set sample_prompts"):
        run.train(2)
    run = Run(folder, real, tmp_path / "run")
    with pytest.raises(ConfigError, match="set evaluation_reference"):
        run.train(2, evaluation_reference=None)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        run.train(2, evaluation_reference="nowhere")
    with pytest.raises(ConfigError, match="evaluation_steps=0: expected 1 <= evaluation_steps"):
        run.train(2, evaluation_steps=0)
    assert not run.output.exists()


def test_settings_that_do_not_fit():
    given = {"dataset_base_path": "data", "max_train_steps": "9", "model_paths": "m"}
    for more, text in (({"evaluation_count": "3", "family": "ddpm_unet"}, "evaluation_count=3"),
                       ({"evaluation_steps": "5", "family": "ddpm_unet", "task": "sft:train"}, "data set is a cache")):
        with pytest.raises(ConfigError, match=text):
            load_config(None, given | more)


@pytest.mark.parametrize("count, batches", [(None, [3]), (2, [3]), (3, [3]), (7, [3, 3, 3])])
def test_pictures_without_prompts_come_in_batches_of_one_size(count, batches):
    class Pipe:
        inputs, calls = (), []

        def check_sampler(self, name):
            assert name is None

        def __call__(self, batch_size, seed, **how):
            self.calls.append((batch_size, seed))
            return [(seed, k) for k in range(batch_size)]

    settings = load_config(None, {"dataset_base_path": "d", "max_train_steps": "9", "family": "ddpm_unet",
                                  "sample_count": "3", "model_paths": "m", "sample_seed": "5"})
    pipe = Pipe()
    pipe.calls = []
    sampler, captions = build_sampler(settings, pipe)
    pictures = sampler() if count is None else sampler(count)
    assert pipe.calls == [(3, 5 + k) for k in range(len(batches))] and captions == []
    assert len(pictures) == (count or 3) == len(set(pictures))


def test_the_curve_shows_value_interval_and_floor():
    given = [{"step": k, "kid": 0.9 - 0.1 * k, "kid_low": 0.8 - 0.1 * k, "kid_high": 1 - 0.1 * k, "kid_floor": 0.05}
             for k in range(8)]
    pixels = np.asarray(kid_curve(given)).astype(int)[64:420, 80:770]
    strong = np.nonzero(pixels[..., 2] - pixels[..., 0] > 150)
    assert strong[0][strong[1] < 50].mean() < strong[0][strong[1] > 600].mean() - 200  # KID falls
    assert ((pixels[..., 2] > pixels[..., 0] + 10) & (pixels[..., 0] > 200)).sum() > 5000  # the band around it
    assert kid_curve(given[:1]).size == (800, 480)
