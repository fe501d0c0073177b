"""Checkpoints: all of a training run's state in one folder, committed as one and verified when it is opened.

    ROOT/step-00000120/weights.safetensors    one file a group of arrays: weights, moments, ema
                       state.json             what is not an array: step, epoch, seed, fingerprints
                       moments-00001-of-00002.safetensors    or one file a rank and group: see storage.rank_files
                       MANIFEST.json          format, step, bytes and SHA-256 of each file, and a digest of all that

A folder is a checkpoint if its manifest verifies. Nothing points to the latest one, so nothing points to a wrong one.
"""
from __future__ import annotations

import errno
import json
import logging
import math
import operator
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_diffsynth.errors import CheckpointError, ConfigError, WeightError, listing, nearest
from ms_diffsynth.formats.json_text import NotJSON, parse_json
from ms_diffsynth.formats.shards import names_in
from ms_diffsynth.formats.weights import open_checkpoint, serialize
from ms_diffsynth.storage.cache import digest_of
from ms_diffsynth.storage.files import CALLS, Calls, remove_folder, sha256_of, stage_folder
from ms_diffsynth.storage.rank_files import Part, Parts, group_of, measured, part_name

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
LEAST_KEPT = 2

_SUFFIX = ".safetensors"
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FOLDER = re.compile(r"step-(\d{8,})")
_MOST_MANIFEST_BYTES = 1 << 20  # a damaged length must not fill the memory; a manifest of ten groups has 2 kB


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose every byte was verified. Its arrays stay in the files until `read`.

    Attributes:
        groups: names of its groups of arrays.
        state: what `save_checkpoint` was given, as JSON gives it back: tuples are lists.
    """

    path: Path
    step: int
    groups: tuple[str, ...]
    state: dict[str, Any]

    def open(self, group: str) -> Group:
        """The arrays of one group. Raises: CheckpointError for a group that is not there, and as `Group` does."""
        if group not in self.groups:
            raise CheckpointError(f"{self.path} has no group '{group}': it has {listing(self.groups)}."
                                  f"{nearest(group, self.groups)}")
        return Group(self.path, group)

    def read(self, group: str) -> dict[str, np.ndarray]:
        """All arrays of one group, in memory; they are the caller's own. Raises: CheckpointError, as `open` does."""
        found = self.open(group)
        return {name: found[name] for name in found.shapes}


class Group:
    """The arrays of one group of a checkpoint, by name, each read when it is asked for.

    Attributes:
        shapes: name -> shape.

    Raises: CheckpointError, also where an array is read, when a file changed since it was verified.
    """

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        with self._unchanged():
            parts = [*folder.glob(f"{name}-?????-of-?????{_SUFFIX}")]
            self._arrays = Parts(parts) if parts else open_checkpoint(folder / f"{name}{_SUFFIX}")
        self.shapes = self._arrays.shapes

    def __getitem__(self, name: str) -> np.ndarray:
        with self._unchanged():
            return self._arrays[name]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        try:
            yield
        except (WeightError, OSError) as error:
            raise CheckpointError(f"{self.folder} changed while it was in use: {error}") from error


# -- saving --------------------------------------------------------------------------------------------------------


def save_checkpoint(root: str | os.PathLike[str], step: int, groups: Mapping[str, Mapping[str, np.ndarray]],
                    state: Mapping[str, Any], parts: Mapping[str, Sequence[Part]] | None = None, *,
                    calls: Calls = CALLS) -> Path:
    """Write ``ROOT/step-N`` as one; a checkpoint of the same step is swapped for the new one. Nothing else is touched.

    Args:
        groups: name of the group -> name -> array.
        state: JSON values by name; no NaN, no infinity.
        parts: name of a group -> what every rank, in order, wrote of it by `storage.rank_files.write_part`.

    Returns: the folder, once it would outlive a loss of power.
    Raises: OutputError when it cannot be written: what was there before still is, and nothing half is left behind.
        CheckpointError for a state that is not JSON, or a group that cannot be a file name; WeightError for a dtype.
    """
    wrong = [f"the group '{name}'" for name in groups if not _GROUP.fullmatch(name)]
    wrong += _not_json(dict(state), "state")
    if wrong:
        raise CheckpointError(f"a checkpoint cannot hold {listing(wrong)}. Expected letters, digits, _ and - in the "
                              "name of a group, and in the state texts, finite numbers, lists and dictionaries.")
    step = operator.index(step)
    files = {f"{name}{_SUFFIX}": serialize(arrays) for name, arrays in groups.items()}
    files[STATE] = [memoryview(_json(dict(state)))]
    taken = {f"{part_name(group, rank, len(written))}{_SUFFIX}": part for group, written in (parts or {}).items()
             for rank, part in enumerate(written)}
    records = {name: dict(zip(("bytes", "sha256"), measured(data))) for name, data in files.items()}
    records |= {name: {"bytes": part.bytes, "sha256": part.sha256} for name, part in taken.items()}
    manifest = {"format": FORMAT, "step": step, "files": records}
    files[MANIFEST] = [memoryview(_json(manifest | {"digest": digest_of(manifest)}))]
    path = Path(root) / f"step-{step:08d}"
    needed = sum(part.nbytes for data in files.values() for part in data)
    with stage_folder(path, replace=True, needed=needed, calls=calls) as stage:
        for name, data in files.items():
            stage.write(name, data)
        for name, part in taken.items():
            stage.take(name, Path(root) / part.file)
    return path


def remove_old_checkpoints(saved: Path, keep: int = LEAST_KEPT, *, calls: Calls = CALLS) -> list[Path]:
    """Remove old checkpoints beside ``saved``, the one that `save_checkpoint` just returned.

    Only what is older than ``keep`` sound ones goes. ``saved`` counts as one and is never removed; the others are
    verified first, every byte, so a damaged one never takes the place of a sound one. A folder that cannot be removed
    is a warning.

    Args:
        keep: how many to keep, at least 2: the newest may turn out to be damaged when it is needed.

    Returns: what was removed. Raises: ConfigError.
    """
    if keep < LEAST_KEPT:
        raise ConfigError(f"{keep} checkpoints are to be kept: expected at least {LEAST_KEPT}, because the newest may "
                          "turn out to be damaged when it is needed.")
    sound, old = 1, []
    others = [path for path in _folders(saved.parent) if path != saved and not path.is_symlink()]
    for path in others:
        if sound == keep:
            old.append(path)
        elif _open_or_warn(path) is not None:
            sound += 1
    return [path for path in reversed(old) if remove_folder(path, calls=calls)]


# -- opening -------------------------------------------------------------------------------------------------------


def latest(root: str | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint of the highest step that verifies; None when there is none.

    A damaged one is never returned: what is wrong with it is logged, and the one before it is tried.
    """
    return next((found for path in _folders(Path(root)) if (found := _open_or_warn(path)) is not None), None)


def open_checkpoint_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Open ``ROOT/step-N`` after reading and verifying every byte of it.

    Raises: CheckpointError naming each damaged file, or saying why this is not a checkpoint.
    """
    path = Path(os.path.abspath(path))
    if not _FOLDER.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        what = "a link" if path.is_symlink() else "not there" if not path.exists() else "something else"
        raise CheckpointError(f"{path} is not a checkpoint, but {what}. Expected a folder of the name step-00000120, "
                              "not a link: give the path of one.")
    manifest = _read_manifest(path)
    problems = [text for name, record in manifest["files"].items() if (text := _damage(path, name, record))]
    if problems:
        raise CheckpointError(f"{path} is damaged: {listing(problems)}. Expected what its {MANIFEST} says. Resume from "
                              "another checkpoint.")
    groups = tuple(dict.fromkeys(group_of(name.removesuffix(_SUFFIX)) for name in manifest["files"]
                                 if name.endswith(_SUFFIX)))
    return Checkpoint(path=path, step=manifest["step"], groups=groups, state=_read_json(path / STATE))


def _folders(root: Path) -> list[Path]:
    """What is named like a checkpoint, highest step first."""
    found = [(int(match[1]), root / name) for name in names_in(root) if (match := _FOLDER.fullmatch(name))]
    return [path for _, path in sorted(found, reverse=True)]


def _open_or_warn(path: Path) -> Checkpoint | None:
    try:
        return open_checkpoint_folder(path)
    except CheckpointError as error:
        logger.warning("checkpoint skipped: %s", error)
        return None


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, sound in itself and of the folder it is in."""
    manifest = _read_json(path / MANIFEST, most=_MOST_MANIFEST_BYTES)
    try:
        if isinstance(manifest["format"], int) and manifest["format"] > FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']}, this release reads up to {FORMAT}. Resume "
                                  "with the release that wrote it, or a later one.")
        is_sound = manifest.pop("digest") == digest_of(manifest)
        name = f"step-{manifest['step']:08d}"
        files = {name: (record["bytes"], record["sha256"]) for name, record in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: {MANIFEST} lacks a part ({type(error).__name__}: {error}). "
                              "Resume from another checkpoint.") from error
    if not is_sound or STATE not in files:
        raise CheckpointError(f"{path} is damaged: the digest of {MANIFEST} is wrong. Resume from another checkpoint.")
    if name != path.name:
        raise CheckpointError(f"{path} holds step {manifest['step']}, unlike its name: it was renamed, or copied over "
                              f"another. Give it the name {name}, or resume from another checkpoint.")
    return manifest


def _read_json(file: Path, most: int | None = None) -> Any:
    """A JSON file of at most ``most`` bytes. Raises: CheckpointError."""
    try:
        size = _size_of(file)
        if most is not None and size > most:
            raise NotJSON(f"has {size} bytes, expected at most {most}")
        return parse_json(file.read_bytes())
    except (OSError, NotJSON) as error:
        what = f": {error.strerror}" if isinstance(error, OSError) else f" {error}"
        raise CheckpointError(f"{file.parent} is not a complete checkpoint: {file.name}{what}. Resume from another "
                              "checkpoint.") from error


def _damage(path: Path, name: str, record: Mapping[str, Any]) -> str | None:
    """What is wrong with one file, if anything."""
    if Path(name).name != name:
        return f"{name} leads out of the folder"
    try:
        size = _size_of(path / name)
        if size != record["bytes"]:
            return f"{name} has {size} bytes, expected {record['bytes']}"
        return None if sha256_of(path / name) == record["sha256"] else f"{name} has another SHA-256 than when written"
    except OSError as error:
        return f"{name}: {error.strerror}"


def _size_of(file: Path) -> int:
    """Bytes of a regular file. Raises: OSError, also for a link (it may change) and a pipe (reading it would wait)."""
    found = os.lstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "expected a regular file")
    return found.st_size


# -- comparing -----------------------------------------------------------------------------------------------------


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], accept: Collection[str] = ()) -> list[str]:
    """Fields that differ between two configurations or data sets, a line each: ``seed: 1 when saved, 2 now``.

    Args:
        saved, now: flat dictionaries of JSON values; a field that only one of them has is a difference.
        accept: fields that may differ.
    """
    lines = []
    for name in dict.fromkeys([*saved, *now]):
        before, after = (json.dumps(d[name], sort_keys=True) if name in d else "not set" for d in (saved, now))
        if before != after and name not in accept:
            lines.append("{}: {} when saved, {} now".format(name, *_shortened(before, after)))
    return lines


def _shortened(a: str, b: str, most: int = 80) -> tuple[str, str]:
    """Two texts, or the part of each from shortly before the first character that differs."""
    if max(len(a), len(b)) <= most:
        return a, b
    same = next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    start = max(0, same - most // 4)
    return tuple("..." * (start > 0) + t[start:start + most] + "..." * (start + most < len(t)) for t in (a, b))


# -- JSON ----------------------------------------------------------------------------------------------------------


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()  # no line end, so that no byte can be cut unseen


def _not_json(value: Any, place: str) -> Iterator[str]:
    """Each part of a value that JSON would refuse or change, with its place and type."""
    if isinstance(value, dict):
        for name, part in value.items():
            if not isinstance(name, str):
                yield f"{place}[{name!r}], a name of type {type(name).__name__}"
            yield from _not_json(part, f"{place}.{name}")
    elif isinstance(value, (list, tuple)):
        for at, part in enumerate(value):
            yield from _not_json(part, f"{place}[{at}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place}={value}"
    elif not (value is None or type(value) in (str, int, float, bool)):
        yield f"{place} of type {type(value).__name__}"
