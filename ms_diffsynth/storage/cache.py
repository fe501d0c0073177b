"""The cache of split training: what crosses the cut, one safetensors file a row, and what shaped it.

    DIR/cache.json                      the manifest: fingerprint, configs, and the rows of each data set in order
    DIR/entries/ab/ab12...safetensors   the slots of one row, without batch axis

An entry is named by what it was made of, so equal rows share one, a restart continues where it stopped, and two writers
at once write the same files. It carries a digest of everything in it. Writing goes through `storage.files.write_file`.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ms_diffsynth.errors import CacheError, WeightError, listing
from ms_diffsynth.formats.json_text import parse_json, read_json
from ms_diffsynth.formats.weights import open_checkpoint, read_header, serialize
from ms_diffsynth.storage.files import write_file
from ms_diffsynth.storage.lock import _STAGE, _is_running

FORMAT = 1
MANIFEST = "cache.json"


@dataclass(frozen=True)
class PlannedRow:
    """One row of a data set: the name of its entry, and what to call it when something is wrong."""

    key: str
    label: str


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def differences(cached: Any, wanted: Any, place: str = "") -> list[str]:
    """Fields of ``wanted`` that are different in ``cached``, as ``place: value, expected value``; others are not seen.

    Lists are compared whole, dictionaries field by field.
    """
    if isinstance(cached, Mapping) and isinstance(wanted, Mapping):
        return [text for name, value in wanted.items()
                for text in differences(cached.get(name), value, f"{place}.{name}".strip("."))]
    return [] if cached == wanted else [f"{place}: {_short(cached)}, expected {_short(wanted)}"]


class Cache:
    """A folder of entries and its manifest. Raises: CacheError when the manifest is there, but not readable."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.manifest: dict[str, Any] | None = self._read_manifest()

    # -- stage one -----------------------------------------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any], configs: Mapping[str, Any],
              rows: Mapping[str, Sequence[PlannedRow]]) -> list[str]:
        """Say what the cache will hold; it counts as incomplete until `finish`, unless it holds just that already.

        Returns: what differs from what the folder held before, field by field; empty for a new or equal one.
        """
        old = self.manifest
        new = {"format": FORMAT, "complete": False, "fingerprint": _plain(fingerprint), "configs": _plain(configs),
               "rows": {name: [[row.key, row.label] for row in planned] for name, planned in rows.items()}}
        if old is not None and {**old, "complete": False} == new:
            return []
        self._write_manifest(new)
        return [] if old is None else differences(old["fingerprint"], new["fingerprint"])

    def holds(self, key: str) -> bool:
        """Whether the entry is there and sound."""
        try:
            self.read(key)
        except CacheError:
            return False
        return True

    def write(self, key: str, slots: Mapping[str, np.ndarray], size: tuple[int, int]) -> None:
        """Write one entry: its slots, and the height and width of its image in pixels. Raises: OutputError."""
        metadata = {"size": json.dumps(size), "digest": _digest(key, slots, size)}
        write_file(self._path(key), serialize(slots, metadata))

    def finish(self) -> None:
        """Mark the cache complete. Raises: CacheError when an entry is missing or cut short."""
        self._check_entries()
        if not self.manifest["complete"]:
            self._write_manifest({**self.manifest, "complete": True})

    # -- stage two -----------------------------------------------------------------------------------------------

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse to train on a cache that is not there, not complete, or shaped by other fields than ``expected``.

        Raises: CacheError naming each field that differs, with both values; or the rows whose entries are missing or
            cut short. A wrong bit in an entry is found by `read`.
        """
        if self.manifest is None:
            raise CacheError(f"{self.folder} is not a cache: {self._what_it_is()}. Make one with --task "
                             "sft:data_process --output_path, and name its folder.")
        wrong = differences(self.manifest["fingerprint"], _plain(expected))
        if wrong:
            raise CacheError(f"the cache in {self.folder} was made by another configuration: {listing(wrong)}. "
                             "Train with the same settings, or make the cache again with --task sft:data_process.")
        if not self.manifest["complete"]:
            keys = set(self.keys())
            done = sum(self._path(key).is_file() for key in keys)
            raise CacheError(f"the cache in {self.folder} is incomplete: {done} of {len(keys)} entries are there. Run "
                             "--task sft:data_process again; it continues where it stopped.")
        self._check_entries()

    def rows(self, name: str) -> list[PlannedRow]:
        """The rows of a data set (``"instance"`` or ``"class"``), in order; empty when it has none."""
        return [PlannedRow(*row) for row in self.manifest["rows"].get(name, [])]

    def keys(self) -> list[str]:
        """Every entry the manifest names."""
        return list(dict.fromkeys(key for rows in self.manifest["rows"].values() for key, _ in rows))

    def read(self, key: str, label: str = "") -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """The slots of an entry, and height and width of its image.

        Raises: CacheError when it is missing, truncated, or has one wrong bit.
        """
        path = self._path(key)
        remedy = "Run --task sft:data_process again; it replaces what is damaged."
        name = f"the cache entry {path}" + (f" ({label})" if label else "")
        if not path.is_file():
            raise CacheError(f"{name} is missing. {remedy}")
        try:
            _, metadata = read_header(path)
            slots = dict(open_checkpoint([path]).tensors())
            size = tuple(parse_json(metadata["size"], list))
            if len(size) != 2:
                raise ValueError(f"a size of {len(size)} numbers")
            is_sound = metadata["digest"] == _digest(key, slots, size)
        except (WeightError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise CacheError(f"{name} is damaged ({error}). {remedy}") from None
        if not is_sound:
            raise CacheError(f"{name} is damaged: its content has another digest than when it was written. {remedy}")
        return slots, size

    # -- upkeep --------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[Path]:
        """Every entry in the folder, named by the manifest or not."""
        return self.folder.glob("entries/??/*.safetensors")

    def unused(self) -> list[Path]:
        """Entries the manifest does not name (of other settings, or of rows that are gone), and what a process that was
        killed while it wrote left half done.
        """
        named = set(self.keys()) if self.manifest else set()
        halves = [path for pattern in (".tmp-*", "entries/??/.tmp-*") for path in self.folder.glob(pattern)
                  if (stage := _STAGE.fullmatch(path.name)) and not _is_running(int(stage[1]))]
        return sorted([*halves, *(path for path in self.entries() if path.stem not in named)])

    def _path(self, key: str) -> Path:
        return self.folder / "entries" / key[:2] / f"{key}.safetensors"

    def _check_entries(self) -> None:
        labels = {key: label for rows in self.manifest["rows"].values() for key, label in rows}
        lost = [labels[key] for key in self.keys() if not self._path(key).is_file()]
        if lost:
            raise CacheError(f"the cache in {self.folder} lacks the entries of {listing(lost)}. Run --task "
                             "sft:data_process again; it makes what is missing.")
        cut = []
        for key in self.keys():
            try:
                read_header(self._path(key))
            except WeightError:  # it is not as long as its header says
                cut.append(labels[key])
        if cut:
            raise CacheError(f"the cache in {self.folder} has damaged entries for {listing(cut)}. Run --task "
                             "sft:data_process again; it replaces what is damaged.")

    def _what_it_is(self) -> str:
        if not self.folder.is_dir():
            return "there is no such folder"
        names = [path.name for path in self.folder.rglob("*.pth")]
        if names:
            return (f"it holds {listing(sorted(names), 3)}, pickled caches of DiffSynth-Studio. Loading a pickle runs "
                    "whatever code is in it, so these are never read")
        return f"it has no {MANIFEST}" if any(self.folder.iterdir()) else "the folder is empty"

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        text = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1, sort_keys=True)
        write_file(self.folder / MANIFEST, text.encode())

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        remedy = "Remove it and run --task sft:data_process again; sound entries are kept."
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CacheError(f"{path} cannot be seen ({error.strerror}): expected a folder that this user may read. "
                             "Change its permissions, or choose another one.") from None
        manifest = read_json(path, CacheError, remedy)
        is_sound = manifest.pop("digest", None) == digest_of(manifest)
        if not is_sound or manifest.get("format") != FORMAT:
            what = f"its format is {manifest.get('format')}, expected {FORMAT}" if is_sound else "its digest is wrong"
            raise CacheError(f"{path} cannot be used: {what}. {remedy}")
        _check_manifest(manifest, path, remedy)
        return manifest


def _check_manifest(manifest: Mapping[str, Any], path: Path, remedy: str) -> None:
    """Raises: CacheError for a manifest whose digest is right, and which another program wrote."""
    rows = manifest.get("rows")
    is_right = (isinstance(rows, dict) and all(isinstance(found, list) for found in rows.values()) and all(
        isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row)
        for found in rows.values() for row in found)
        and all(isinstance(manifest.get(part), dict) for part in ("fingerprint", "configs"))
        and isinstance(manifest.get("complete"), bool))
    if not is_right:
        raise CacheError(f"{path} is not the manifest of a cache: expected rows of a key and a name each, a "
                         f"fingerprint and configs. {remedy}")


def _digest(key: str, slots: Mapping[str, np.ndarray], size: Sequence[int]) -> str:
    found = hashlib.sha256(json.dumps([key, list(size)]).encode())
    for name in sorted(slots):
        array = np.ascontiguousarray(slots[name])
        found.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        found.update(memoryview(array).cast("B"))
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
