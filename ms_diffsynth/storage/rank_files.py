"""A group of arrays of a checkpoint in one file for each rank, each with its own part of the elements.

    step-00000120/moments-00001-of-00002.safetensors    rank 0's pieces, flat, by name; the whole shapes as metadata
                  moments-00002-of-00002.safetensors    rank 1's

A rank writes its file beside the checkpoint; the first rank takes all of them in when it commits. Read, the pieces are
whole arrays again, so any number of ranks can resume from them.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ms_diffsynth.errors import CheckpointError
from ms_diffsynth.formats.json_text import NotJSON, parse_json
from ms_diffsynth.formats.weights import open_checkpoint, serialize
from ms_diffsynth.storage.files import CALLS, Calls, write_beside

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Part:
    """A part that is written and durable, but in no checkpoint yet."""

    file: str  # its name in the folder of the checkpoints
    bytes: int
    sha256: str


def part_name(group: str, rank: int, ranks: int) -> str:
    """``moments-00001-of-00002``"""
    return f"{group}-{rank + 1:05d}-of-{ranks:05d}"


def group_of(stem: str) -> str:
    """The group that a file belongs to, by its name without ending."""
    found = _PART.fullmatch(stem)
    return found[1] if found else stem


def write_part(root: str | os.PathLike[str], pieces: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]], *,
               calls: Calls = CALLS) -> Part:
    """Write a rank's pieces into a hidden file in ``root``, where the checkpoint will be; see `Part`.

    Args:
        pieces: name -> 1-D array: this rank's elements of the flattened whole. shapes: name -> shape of the whole.

    Raises: OutputError; nothing is left behind.
    """
    data = serialize(pieces, {"shapes": json.dumps({name: list(shape) for name, shape in shapes.items()})})
    return Part(write_beside(Path(root) / "part", data, calls=calls).name, *measured(data))


def measured(data: Sequence[memoryview]) -> tuple[int, str]:
    """Bytes and SHA-256 of what a file will hold."""
    digest = hashlib.sha256()
    for buffer in data:
        digest.update(buffer)
    return sum(buffer.nbytes for buffer in data), digest.hexdigest()


class Parts:
    """The whole arrays whose pieces are in ``files``, each put together when it is asked for.

    Attributes:
        shapes: name -> shape.

    Raises: CheckpointError when elements or files are missing.
    """

    def __init__(self, files: Iterable[Path]):
        files = sorted(files)
        self.folder, (self.group, _, count) = files[0].parent, _PART.fullmatch(files[0].stem).groups()
        if len(files) != int(count):
            raise CheckpointError(f"{self.folder} has {len(files)} of {int(count)} files of {self.group}. Resume from "
                                  "another checkpoint.")
        self._files = [open_checkpoint(file) for file in files]
        try:
            self.shapes = {n: tuple(shape) for n, shape in parse_json(self._files[0].metadata["shapes"]).items()}
        except (KeyError, NotJSON, TypeError) as error:
            raise CheckpointError(f"{files[0]} does not say what it is a part of ({error}). Resume from another "
                                  "checkpoint.") from None

    def __getitem__(self, name: str) -> np.ndarray:
        pieces = [file[name] for file in self._files if name in file]
        if sum(map(len, pieces)) != math.prod(self.shapes[name]):
            raise CheckpointError(f"{self.folder}: the files of {self.group} hold {sum(map(len, pieces))} elements of "
                                  f"{name} {list(self.shapes[name])}. Resume from another checkpoint.")
        return np.concatenate(pieces).reshape(self.shapes[name])
