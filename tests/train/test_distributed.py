"""Several ranks train as one with their batches together; checkpoints of any number are read by any other."""
from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import ranks
from toy_run import files, rows, state, toy_model

from ms_diffsynth.io.checkpoint import latest

CI = ("lora", "prior", "own forward", "bad sample", "zero 1", "zero 2 eager", "cache")
REST = ("lora eager", "full", "zero 2", "zero 1 eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


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
            ranks.cache(folder, data, out) if name == "cache" else ranks.run(name, folder, data, out, **ranks.RUNS[name])
        return out

    return made


def job(tmp_path, folder, data, count, *names):
    ended = ranks.start(count, folder, data, tmp_path, *names)
    assert [e.returncode for e in ended] == [0] * count, "\n".join(e.stdout for e in ended)
    said = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(count)]
    assert all(s == said[0] for s in said)  # every rank ends with the same weights, to the bit
    return tmp_path


def numbers(path):
    with open(path / "loss.csv", newline="") as file:
        return np.array([[float(row[c]) for c in ("loss", "grad_norm", "learning_rate", "is_skipped")]
                         for row in csv.DictReader(file)])


def same(one, two, name):
    """Both runs agree but for the order of summation. Returns: the largest relative difference of a loss."""
    a, b = numbers(one / name), numbers(two / name)
    assert a.shape == b.shape and len(a) and np.array_equal(a[:, 2:], b[:, 2:])
    finite = np.isfinite(a[:, 0])
    assert np.array_equal(finite, np.isfinite(b[:, 0]))
    worst = float(np.abs(a[finite, 0] / b[finite, 0] - 1).max())
    assert worst < 1e-6 and np.allclose(a[finite, 1], b[finite, 1], rtol=1e-5), (name, worst)
    return worst


def check(tmp_path, alone, names):
    for name in names:
        if name != "cache":
            same(alone(name), tmp_path, name) if name != "cache" else None
            assert not list((tmp_path / name).glob("**/.tmp-*")), name


def test_two_ranks_train_as_one(folder, data, alone, tmp_path):
    job(tmp_path, folder, data, 2, *CI)
    check(tmp_path, alone, CI)
    events = [json.loads(line) for line in (tmp_path / "bad sample/events.jsonl").read_text().splitlines()]
    skipped = next(event for event in events if event["event"] == "skipped")
    assert {row["sample"] for row in skipped["rows"]} == set(range(8, 16))  # of both ranks
    assert sum(numbers(tmp_path / "bad sample")[:, 3]) == 1
    entries = [sorted((base / "cache").rglob("*.safetensors")) for base in (tmp_path, alone("cache"))]
    assert len(entries[0]) == ranks.ROWS
    assert [(p.name, p.read_bytes()) for p in entries[0]] == [(p.name, p.read_bytes()) for p in entries[1]]
    assert (tmp_path / "cache/cache.json").read_bytes() == (alone("cache") / "cache/cache.json").read_bytes()


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
