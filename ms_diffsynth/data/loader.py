"""Loader: batches in an order that is computed from (seed, epoch), never stored, so that a few integers resume it."""
from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, UserError, listing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank trains on at one micro-step. With class images the second half of each field is theirs.

    Shapes: ``indices`` int64 [B], positions in the data set (class half: in the class data set); ``sample_indices``
    int64 [B], the number of each sample in the whole run over all ranks, never repeated: the key of its random draws.
    ``everywhere``: the same two of all ranks together, for reports.
    """

    indices: np.ndarray
    sample_indices: np.ndarray
    items: list[dict[str, Any]]
    bucket: Hashable
    everywhere: tuple[np.ndarray, np.ndarray]


def permutation(length: int, *key: object) -> np.ndarray:
    """A permutation of range(length), int64, that depends on ``key`` alone.

    Sorts raw Philox words rather than calling ``Generator.permutation``, whose stream may change between versions of
    NumPy (NEP 19).
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(length)
    return np.argsort(words, kind="stable")


class Loader:
    """Batches of ``batch_size`` items of one bucket each; iterating goes to the end of the present epoch.

    In each epoch every item comes once. Few buckets hold a multiple of the batch size: ``last="repeat"`` (the
    default) fills its last batch with the bucket's own first items of that epoch, so that these come twice, and every
    batch has the same shape; "keep" leaves that batch smaller (one more compilation); "drop" leaves its items out of
    this epoch.

    Rank r of W takes rows [r B, (r+1) B) of each global batch of W B: W ranks of batch size B see exactly what one rank
    of batch size W B sees, with the same ``sample_indices``.

    Args:
        dataset: anything with ``len`` and ``[position]`` -> dict.
        bucket_of: position -> bucket (anything hashable); None: all items have one shape.
        class_dataset: images of the class for prior preservation; each batch is then B items followed by B class
            items of the same bucket, which have an order and a cycle of their own.
        class_bucket_of: the same as ``bucket_of``, for the class data set.
        num_workers: threads that load items ahead; 0 loads when a batch is asked for. The order does not change.
        prefetch: how many batches they load ahead.

    Raises: ConfigError or DataError for what cannot make a single batch. An item that cannot be loaded raises when its
    batch is due.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        batch_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        last: str = "repeat",
        bucket_of: Callable[[int], Hashable] | None = None,
        class_dataset: Sequence[dict[str, Any]] | None = None,
        class_bucket_of: Callable[[int], Hashable] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} of world_size={world_size}: expected 0 <= rank < world_size")
        if last not in ("repeat", "keep", "drop"):
            raise ConfigError(f"last='{last}': expected 'repeat', 'keep' or 'drop'")
        if last == "keep" and world_size > 1:
            raise ConfigError(
                f"last='keep' with world_size={world_size}: the last batch would leave some ranks without rows. "
                "Use last='repeat' or 'drop'"
            )
        if class_dataset is not None and (bucket_of is None) != (class_bucket_of is None):
            raise ConfigError("only one of bucket_of and class_bucket_of is set: expected both or neither. Set both")
        self.dataset, self.class_dataset = dataset, class_dataset
        self.batch_size, self.seed, self.shuffle, self.last = batch_size, seed, shuffle, last
        self.rank, self.world_size, self.num_workers, self.prefetch = rank, world_size, num_workers, prefetch
        self._buckets = _bucket_list(dataset, bucket_of, "the data set")
        self._class_positions: dict[Hashable, np.ndarray] = {}
        if class_dataset is not None:
            buckets = _bucket_list(class_dataset, class_bucket_of, "the class data set")
            for bucket in dict.fromkeys(buckets):
                self._class_positions[bucket] = np.array([i for i, b in enumerate(buckets) if b == bucket], np.int64)
            missing = [b for b in dict.fromkeys(self._buckets) if b not in self._class_positions]
            if missing:
                raise DataError(
                    f"the class data set has no image of bucket {listing(missing)}, which the data set has; expected "
                    "at least one of each. Add class images of these shapes, or set buckets=1"
                )
        self.step = 0
        self._samples_per_epoch = 0
        first = self._plan(0)
        self._length = len(first)
        self._samples_per_epoch = sum(len(samples) for _, _, _, samples in first)
        total = batch_size * world_size
        if not first:
            raise DataError(
                f"{len(self._buckets)} items in {len(set(self._buckets))} buckets are too few for one batch of "
                f"batch_size x world_size = {total} with last='drop'. Use last='repeat', or a smaller batch_size"
            )
        short = [b for b in dict.fromkeys(self._buckets) if b not in {planned[0] for planned in first}]
        if short:
            logger.warning(
                "last='drop' leaves out all items of %d buckets that hold fewer than %d: %s", len(short), total,
                listing(short),
            )

    def __len__(self) -> int:
        """Batches per epoch: the same in every epoch, and on every rank."""
        return self._length

    def state(self) -> dict[str, int]:
        """The position of the loader: the next batch."""
        epoch, position = divmod(self.step, len(self))
        return {"step": self.step, "epoch": epoch, "position": position}

    def seek(self, step: int) -> None:
        """Continue at global batch number ``step`` of the run, which costs nothing. Not while an iteration runs."""
        if step < 0:
            raise ConfigError(f"step={step}: expected at least 0")
        self.step = step

    def __iter__(self) -> Iterator[Batch]:
        epoch, position = divmod(self.step, len(self))
        plan = self._plan(epoch)
        start = epoch * len(self)
        if not self.num_workers:
            for number in range(position, len(plan)):
                batch = self._batch(plan[number], lambda load, *args: load(*args))
                self.step = start + number + 1
                yield batch
            return
        with ThreadPoolExecutor(self.num_workers, "loader") as pool:
            ahead = deque()
            try:
                for number in range(position, len(plan)):
                    while len(ahead) <= self.prefetch and number + len(ahead) < len(plan):
                        ahead.append(self._batch(plan[number + len(ahead)], pool.submit))
                    pending = ahead.popleft()
                    items = [future.result() for future in pending.items]
                    self.step = start + number + 1
                    yield replace(pending, items=items)
            finally:
                pool.shutdown(cancel_futures=True)

    def _batch(self, planned: tuple, call: Callable) -> Batch:
        """This rank's part of a planned batch. Its items are loaded, or being loaded, by ``call(load, *arguments)``."""
        bucket, positions, class_positions, samples = planned
        size = self.batch_size if self.world_size > 1 else len(positions)
        mine = slice(self.rank * size, (self.rank + 1) * size)
        halves = [(self.dataset, positions[mine], samples[:len(positions)][mine])]
        if self.class_dataset is not None:
            halves.append((self.class_dataset, class_positions[mine], samples[len(positions):][mine]))
        return Batch(
            indices=np.concatenate([half[1] for half in halves]),
            sample_indices=np.concatenate([half[2] for half in halves]),
            items=[call(_load, dataset, int(position)) for dataset, rows, _ in halves for position in rows],
            bucket=bucket,
            everywhere=(np.concatenate([p for p in (positions, class_positions) if p is not None]), samples),
        )

    def _plan(self, epoch: int) -> list[tuple[Hashable, np.ndarray, np.ndarray | None, np.ndarray]]:
        """The global batches of an epoch: (bucket, positions, class positions, sample indices)."""
        size, count = self.batch_size * self.world_size, len(self._buckets)
        order = permutation(count, self.seed, "order", epoch) if self.shuffle else np.arange(count)
        seen: dict[Hashable, list[int]] = {}
        batches = []
        for position in order.tolist():  # a batch is due as soon as its bucket has gathered enough
            rows = seen.setdefault(self._buckets[position], [])
            rows.append(position)
            if len(rows) % size == 0:
                batches.append((self._buckets[position], rows[-size:]))
        for bucket, rows in seen.items():
            rest = rows[len(rows) - len(rows) % size:]
            if rest and self.last == "repeat":
                rest = rest + np.resize(rows, size - len(rest)).tolist()
            if rest and self.last != "drop":
                batches.append((bucket, rest))
        used: dict[Hashable, int] = {}  # class items of a bucket and samples continue those of the epochs before
        for bucket, rows in batches:
            used[bucket] = used.get(bucket, 0) + epoch * len(rows)
        sample = epoch * self._samples_per_epoch
        plan = []
        for bucket, rows in batches:
            class_rows = None
            total = len(rows)
            if self.class_dataset is not None:
                class_rows = self._class_rows(bucket, used[bucket], len(rows))
                used[bucket] += len(rows)
                total *= 2
            plan.append((bucket, np.array(rows, np.int64), class_rows, np.arange(sample, sample + total)))
            sample += total
        return plan

    def _class_rows(self, bucket: Hashable, start: int, count: int) -> np.ndarray:
        """Class items number ``start`` to ``start + count`` of a bucket, in a new order at each cycle."""
        rows = self._class_positions[bucket]
        result = []
        for number in range(start, start + count):
            cycle, place = divmod(number, len(rows))
            if place == 0 or not result:
                key = self.seed, "class", int(rows[0]), cycle
                order = permutation(len(rows), *key) if self.shuffle else range(len(rows))
            result.append(rows[order[place]])
        return np.array(result, np.int64)


def _bucket_list(dataset: Sequence, bucket_of: Callable[[int], Hashable] | None, name: str) -> list[Hashable]:
    if not len(dataset):
        raise DataError(f"{name} is empty; expected at least one item. Add some")
    return [bucket_of(i) if bucket_of else None for i in range(len(dataset))]


def _load(dataset: Sequence[dict[str, Any]], position: int) -> dict[str, Any]:
    try:
        return dataset[position]
    except UserError:
        raise
    except Exception as error:  # any data set may be given here: say which item it was
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"item {position} of the data set cannot be loaded ({what}). Correct or remove it") from error


def collate(items: Sequence[dict[str, Any]], rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Stack the fields of items along a new first axis.

    Args: ``items`` dicts of arrays or numbers; ``rows`` their names in messages, by default 0, 1, ...

    Returns: field -> array [B, ...]; arrays keep their dtype, float numbers become float32, integers int64.

    Raises: DataError naming the field and the rows when fields, shapes, dtypes or kinds differ.
    """
    if not items:
        raise DataError("an empty batch was given; expected at least one")
    rows = list(range(len(items))) if rows is None else [int(row) for row in rows]
    for row, item in zip(rows, items):
        odd = sorted(set(item) ^ set(items[0]))
        if odd:
            raise DataError(f"the field {listing(odd)} is only in one of rows {rows[0]} and {row}; expected the same "
                            "fields in all rows of a batch. Complete the rows")
    batch = {}
    for key in items[0]:
        values, kinds = [item[key] for item in items], {}
        for row, value in zip(rows, values):
            if isinstance(value, (np.ndarray, np.generic)):
                kind = f"{value.dtype} {list(value.shape)}"
            elif isinstance(value, (bool, int, float)):
                kind = "a truth value" if isinstance(value, bool) else "a number"
            else:
                raise DataError(f"the field {key} of row {row} is of type {type(value).__name__}; expected an array or "
                                "a number. Convert it in an operator, or leave the field out of the batch")
            kinds.setdefault(kind, []).append(row)
        if len(kinds) > 1:
            groups = "; ".join(f"{kind} in rows {listing(which)}" for kind, which in kinds.items())
            raise DataError(f"the field {key} differs within a batch: {groups}. Expected one shape and dtype; resize "
                            "the images to one size, or use buckets")
        if isinstance(values[0], (np.ndarray, np.generic)):
            batch[key] = np.stack(values)
        elif isinstance(values[0], bool):
            batch[key] = np.array(values, np.bool_)
        else:
            has_float = any(isinstance(value, float) for value in values)
            batch[key] = np.array(values, np.float32 if has_float else np.int64)
    return batch
