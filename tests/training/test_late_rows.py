"""A row that cannot be prepared is found when it is due: the steps before it are saved, and a run continues there."""
from __future__ import annotations

import json

import numpy as np
import pytest
import ranks
import toy_run
from damaged_entries import flip
from records import table

from ms_diffsynth import UnifiedDataset
from ms_diffsynth.errors import CacheError, DataError
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.storage.checkpoint import latest
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.two_stage import launch_data_process_task

pytestmark = pytest.mark.fault


def train(path, folder, data, **options):
    toy_run.train(path, toy_run.Module(folder), data, options.pop("mode", "pynative"),
                  **{"num_epochs": 2, "max_train_steps": None, "sampler": None, **options})


def damaged(path):
    """What the bytes of an image were, of which one in the middle is wrong now."""
    sound = path.read_bytes()
    broken = bytearray(sound)
    broken[len(sound) // 2] ^= 1
    path.write_bytes(broken)
    return sound


def row_due(folder, tmp_path, place):
    """The file that is due as number ``place`` of the first epoch."""
    seen = []
    data = toy_run.files(tmp_path / "order", 6)
    load = data.cells
    data.cells = lambda index, fields=None: seen.append(index) or load(index, fields)
    train(tmp_path / "seen", folder, data, num_epochs=1)
    return f"{seen[place]}.png"


@pytest.mark.parametrize("accumulation, place, steps", [(1, 3, 3), (2, 3, 1), (1, 0, None)],
                         ids=["between steps", "within a step", "the first"])
@pytest.mark.few(1)
def test_an_image_that_only_decoding_shows_to_be_damaged(folder, tmp_path, accumulation, place, steps):
    """It is named, and what is trained until then is kept, also when it is due in the middle of a step."""
    name, data = row_due(folder, tmp_path, place), toy_run.files(tmp_path / "data", 6)
    options = {"accumulation": accumulation}
    sound = damaged(tmp_path / "data" / name)
    with pytest.raises(DataError, match=name):
        train(tmp_path / "run", folder, data, **options)
    if steps is None:
        assert not (tmp_path / "run/loss.csv").exists(), "nothing is written before the first step is known to go well"
        return
    assert latest(tmp_path / "run/checkpoints").step == steps and len(table(tmp_path / "run")) == 1 + steps
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stopped" and name in events[-1]["reason"]
    (tmp_path / "data" / name).write_bytes(sound)
    train(tmp_path / "run", folder, data, resume="auto", accept_changes=("data",), **options)
    train(tmp_path / "whole", folder, data, **options)
    assert table(tmp_path / "run") == table(tmp_path / "whole")


def test_an_entry_of_a_cache_with_a_wrong_bit(folder, tmp_path):
    """Stage two begins without reading the cache, and finds the entry when it is due."""
    launch_data_process_task(Accelerator(1, "pynative", toy_run.DEVICE), toy_run.files(tmp_path / "data", 6),
                             toy_run.Module(folder, "sft:data_process"), ModelLogger(tmp_path / "cache"))
    cache = Cache(tmp_path / "cache")
    name = row_due(folder, tmp_path, 3)
    flip(cache._path(next(row.key for row in cache.rows("instance") if row.label == name)))
    with pytest.raises(CacheError, match=name):
        toy_run.train(tmp_path / "run", toy_run.Module(folder, "sft:train"), UnifiedDataset(str(tmp_path / "cache")),
                      "pynative", num_epochs=1, max_train_steps=None)
    assert latest(tmp_path / "run/checkpoints").step == 3


@pytest.mark.slow
def test_rows_of_one_rank_end_all_ranks_and_are_saved(folder, tmp_path):
    """Two ranks, of which the second one cannot prepare a row of its third batch: both say why, two steps are saved."""
    toy_run.files(tmp_path / "data", ranks.ROWS)
    ended = ranks.start(2, folder, tmp_path / "data", tmp_path, "bad row")
    said = [one.stdout for one in ended]
    assert all(one.returncode not in (0, None) for one in ended), "\n".join(said)
    assert "the bad row" in said[1] and "another rank cannot make its next batch" in said[0]
    assert latest(tmp_path / "bad row/checkpoints").step == 2
    assert np.isfinite([float(row.split(",")[2]) for row in table(tmp_path / "bad row")[1:]]).all()
