"""The cache of split training: what crosses the cut, one safetensors file a row, and what shaped it.

    DIR/cache.json                      the manifest: fingerprint, configs, the rows of each data set in order, the
                                        prompts of sample images, and what each entry holds
    DIR/entries/ab/ab12...safetensors   the slots of one row, without batch axis, but for those of its text; or the
                                        slots of a text, which all rows of that text name, and sample prompts

An entry is named by what it was made of, so equal rows share one, a restart continues where it stopped, and two writers
at once write the same files. It carries a digest of everything in it. Writing goes through `storage.files.write_file`.
A complete manifest tells shapes and sizes of files, so that no entry is opened before it is used.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ms_diffsynth.errors import CacheError, WeightError, listing, shortened
from ms_diffsynth.formats.json_text import parse_json, read_json
from ms_diffsynth.formats.weights import open_checkpoint, read_header, serialize
from ms_diffsynth.storage.files import write_file
from ms_diffsynth.storage.lock import _STAGE, _is_running

FORMAT = 2
MANIFEST = "cache.json"


@dataclass(frozen=True)
class PlannedRow:
    """One row of a data set: the name of its entry, and what to call it when something is wrong."""

    key: str
    label: str


class Entry(NamedTuple):
    """Slots of one row, or of a text; height and width of the image in pixels; the key of the text's entry."""

    slots: dict[str, np.ndarray]
    size: tuple[int, ...] = ()
    text: str = ""


class Kind(NamedTuple):
    """What a row holds, known without opening its entry: height and width, and slot -> (dtype, shape)."""

    size: tuple[int, ...]
    slots: dict[str, tuple[str, tuple[int, ...]]]


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
        self._sound: set[str] = set()  # texts that were read, which many rows name
        self.manifest: dict[str, Any] | None = self._read_manifest()

    # -- stage one -----------------------------------------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any], configs: Mapping[str, Any],
              rows: Mapping[str, Sequence[PlannedRow]], prompts: Mapping[str, str] | None = None) -> list[str]:
        """Say what the cache will hold; it counts as incomplete until `finish`, unless it holds just that already.

        Args:
            prompts: prompt of sample images -> key of its entry, beside those that an equal configuration had.

        Returns: what differs from what the folder held before, field by field; empty for a new or equal one.
        """
        old, found = self.manifest, _plain(fingerprint)
        kept = {} if old is None or old["fingerprint"] != found else old.get("prompts", {})
        new = {"format": FORMAT, "complete": False, "fingerprint": found, "configs": _plain(configs),
               "prompts": kept | dict(prompts or {}),
               "rows": {name: [[row.key, row.label] for row in planned] for name, planned in rows.items()},
               "entries": {}, "kinds": []}
        if old is not None and {**old, "complete": False, "entries": {}, "kinds": []} == new:
            return []
        self._write_manifest(new)
        return [] if old is None else differences(old["fingerprint"], new["fingerprint"])

    def holds(self, key: str) -> bool:
        """Whether the entry is there and sound, and that of its text."""
        try:
            text = self.entry(key).text
            if text and text not in self._sound:
                self.entry(text)
                self._sound.add(text)
        except CacheError:
            return False
        return True

    def write(self, key: str, slots: Mapping[str, np.ndarray], size: Sequence[int] = (), text: str = "") -> None:
        """Write one entry: its slots, height and width of its image in pixels, and the key of its text's entry.

        Raises: OutputError.
        """
        write_file(self._path(key), serialize(slots, _metadata(key, slots, size, text)))

    def finish(self) -> None:
        """Mark the cache complete, with what each entry holds. Raises: CacheError when one is missing or cut short."""
        labels = self._labels()
        entries, kinds, lost, cut = {}, {}, [], []
        todo = list(labels)
        for key in todo:  # which grows by the texts
            path = self._path(key)
            if not path.is_file():
                lost.append(labels[key])
                continue
            try:
                tensors, metadata = read_header(path)
                size, text = parse_json(metadata["size"], None), metadata["text"]
            except (WeightError, KeyError, ValueError):  # it is not as long as its header says
                cut.append(labels[key])
                continue
            kind = [path.stat().st_size, size, {n: [t.dtype.name, list(t.shape)] for n, t in sorted(tensors.items())}]
            entries[key] = [kinds.setdefault(json.dumps(kind), len(kinds)), text]
            if text and text not in labels:
                labels[text] = f"the text of {labels[key]}"
                todo.append(text)
        self._refuse(lost, cut)
        new = {**self.manifest, "complete": True, "entries": entries, "kinds": [json.loads(kind) for kind in kinds]}
        if self.manifest != new:
            self._write_manifest(new)

    # -- stage two -----------------------------------------------------------------------------------------------

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse to train on a cache that is not there, not complete, or shaped by other fields than ``expected``.

        Raises: CacheError naming each field that differs, with both values; or the rows whose entries are missing or
            cut short. A wrong bit in an entry is found when that is read: none is opened here.
        """
        if self.manifest is None:
            raise CacheError(f"{self.folder} is not a cache: {self._what_it_is()}. Make one with --task "
                             "sft:data_process --output_path, and name its folder.")
        wrong = differences(self.manifest["fingerprint"], _plain(expected))
        if wrong:
            raise CacheError(f"the cache in {self.folder} was made by another configuration: {listing(wrong)}. "
                             "Train with the same settings, or make the cache again with --task sft:data_process.")
        if not self.manifest["complete"]:
            keys = self.keys()
            done = sum(self._path(key).is_file() for key in keys)
            raise CacheError(f"the cache in {self.folder} is incomplete: {done} of {len(keys)} entries are there. Run "
                             "--task sft:data_process again; it continues where it stopped.")
        there = {}
        for folder in os.scandir(self.folder / "entries") if (self.folder / "entries").is_dir() else ():
            if folder.is_dir():
                there |= {file.name: file for file in os.scandir(folder) if file.is_file()}
        labels = self._labels()
        texts = {text: f"the text of {labels[key]}" for key, (_, text) in self.manifest["entries"].items() if text}
        lost, cut = [], []
        for key, (kind, _) in self.manifest["entries"].items():
            file = there.get(f"{key}.safetensors")
            if file is None:
                lost.append(labels.get(key) or texts[key])
            elif file.stat().st_size != self.manifest["kinds"][kind][0]:
                cut.append(labels.get(key) or texts[key])
        self._refuse(lost, cut)

    def rows(self, name: str) -> list[PlannedRow]:
        """The rows of a data set (``"instance"`` or ``"class"``), in order; empty when it has none."""
        return [PlannedRow(*row) for row in self.manifest["rows"].get(name, [])]

    @property
    def prompts(self) -> dict[str, str]:
        """Prompt of sample images -> key of its entry."""
        return (self.manifest or {}).get("prompts", {})

    def _labels(self) -> dict[str, str]:
        """Key -> what to call it, of rows and of prompts of sample images."""
        return ({key: f"the sample prompt {shortened(prompt)!r}" for prompt, key in self.prompts.items()}
                | {key: label for rows in self.manifest["rows"].values() for key, label in rows})

    def keys(self) -> list[str]:
        """Every entry of a row that the manifest names."""
        return list(dict.fromkeys(key for rows in self.manifest["rows"].values() for key, _ in rows))

    def kind(self, key: str) -> Kind:
        """What the row of an entry holds, by the manifest of a complete cache."""
        index, text = self.manifest["entries"][key]
        _, size, slots = self.manifest["kinds"][index]
        if text:
            slots = slots | self.manifest["kinds"][self.manifest["entries"][text][0]][2]
        return Kind(tuple(size), {name: (dtype, tuple(shape)) for name, (dtype, shape) in slots.items()})

    def read(self, key: str, label: str = "") -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """The slots of a row, with those of its text, and height and width of its image. Raises: as `entry`."""
        found = self.entry(key, label)
        return found.slots | (self.entry(found.text, label).slots if found.text else {}), found.size

    def entry(self, key: str, label: str = "") -> Entry:
        """What one file holds. Raises: CacheError when it is missing, truncated, or has one wrong bit."""
        path = self._path(key)
        remedy = "Run --task sft:data_process again; it replaces what is damaged."
        name = f"the cache entry {path}" + (f" ({label})" if label else "")
        if not path.is_file():
            raise CacheError(f"{name} is missing. {remedy}")
        try:
            _, metadata = read_header(path)
            slots = dict(open_checkpoint([path]).tensors())
            size, text = tuple(parse_json(metadata["size"], list)), metadata["text"]
            is_sound = metadata == {"format": "pt", **_metadata(key, slots, size, text)}
        except (WeightError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise CacheError(f"{name} is damaged ({error}). {remedy}") from None
        if not is_sound:
            raise CacheError(f"{name} is damaged: its content has another digest than when it was written. {remedy}")
        return Entry(slots, size, text)

    # -- upkeep --------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[Path]:
        """Every entry in the folder, named by the manifest or not."""
        return self.folder.glob("entries/??/*.safetensors")

    def unused(self) -> list[Path]:
        """Entries the manifest does not name (of other settings, or of rows that are gone), and what a process that was
        killed while it wrote left half done.
        """
        named = {*self.keys(), *self.prompts.values()} if self.manifest else set()
        for key in list(named):
            with contextlib.suppress(WeightError):  # damaged: made again, with its text
                named.add(read_header(self._path(key))[1].get("text", ""))
        halves = [path for pattern in (".tmp-*", "entries/??/.tmp-*") for path in self.folder.glob(pattern)
                  if (stage := _STAGE.fullmatch(path.name)) and not _is_running(int(stage[1]))]
        return sorted([*halves, *(path for path in self.entries() if path.stem not in named)])

    def _path(self, key: str) -> Path:
        return self.folder / "entries" / key[:2] / f"{key}.safetensors"

    def _refuse(self, lost: Sequence[str], cut: Sequence[str]) -> None:
        if lost:
            raise CacheError(f"the cache in {self.folder} lacks the entries of {listing(lost)}. Run --task "
                             "sft:data_process again; it makes what is missing.")
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
        and isinstance(manifest.get("complete"), bool) and isinstance(manifest.get("prompts", {}), dict)
        and all(isinstance(key, str) for key in manifest.get("prompts", {}).values()))
    if not is_right:
        raise CacheError(f"{path} is not the manifest of a cache: expected rows of a key and a name each, a "
                         f"fingerprint and configs. {remedy}")


def _metadata(key: str, slots: Mapping[str, np.ndarray], size: Sequence[int], text: str) -> dict[str, str]:
    return {"size": json.dumps(size), "text": text, "digest": _digest(key, slots, size, text)}


def _digest(key: str, slots: Mapping[str, np.ndarray], size: Sequence[int], text: str) -> str:
    found = hashlib.sha256(json.dumps([key, list(size), text]).encode())
    for name in sorted(slots):
        array = np.ascontiguousarray(slots[name])
        found.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        found.update(array.reshape(-1).view(np.uint8))  # also of a row without references, whose tokens are [1, 0, C]
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
