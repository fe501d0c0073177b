"""Several folders of one data set, each with how often an epoch shows its images; and which row each item of an epoch
is.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

MOST_REPEATS = 1_000_000


class Epoch:
    """Which row each item of an epoch is: every row once, then once more those that come twice, and so on.

    So the first items are the rows in their order, and with one number for all rows item i is row i modulo their count.

    Args:
        rows: how many there are.
        repeat: how often an epoch shows a row: one number for all, or one for each.
    """

    def __init__(self, rows: int, repeat: int | Sequence[int]):
        self.rows, self.repeat = rows, repeat
        self._order = None
        if not isinstance(repeat, int):
            row = np.repeat(np.arange(rows), repeat)
            passes = np.arange(len(row)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
            self._order = row[np.argsort(passes, kind="stable")]

    def __len__(self) -> int:
        return self.rows * self.repeat if self._order is None else len(self._order)

    def row_of(self, index: int) -> int:
        """The row of item ``index``, which counts on into the next epochs."""
        return index % self.rows if self._order is None else int(self._order[index % len(self._order)])


def parse_folders(texts: Sequence[str]) -> dict[str, int]:
    """``("cats=10", "dogs")`` -> ``{"cats": 10, "dogs": 1}``. What is wrong with them is for `folder_problems`."""
    return {os.path.normpath(name): repeat for name, repeat in map(_parsed, texts)}


def folder_problems(texts: Sequence[str]) -> Iterator[str]:
    """What is wrong with the setting ``dataset_folders``."""
    names = [os.path.normpath(name) for name, _ in map(_parsed, texts)]
    for text, name in zip(texts, names):
        _, repeat = _parsed(text)
        if not 1 <= repeat <= MOST_REPEATS:
            yield (f"dataset_folders has '{text}': expected to show its images 1 to {MOST_REPEATS} times, as in "
                   f"{name}=10.")
        if name == "." or os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            yield (f"dataset_folders has '{text}': expected a folder inside dataset_base_path, which has the others "
                   "too. Name one above all of them by dataset_base_path.")
        inside = next((other for other in names if other != name and _is_inside(name, other)), None)
        if inside or names.count(name) > 1:
            yield (f"dataset_folders names {name} {f'and {inside}, which it is in' if inside else 'twice'}: its images "
                   "would be read twice. Keep one.")


def folder_of(name: str, folders: Mapping[str, int]) -> str | None:
    """That one of ``folders`` that a file is in."""
    return next((folder for folder in folders if _is_inside(os.path.normpath(name), folder)), None)


def _parsed(text: str) -> tuple[str, int]:
    name, _, number = (part.strip() for part in text.rpartition("="))
    return (name, int(number[:10])) if name and number.isdecimal() else (text, 1)  # ten digits are too many already


def _is_inside(name: str, folder: str) -> bool:
    return PurePosixPath(folder) in PurePosixPath(name).parents
