"""What a run tells its launcher: each phase begins with a heartbeat, so that a hang is told from a long save."""
from __future__ import annotations

from toy_run import Module, rows, train

from ms_diffsynth.training import logger, prepared, trainer
from ms_diffsynth.training.hooks import checkpoints


def test_steps_are_told_apart_from_what_may_take_longer(folder, tmp_path, monkeypatch):
    beats = []
    for module in (checkpoints, logger, trainer):
        monkeypatch.setattr(module, "beat", lambda step, phase="step": beats.append((step, phase)))
    train(tmp_path / "run", Module(folder), rows(2), "graph", max_train_steps=2, num_epochs=None)
    assert beats == [(0, "prepare"), (1, "step"), (1, "compile"), (2, "step"), (3, "save"), (3, "checkpoint")]


def test_each_row_that_is_prepared_says_that_it_goes_on(folder, tmp_path, monkeypatch):
    """However many there are, preparing is not taken for a hang."""
    told = []
    monkeypatch.setattr(prepared, "still", lambda: told.append(1))
    train(tmp_path / "run", Module(folder), rows(3), batch_size=3, max_train_steps=1, num_epochs=None)
    assert len(told) == 3
