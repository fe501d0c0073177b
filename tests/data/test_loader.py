"""Loader: the order is a function of (seed, epoch); nothing else changes it."""
from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ms_diffsynth.data import Batch, Loader, collate
from ms_diffsynth.data.loader import permutation
from ms_diffsynth.errors import ConfigError, DataError


class Numbers:
    """Items that know their position."""

    def __init__(self, length, broken=()):
        self.length, self.broken, self.threads = length, broken, set()

    def __len__(self):
        return self.length

    def __getitem__(self, position):
        self.threads.add(threading.current_thread().name)
        if position in self.broken:
            raise OSError("disk on fire")
        return {"position": position}


def epochs(loader, count=1):
    return [batch for _ in range(count) for batch in loader]


def rows(batches):
    return [batch.indices.tolist() for batch in batches]


def test_permutation_is_fixed():
    # The very numbers: a change here breaks the resumption of every run that is under way.
    assert permutation(8, 0, "order", 0).tolist() == [4, 6, 2, 7, 0, 5, 1, 3]
    assert sorted(permutation(1000, 1, "order", 2).tolist()) == list(range(1000))
    first = [permutation(50, 0, "order", epoch).tolist() for epoch in range(4)]
    assert len({tuple(order) for order in first}) == 4
    assert permutation(50, 1, "order", 0).tolist() != first[0]


def test_same_seed_same_order_and_every_row_once():
    one, two = epochs(Loader(Numbers(12), 4, seed=3), 2), epochs(Loader(Numbers(12), 4, seed=3), 2)
    assert rows(one) == rows(two) != rows(epochs(Loader(Numbers(12), 4, seed=4), 2))
    for epoch in (one[:3], one[3:]):
        assert sorted(np.concatenate(rows(epoch)).tolist()) == list(range(12))
    assert rows(one[:3]) != rows(one[3:])
    assert [item["position"] for item in one[1].items] == one[1].indices.tolist()
    assert one[0].indices.dtype == one[0].sample_indices.dtype == np.int64
    assert np.concatenate([batch.sample_indices for batch in one]).tolist() == list(range(24))


def test_without_shuffle():
    assert rows(epochs(Loader(Numbers(5), 2, shuffle=False, last="keep"))) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("last, expected", [
    ("repeat", [[0, 1], [2, 3], [4, 0]]), ("keep", [[0, 1], [2, 3], [4]]), ("drop", [[0, 1], [2, 3]]),
])
def test_last_batch(last, expected):
    loader = Loader(Numbers(5), 2, shuffle=False, last=last)
    assert len(loader) == len(expected)
    batches = epochs(loader, 2)
    assert rows(batches) == expected * 2
    count = sum(map(len, expected)) * 2
    assert np.concatenate([batch.sample_indices for batch in batches]).tolist() == list(range(count))


def test_repeat_with_fewer_rows_than_a_batch():
    assert rows(epochs(Loader(Numbers(2), 5, shuffle=False))) == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("last", ["repeat", "keep", "drop"])
@pytest.mark.parametrize("workers", [0, 3])
def test_seek_continues_exactly(last, workers):
    def loader():
        return Loader(Numbers(23), 4, seed=5, last=last, bucket_of=lambda i: i % 3, num_workers=workers,
                      class_dataset=Numbers(10), class_bucket_of=lambda i: i % 3)

    whole = epochs(loader(), 3)
    for step in (0, 1, len(loader()), len(loader()) + 2, 2 * len(loader()) - 1):
        resumed = loader()
        resumed.seek(step)
        epoch, position = divmod(step, len(resumed))
        assert resumed.state() == {"step": step, "epoch": epoch, "position": position}
        rest = epochs(resumed, 3 - epoch)
        assert rows(rest) == rows(whole[step:])
        assert [b.sample_indices.tolist() for b in rest] == [b.sample_indices.tolist() for b in whole[step:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_state_counts_what_was_given_not_what_was_loaded_ahead(workers):
    loader = Loader(Numbers(20), 2, num_workers=workers, prefetch=5)
    seen = []
    for batch in loader:
        seen.append(batch)
        if len(seen) == 3:
            break
    assert loader.state() == {"step": 3, "epoch": 0, "position": 3}
    assert rows(seen + epochs(loader)) == rows(epochs(Loader(Numbers(20), 2)))
    assert loader.state() == {"step": 10, "epoch": 1, "position": 0}


def test_batches_never_mix_buckets():
    loader = Loader(Numbers(31), 4, seed=1, bucket_of=lambda i: "wide" if i % 3 else "tall")
    for _ in range(3):
        batches = epochs(loader)
        for batch in batches:
            assert {"wide" if i % 3 else "tall" for i in batch.indices} == {batch.bucket}
            assert len(batch.indices) == 4
        assert {i for b in batches for i in b.indices.tolist()} == set(range(31))
        assert len(batches) == len(loader) == 5 + 3


@pytest.mark.parametrize("with_class", [False, True])
@pytest.mark.parametrize("last", ["repeat", "drop"])
def test_world_size_is_irrelevant(last, with_class):
    def batches(batch_size, rank, world_size):
        extra = {"class_dataset": Numbers(9), "class_bucket_of": lambda i: i % 2} if with_class else {}
        return epochs(Loader(Numbers(29), batch_size, seed=7, last=last, bucket_of=lambda i: i % 2, rank=rank,
                             world_size=world_size, **extra), 2)

    one, two = batches(4, 0, 1), list(zip(batches(2, 0, 2), batches(2, 1, 2)))
    assert len(one) == len(two) > 4
    for whole, parts in zip(one, two):
        assert {whole.bucket} == {part.bucket for part in parts}
        halves = [slice(0, 2), slice(2, 4)] if with_class else [slice(None)]
        for field in ("indices", "sample_indices"):
            joined = np.concatenate([getattr(part, field)[half] for half in halves for part in parts])
            assert joined.tolist() == getattr(whole, field).tolist()


def test_class_half():
    loader = Loader(Numbers(10), 2, seed=0, class_dataset=Numbers(3))
    batches = epochs(loader, 3)
    for batch in batches:
        assert len(batch.items) == 4
        assert [item["position"] for item in batch.items] == batch.indices.tolist()
    class_rows = [i for batch in batches for i in batch.indices[2:].tolist()]
    assert len(class_rows) == 30
    cycles = [tuple(class_rows[i:i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(cycle) == [0, 1, 2] for cycle in cycles) and len(set(cycles)) > 1  # cycles, in changing order
    assert sorted(i for batch in batches[:5] for i in batch.indices[:2].tolist()) == list(range(10))
    assert np.concatenate([batch.sample_indices for batch in batches]).tolist() == list(range(60))


def test_class_set_lacks_a_bucket():
    with pytest.raises(DataError, match=r"no image of bucket tall, which the data set has.*Add class images"):
        Loader(Numbers(4), bucket_of=lambda i: "tall", class_dataset=Numbers(2), class_bucket_of=lambda i: "wide")
    with pytest.raises(ConfigError, match="only one of bucket_of and class_bucket_of"):
        Loader(Numbers(4), bucket_of=lambda i: 0, class_dataset=Numbers(2))


def test_threads_load_and_keep_the_order():
    class Uneven(Numbers):
        def __getitem__(self, position):
            time.sleep(0.004 if position % 3 else 0)
            return super().__getitem__(position)

    data = Uneven(24)
    batches = epochs(Loader(data, 3, seed=2, num_workers=4))
    assert rows(batches) == rows(epochs(Loader(Numbers(24), 3, seed=2)))
    assert all([i["position"] for i in b.items] == b.indices.tolist() for b in batches)
    assert all(name.startswith("loader") for name in data.threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_failing_item_raises_when_its_batch_is_due(workers):
    loader = Loader(Numbers(12, broken=[7]), 2, shuffle=False, num_workers=workers, prefetch=4)
    given = []
    with pytest.raises(DataError, match=r"item 7 of the data set cannot be loaded \(OSError: disk on fire\)"):
        for batch in loader:
            given.append(batch)
    assert rows(given) == [[0, 1], [2, 3], [4, 5]] and loader.state()["step"] == 3
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_drop_warns_of_buckets_that_never_come(caplog):
    loader = Loader(Numbers(9), 4, last="drop", bucket_of=lambda i: "rare" if i == 0 else "common")
    assert len(loader) == 2 and "rare" in caplog.text and "leaves out all items" in caplog.text
    with pytest.raises(DataError, match=r"3 items in 1 buckets are too few.*= 4 with last='drop'"):
        Loader(Numbers(3), 4, last="drop")


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 0}, "batch_size=0"),
    ({"rank": 2, "world_size": 2}, "rank=2 of world_size=2"),
    ({"last": "fold"}, "last='fold': expected 'repeat', 'keep' or 'drop'"),
    ({"last": "keep", "world_size": 2}, "last='keep' with world_size=2"),
])
def test_impossible_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        Loader(Numbers(4), **options)


def test_empty():
    with pytest.raises(DataError, match="the data set is empty"):
        Loader(Numbers(0))
    with pytest.raises(DataError, match="the class data set is empty"):
        Loader(Numbers(1), class_dataset=Numbers(0))
    with pytest.raises(ConfigError, match="step=-1"):
        Loader(Numbers(1)).seek(-1)


def test_batch_is_frozen():
    batch = next(iter(Loader(Numbers(1))))
    assert isinstance(batch, Batch)
    with pytest.raises(AttributeError):
        batch.bucket = 3


# ---- collate

def test_collate_stacks():
    items = [{"x": np.full((2, 3), i, np.float16), "scale": i / 2, "count": i, "flag": i == 1, "s": np.float32(i)}
             for i in range(3)]
    batch = collate(items)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "x": ((3, 2, 3), "float16"), "scale": ((3,), "float32"), "count": ((3,), "int64"), "flag": ((3,), "bool"),
        "s": ((3,), "float32")}
    assert batch["x"][2, 0, 0] == 2 and batch["scale"].tolist() == [0, 0.5, 1]
    assert collate([{"a": 0}, {"a": 0.5}])["a"].dtype == np.float32


@pytest.mark.parametrize("values, words", [
    ([np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((3, 2))],
     r"field x.*float64 \[2, 3\] in rows 5, 6; .*\[3, 2\] in rows 9"),
    ([np.zeros(2), np.zeros(2), np.zeros(2, np.float32)], r"field x.*float64.*float32 \[2\] in rows 9"),
    ([1.0, 2.0, np.zeros(1)], r"a number in rows 5, 6; float64 \[1\] in rows 9"),
    ([1, 2, "a"], r"field x of row 9 is of type str; expected an array or a number"),
    ([True, 1, 1], r"a truth value in rows 5; a number in rows 6, 9"),
])
def test_collate_refuses(values, words):
    with pytest.raises(DataError, match=words):
        collate([{"x": value} for value in values], rows=np.array([5, 6, 9]))


def test_collate_refuses_differing_fields():
    with pytest.raises(DataError, match="field b is only in one of rows 0 and 1"):
        collate([{"a": 1}, {"a": 1, "b": 2}])
    with pytest.raises(DataError, match="an empty batch"):
        collate([])
