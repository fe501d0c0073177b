"""What is told of a step that was not finite: its rows, by the names their owner knows, and the last 20 in a row."""
from __future__ import annotations

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import UnifiedDataset
from ms_diffsynth.data.loader import Batch
from ms_diffsynth.errors import TrainingError
from ms_diffsynth.storage.cache import Kind, PlannedRow
from ms_diffsynth.training.prepared import CachedRows, PreparedRows, name_row, rows_of
from ms_diffsynth.training.records import StepReport
from ms_diffsynth.training.step import StepResult


def batch(indices, samples):
    numbers = np.array(indices), np.array(samples)
    return Batch(indices=numbers[0], sample_indices=numbers[1], items=[None] * len(indices), bucket=None,
                 everywhere=numbers)


def files(folder, count=3, repeat=4):
    folder.mkdir()
    for k in range(count):
        Image.new("RGB", (16, 16)).save(folder / f"{k}.png")
    (folder / "m.csv").write_text("\n".join(["image,prompt", *(f"{k}.png,text" for k in range(count))]))
    return UnifiedDataset(str(folder), str(folder / "m.csv"), repeat, "image")


def cached(count):
    planned = [PlannedRow(f"key{k}", f"cat{k}.png") for k in range(count)]
    cache = SimpleNamespace(rows=lambda name: planned, kind=lambda key: Kind((16, 16), {}))
    return CachedRows(cache, "instance", None, repeat=2)


def test_the_names_of_rows_in_every_kind_of_data_set(tmp_path):
    dataset = files(tmp_path / "data")
    for kind in (dataset, PreparedRows(dataset, None, None)):
        assert rows_of(batch([0, 11, 4], [7, 8, 9]), kind) == [
            {"row": 1, "name": "0.png", "sample": 7}, {"row": 3, "name": "2.png", "sample": 8},
            {"row": 2, "name": "1.png", "sample": 9}]  # 11 is row 2 again, counted from 0
    assert rows_of(batch([5], [40]), cached(3)) == [{"row": 3, "name": "cat2.png", "sample": 40}]
    plain = [{"image": None}] * 2
    for kind in (plain, PreparedRows(plain, None, None)):
        assert rows_of(batch([1], [3]), kind) == [{"row": 2, "name": "row 2", "sample": 3}]


def test_class_images_are_told_apart():
    found = rows_of(batch([0, 1, 3, 0], [4, 5, 6, 7]), cached(2), cached(9))
    assert [(row["name"], row.get("set")) for row in found] == [
        ("cat0.png", None), ("cat1.png", None), ("cat3.png", "class"), ("cat0.png", "class")]
    assert name_row(found[2]) == "class image cat3.png (row 4, sample 6)"
    assert name_row({"row": 2, "name": "row 2", "sample": 3}) == "row 2 (sample 3)"


class Records:
    def __init__(self):
        self.events, self.steps = [], []

    def event(self, event, **values):
        self.events.append((event, values))

    def log_step(self, record):
        self.steps.append(record)


class Progress:
    def __init__(self):
        self.said, self.shown = [], []

    def say(self, text):
        self.said.append(text)

    def advance(self, **shown):
        self.shown.append(shown)


@pytest.fixture
def report():
    return StepReport(Records(), Progress(), SimpleNamespace(compile_seconds=0.0), cached(5))


def result(loss, norm=None):
    is_finite = None if norm is None else Tensor(bool(np.isfinite(norm) and np.isfinite(loss)))
    numbers = None if norm is None else Tensor(np.float32([loss, norm, bool(is_finite.asnumpy())]))
    return StepResult(Tensor(loss, ms.float32), (), None if norm is None else Tensor(norm, ms.float32), is_finite,
                      norm is not None, numbers)


def step(report, number, losses, norm):
    """A step of as many micro-steps as there are losses, of one row each."""
    for k, loss in enumerate(losses):
        report.begin()
        last = result(loss, norm if k == len(losses) - 1 else None)
        report.add(last, batch([(10 * number + k) % 5], [10 * number + k]), 1)
    report.flush()
    report.end(last, {"step": number, "epoch": 0, "learning_rate": 0.1})


def test_a_skipped_step_names_the_rows_of_all_its_micro_steps(report):
    for number, losses, norm in ((1, [1.0, 3.0], 2.0), (2, [1.0, np.nan, 1.0], np.nan), (3, [1.0, 1.0], np.inf)):
        step(report, number, losses, norm)
    report.flush()
    assert [record["loss"] for record in report.logger.steps][::2] == [2.0, 1.0]
    assert [record["is_skipped"] for record in report.logger.steps] == [0, 1, 1]
    (event, second), (_, third) = report.logger.events
    assert event == "skipped" and (second["at"], third["at"]) == (2, 3) and np.isnan(second["loss"])
    assert second["rows"] == [{"row": k + 1, "name": f"cat{k}.png", "sample": 20 + k} for k in range(3)]
    assert [row["sample"] for row in third["rows"]] == [30, 31]
    assert report.progress.said == [
        "step 2 was not finite and changed nothing: loss nan, gradient norm nan; cat0.png (row 1, sample 20), "
        "cat1.png (row 2, sample 21), cat2.png (row 3, sample 22)",
        "step 3 was not finite and changed nothing: loss 1, gradient norm inf; cat0.png (row 1, sample 30), "
        "cat1.png (row 2, sample 31)"]
    assert report.skipped == report.skipped_in_a_row == 2 and report.progress.shown[-1]["skipped"] == "2"


def test_twenty_in_a_row_end_the_run_and_nineteen_do_not(report):
    for number in range(1, 20):
        step(report, number, [np.nan], np.nan)
    step(report, 20, [1.0], 1.0)
    for number in range(21, 41):
        step(report, number, [1.0], np.inf)
    with pytest.raises(TrainingError, match=r"20 steps in a row .*\(last: step 40, .*ms-diffsynth replay"):
        report.flush()
    assert report.skipped == 39 and len(report.logger.events) == 39


@pytest.mark.fault
def test_a_loss_that_rises_suddenly_is_told_with_its_rows(report):
    losses = [*np.random.default_rng(0).uniform(0.1, 2.0, 40), 20.0, 1.0, np.nan, 3.0]
    for number, loss in enumerate(losses, 1):
        step(report, number, [loss], 1.0 if np.isfinite(loss) else np.nan)
    report.flush()
    (event, rose), (other, _) = report.logger.events
    assert (event, other) == ("loss_rose", "skipped") and rose["at"] == 41 and rose["loss"] == 20.0
    assert 0.8 < rose["average"] < 1.3 and [row["sample"] for row in rose["rows"]] == [410]
    assert report.progress.said[0].startswith("step 41 has a loss of 20, ")


def test_the_first_losses_are_no_measure(report):
    for number, loss in enumerate([0.01, 5.0, 0.01, 7.0], 1):
        step(report, number, [loss], 1.0)
    report.flush()
    assert report.logger.events == []
