"""Hooks of a run: when they are called, what they see, and how a run ends in one."""
from __future__ import annotations

import json
import os
import signal

import pytest
from device import DEVICE
from toy_run import Module, differing_bits, rows, state, toy_model, train

from ms_diffsynth import Hook
from ms_diffsynth.errors import DataError
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.signals import Stopped
from ms_diffsynth.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


class Noting(Hook):
    """Notes what happens, with the number of steps made."""

    def __init__(self, name, notes, fails_at=None):
        self.name, self.notes, self.fails_at = name, notes, fails_at

    def start(self, trainer):
        self.notes.append((self.name, "start", trainer.logger.num_steps, trainer.total))

    def after_step(self, trainer):
        self.notes.append((self.name, trainer.logger.num_steps, trainer.epoch, trainer.is_epoch_end, trainer.is_done))
        if trainer.logger.num_steps == self.fails_at:
            raise DataError("as asked")

    def end(self, trainer):
        self.notes.append((self.name, "end", trainer.logger.num_steps))


def test_hooks_are_called_in_order_and_at_the_end_in_reverse(folder, tmp_path):
    notes = []
    train(tmp_path / "run", Module(folder), rows(2), num_epochs=None, max_train_steps=3,
          hooks=[Noting("a", notes), Noting("b", notes)])
    assert notes == [("a", "start", 0, 3), ("b", "start", 0, 3), ("a", 1, 0, False, False), ("b", 1, 0, False, False),
                     ("a", 2, 0, True, False), ("b", 2, 0, True, False), ("a", 3, 1, False, True),
                     ("b", 3, 1, False, True), ("b", "end", 3), ("a", "end", 3)]


@pytest.mark.fault
def test_an_error_in_a_hook_ends_the_run_and_what_was_saved_stays(folder, tmp_path):
    notes = []
    with pytest.raises(DataError, match="as asked"):
        train(tmp_path / "run", Module(folder), rows(4), save_steps=1, hooks=[Noting("a", notes, fails_at=2)])
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stopped" and events[-1]["reason"] == "as asked"
    assert (tmp_path / "run/step-2.safetensors").is_file() and ("a", "end", 2) not in notes
    train(tmp_path / "run", Module(folder), rows(4), save_steps=1, resume="auto")
    train(tmp_path / "whole", Module(folder), rows(4), save_steps=1)
    assert differing_bits(state(tmp_path / "run")[0], state(tmp_path / "whole")[0]) == 0


@pytest.mark.fault
def test_a_signal_ends_what_looks_at_the_weights(folder, tmp_path):
    class Slow(Hook):
        finished = False

        def after_step(self, trainer):
            with trainer.looking() as is_wanted:
                if is_wanted and trainer.logger.num_steps == 2:
                    signal.raise_signal(signal.SIGTERM)
                    self.finished = sum(range(10**12)) > 0  # hours, unless it is given up

    hook = Slow()
    with pytest.raises(Stopped):
        train(tmp_path / "run", Module(folder), rows(4), hooks=[hook])
    assert not hook.finished and (tmp_path / "run/checkpoints/step-00000002").is_dir()


def test_a_trainer_is_complete_when_it_is_made(folder, tmp_path):
    """Nothing is written and no step made; single steps can be made by hand."""
    run = Trainer(Accelerator(1, "pynative", DEVICE), rows(3), Module(folder), ModelLogger(tmp_path / "run"),
                  TrainingOptions(num_epochs=2))
    assert (run.total, run.steps_per_epoch, run.step.batches, run.is_done) == (6, 3, 0, False)
    assert not (tmp_path / "run").exists()
    batch = next(iter(run.loader))
    assert run.compute(batch).is_update and run.step.batches == 1


def test_the_next_batch_is_made_while_the_device_is_at_work(folder, tmp_path, monkeypatch):
    """Before the numbers of the step before are read, which waits for the device; at the last step it is not made."""
    order = []
    inputs = Trainer.inputs
    monkeypatch.setattr(Trainer, "inputs", lambda self, batch: order.append("inputs") or inputs(self, batch))
    monkeypatch.setattr("ms_diffsynth.training.records.numbers_of", _noting(order, "read"))
    compute = Trainer.compute
    monkeypatch.setattr(Trainer, "compute", lambda self, *batch: order.append("step") or compute(self, *batch))
    train(tmp_path / "run", Module(folder), rows(3), num_epochs=1)
    assert order == ["inputs", "step", "inputs", "step", "inputs", "read", "step", "read", "read"]


def _noting(order, word):
    from ms_diffsynth.training.records import numbers_of

    def noted(*given):
        order.append(word)
        return numbers_of(*given)

    return noted


def test_a_step_reads_no_environment(folder, tmp_path, monkeypatch):
    """It is read when the run begins."""
    class Counted(dict):
        reads = 0

        def get(self, *given):
            Counted.reads += 1
            return super().get(*given)

        def __getitem__(self, name):
            Counted.reads += 1
            return super().__getitem__(name)

    class Count(Hook):
        seen = ()

        def after_step(self, trainer):
            self.seen += (Counted.reads,)

    monkeypatch.setattr(os, "environ", Counted(os.environ))
    hook = Count()
    train(tmp_path / "run", Module(folder), rows(6), num_epochs=1, hooks=[hook])
    assert Counted.reads and hook.seen[1] == hook.seen[4]


def test_what_goes_wrong_ahead_of_time_is_told_when_it_is_due(folder, tmp_path, monkeypatch):
    """The steps before it are made and recorded."""
    inputs, made = Trainer.inputs, []

    def failing(self, batch):
        made.append(batch)
        if len(made) == 3:
            raise DataError("the third batch cannot be made")
        return inputs(self, batch)

    monkeypatch.setattr(Trainer, "inputs", failing)
    with pytest.raises(DataError, match="the third batch"):
        train(tmp_path / "run", Module(folder), rows(4), save_steps=1)
    assert (tmp_path / "run/step-2.safetensors").is_file()
