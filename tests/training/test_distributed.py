"""Several ranks train as one with their batches together; checkpoints of any number are read by any other."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
from records import column
from toy_run import files, state

from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.launch.ports import free_port
from ms_diffsynth.storage.checkpoint import latest

CI = ("bad sample", "zero 2 eager", "cache")
REST = ("lora", "prior", "own forward", "zero 1", "lora eager", "full", "zero 2", "zero 1 eager")
OTHERS = ("zero 2 prodigy", "adafactor")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    base = tmp_path_factory.mktemp("data") / "set"
    files(base, ranks.ROWS)
    return base


@pytest.fixture(scope="module")
def alone(tmp_path_factory, folder, data):
    """``alone(name)``: the folder of runs, in which that one was made by a single process."""
    out = tmp_path_factory.mktemp("alone")

    def made(name):
        if not (out / name).is_dir():
            ranks.make(name, folder, data, out)
        return out

    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory, folder, data):
    """The folder of the runs `CI`, made by two ranks."""
    return job(tmp_path_factory.mktemp("two"), folder, data, 2, *CI)


def job(tmp_path, folder, data, count, *names):
    said = ends([0] * count, folder, data, tmp_path, *names)
    assert all(f"leaves with policy {os.SCHED_BATCH}" in one for one in said)  # see runtime._yield_to_others
    digests = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(count)]
    assert all(d == digests[0] for d in digests)  # every rank ends with the same weights, to the bit
    return tmp_path


def ends(codes, *words):
    """A job whose ranks end with these codes. Returns: what each of them said."""
    ended = ranks.start(len(codes), *words)
    said = [one.stdout for one in ended]
    assert [one.returncode for one in ended] == codes, "\n".join(said)
    return said


def numbers(path):
    return np.stack([column(path, name) for name in ("loss", "grad_norm", "learning_rate", "is_skipped")], 1)


def same(one, two, name):
    """Both runs agree but for the order of summation. Returns: the largest relative difference of a loss."""
    a, b = numbers(one / name), numbers(two / name)
    assert a.shape == b.shape and len(a) and np.array_equal(a[:, 2:], b[:, 2:])
    finite = np.isfinite(a[:, 0])
    assert np.array_equal(finite, np.isfinite(b[:, 0]))
    worst = float(np.abs(a[finite, 0] / b[finite, 0] - 1).max())
    assert worst < 1e-6 and np.allclose(a[finite, 1], b[finite, 1], rtol=1e-5), (name, worst)
    return worst


def check(made, alone, names):
    for name in names:
        if name != "cache":
            same(alone(name), made, name)
        assert not list((made / name).glob("**/.tmp-*")), name


def test_two_ranks_train_as_one(alone, two):
    check(two, alone, CI)


@pytest.mark.fault
def test_a_bad_sample_is_skipped_by_all_and_named_with_all_rows_of_the_step(two):
    events = [json.loads(line) for line in (two / "bad sample/events.jsonl").read_text().splitlines()]
    skipped = next(event for event in events if event["event"] == "skipped")
    assert {row["sample"] for row in skipped["rows"]} == set(range(8, 16))  # of both ranks
    assert sum(numbers(two / "bad sample")[:, 3]) == 1


def test_two_ranks_write_the_cache_of_one(alone, two):
    entries = [sorted((base / "cache").rglob("*.safetensors")) for base in (two, alone("cache"))]
    assert len(entries[0]) == 2 * ranks.ROWS, "a row and a text each"
    assert [(p.name, p.read_bytes()) for p in entries[0]] == [(p.name, p.read_bytes()) for p in entries[1]]
    assert (two / "cache/cache.json").read_bytes() == (alone("cache") / "cache/cache.json").read_bytes()


def resumable(tmp_path, source):
    """The run "zero 2 eager", as it stood after its sixth step, where "resumed" looks for it."""
    place = tmp_path / "zero 2 eager at 6"
    shutil.copytree(source / "zero 2 eager", place)
    shutil.rmtree(place / "checkpoints/step-00000012")
    assert latest(place / "checkpoints").step == 6
    return place


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_run(folder, data, alone, tmp_path, count):
    job(tmp_path, folder, data, count, *CI, *REST)
    check(tmp_path, alone, (*CI, *REST))


@pytest.mark.slow
def test_two_ranks_train_as_one_with_other_optimizers(folder, data, alone, tmp_path):
    job(tmp_path, folder, data, 2, *OTHERS)
    check(tmp_path, alone, OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_order_of_summation_is_all_that_differs(folder, data, alone, tmp_path, count):
    """One process that adds up what each rank computes, in their order, has the same bits after 30 steps."""
    names = ("lora in order", "full in order")
    job(tmp_path, folder, data, count, *names)
    for name in names:
        single = name.replace("order", str(count))
        one, several = numbers(alone(single) / single), numbers(tmp_path / name)
        assert np.allclose(one[:, 0], several[:, 0], rtol=2e-7)  # the mean of losses is not computed in this order
        assert np.array_equal(one[:, 1:], several[:, 1:])
        files = [sorted((base / run).glob("epoch-*.safetensors"))[-1] for base, run in ((alone(single), single),
                                                                                       (tmp_path, name))]
        arrays = [load_state_dict(file) for file in files]
        assert all(np.array_equal(arrays[0][k], arrays[1][k]) for k in arrays[0])


@pytest.mark.slow
@pytest.mark.fault
def test_what_two_saved_four_go_on_from(folder, data, two, tmp_path):
    resumable(tmp_path, two)
    job(tmp_path, folder, data, 4, "resumed")
    assert np.allclose(numbers(tmp_path / "resumed"), numbers(two / "zero 2 eager"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.fault
def test_what_two_saved_one_and_two_go_on_from(folder, data, two, tmp_path):
    """To the same losses as without a cut, also where the moments were divided before and are not afterwards."""
    place = resumable(tmp_path, two)
    files = sorted(path.name for path in next((place / "checkpoints").glob("step-*")).iterdir())
    assert files == ["MANIFEST.json", "moments-00001-of-00002.safetensors", "moments-00002-of-00002.safetensors",
                     "pictures.safetensors", "state.json", "weights.safetensors"]
    by_two, by_one = tmp_path / "by two", tmp_path / "by one"
    for out in (by_two, by_one):
        shutil.copytree(place, out / place.name)
    job(by_two, folder, data, 2, "resumed")
    ranks.make("resumed", folder, data, by_one)
    whole = numbers(two / "zero 2 eager")
    assert np.array_equal(numbers(by_two / "resumed"), whole)  # the same ranks: every bit
    assert np.allclose(numbers(by_one / "resumed"), whole, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.fault
def test_what_one_saved_two_go_on_from(folder, data, alone, tmp_path):
    resumable(tmp_path, alone("zero 2 eager"))
    job(tmp_path, folder, data, 2, "resumed")
    assert np.allclose(numbers(tmp_path / "resumed"), numbers(alone("zero 2 eager") / "zero 2 eager"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.fault
def test_one_rank_is_asked_to_stop_and_all_stop_after_the_same_step(folder, data, alone, tmp_path):
    said = ends([143, 143], folder, data, tmp_path, "stopped")
    assert "SIGTERM: finishing this step" in said[1] and "finishing" not in said[0]
    assert "stopped by SIGTERM after step 6 of 30" in said[0]
    assert latest(tmp_path / "stopped/checkpoints").step == 6
    assert len(state(tmp_path / "stopped")[0]) > 10


@pytest.mark.slow
@pytest.mark.fault
def test_the_first_rank_is_asked_to_stop_while_it_makes_pictures(folder, data, tmp_path):
    said = ends([143, 143], folder, data, tmp_path, "stopped in pictures")
    assert "given up: a signal came" in said[0]
    assert latest(tmp_path / "stopped in pictures/checkpoints").step == 4
    assert [p.name for p in (tmp_path / "stopped in pictures/samples").iterdir()] == ["step-0.png"]


@pytest.mark.slow
@pytest.mark.fault
def test_ranks_that_would_not_train_the_same_are_refused(folder, data, tmp_path):
    said = ends([1, 1], folder, data, tmp_path, "another seed")
    cause = "ConfigError: the ranks would not train the same; unlike rank 0 are rank 1: seed."
    assert all(cause in one for one in said)


@pytest.mark.slow
@pytest.mark.fault
def test_a_rank_that_cannot_write_its_part_ends_all_and_leaves_nothing(folder, data, tmp_path):
    said = ends([1, 1], folder, data, tmp_path, "full disk")
    cause = "OutputError: the checkpoint of step 1 was not saved: rank 1: part cannot be written: ENOSPC"
    assert all(cause in one for one in said)
    assert [*(tmp_path / "full disk/checkpoints").glob("*")] == []


@pytest.mark.slow
def test_msrun_starts_the_same_script(folder, data, alone, tmp_path):
    command = [Path(sys.executable).with_name("msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True",
               f"--master_port={free_port('127.0.0.1')}", f"--log_dir={tmp_path / 'logs'}", ranks.__file__,
               folder, data, tmp_path, "own forward"]
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=os.environ | path, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    same(alone("own forward"), tmp_path, "own forward")
