"""Weights as NumPy arrays: safetensors files, read lazily, matched strictly, written by the commit protocol.

Pickles (.bin, .pt, .pth, .ckpt) are never read: reading one executes code.
"""
from __future__ import annotations

import copy
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ms_diffsynth.data.paths import open_regular
from ms_diffsynth.errors import ConfigError, DataError, WeightError, listing, nearest
from ms_diffsynth.formats.json_text import parse_json
from ms_diffsynth.formats.shards import INDEX, PICKLES, Source, find_files, names_in, pickle_text
from ms_diffsynth.storage.files import Stream, link_or_copy, stage_folder, write_file

# the tags of the safetensors format that NumPy and ml_dtypes have a type for
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
# by name: MindSpore's asnumpy() gives a bfloat16 that is not the type of ml_dtypes (MindSpore 2.10)
TAGS = {dtype.name: tag for tag, dtype in DTYPES.items()}
FLOATS = {dtype.name: dtype for tag, dtype in DTYPES.items() if tag in ("F64", "F32", "F16", "BF16")}


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: ``start`` is its first byte in ``file``.

    Attributes:
        is_swapped: what is read are the second half of its rows, then the first.
        is_transposed: what is read is the transpose of what is there.
        scale: one number that what is read is multiplied by; the result is float32.
        members: what is read are the rows of these, one below the other; ``file`` and ``start`` are not used then.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    start: int
    is_swapped: bool = False
    is_transposed: bool = False
    scale: Entry | None = None
    members: tuple[Entry, ...] = ()

    @property
    def read_as(self) -> np.dtype:
        """The dtype of what is read."""
        return self.dtype if self.scale is None else np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of what is read."""
        return math.prod(self.shape) * self.read_as.itemsize


class Checkpoint:
    """The tensors of one or several files by name. Headers are in memory, tensors are read when asked for.

    Attributes:
        files: the safetensors files, in order.
        entries: name -> `Entry`, in the order of the files and of the bytes in them.
        metadata: the metadata of all files, merged; all strings.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self.arrays: dict[str, np.ndarray] = {}  # of tensors that are in memory
        twice: list[str] = []
        for file in self.files:
            entries, metadata = read_header(file)
            twice += [f"{n} (in {self.entries[n].file.name} and {file.name})" for n in entries if n in self.entries]
            self.entries.update(entries)
            self.metadata.update(metadata)
        if twice:
            raise WeightError(f"{len(twice)} tensors are in two files: {listing(twice)}. Expected every name once: "
                              "name the files of one variant, or delete the superfluous file.")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> Checkpoint:
        """The same with other values for some tensors, or further ones, which are in memory."""
        other = copy.copy(self)
        other.entries = {**self.entries, **{name: Entry(array.shape, native(array).dtype, Path(), 0)
                                            for name, array in arrays.items()}}
        other.arrays = {**self.arrays, **arrays}
        return other

    def with_entries(self, entries: Mapping[str, Entry]) -> Checkpoint:
        """The same files with other names, or parts, of their tensors."""
        other = copy.copy(self)
        other.entries = dict(entries)
        return other

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor, read from its file. Raises: WeightError for a name that is not there."""
        if name not in self.entries:
            raise WeightError(f"tensor '{name}' is not in {listing(f.name for f in self.files)}."
                              f"{nearest(name, self.entries)}")
        if name in self.arrays:
            return self.arrays[name]
        return _read_alone(self.entries[name])

    def refuse_integers(self, names: Iterable[str] | None = None) -> None:
        """Raises: WeightError naming the tensors (of ``names``) that are no floating-point numbers: no weights are."""
        odd = [f"{n} ({self.entries[n].dtype})" for n in (names or self.entries)
               if "float" not in self.entries[n].dtype.name]
        if odd:
            raise WeightError(f"{listing(self.files)}: {len(odd)} tensors are not weights of a kind that is "
                              f"read: {listing(odd)}. Expected {listing(FLOATS)}. Download or save the file again.")

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors as (name, array), file by file, one in memory at a time. Each array is the caller's own."""
        by_file = defaultdict(list)
        for name, entry in self.entries.items():
            if entry.members:
                yield name, _read_alone(entry)
            elif name not in self.arrays:
                by_file[entry.file].append((name, entry))
        yield from self.arrays.items()
        for path, found in by_file.items():
            with open(path, "rb") as file:
                for name, entry in found:
                    yield name, _read(file, entry)


def open_checkpoint(source: Source) -> Checkpoint:
    """Open a file, a folder, a glob pattern, an ``*.index.json``, or a list of these.

    An index is honoured: every shard it names must be there and hold what it says. Without one, names of the form
    ``x-00001-of-00003`` must be complete, unless a single file is given by name.

    Raises: WeightError naming the missing shard and its tensors, tensors in two files, a broken file, or a pickle.
    """
    files, weight_map = find_files(source)
    checkpoint = Checkpoint(files)
    absent = [f"{name} (in {shard})" for name, shard in weight_map.items() if name not in checkpoint]
    if absent:
        raise WeightError(f"the index of {files[0].parent} names {len(absent)} tensors that its files do not hold: "
                          f"{listing(absent)}. The download is incomplete or mixed: download the folder again.")
    return checkpoint


def load_state_dict(path: Source, torch_dtype: Any = None, device: str = "cpu",
                    mindspore_dtype: Any = None) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint in memory.

    Args:
        path: see `open_checkpoint`.
        torch_dtype, mindspore_dtype: float32, float16, bfloat16 or float64 as a name, a NumPy type or a MindSpore
            type; floating-point tensors are cast to it, others are not. None keeps what the file holds.
        device: only "cpu": arrays live on the host.

    Raises: WeightError, also for a value that does not fit into the dtype.
    """
    if device != "cpu":
        raise WeightError(f"device='{device}': expected 'cpu'. Weights are loaded as NumPy arrays.")
    asked = asked_dtype(mindspore_dtype, torch_dtype)
    dtype = None if asked is None else float_dtype(asked)
    tensors = open_checkpoint(path).tensors()
    return {name: array if dtype is None else cast(array, dtype, name) for name, array in tensors}


def dtype_name(dtype: Any) -> str:
    """``"float32"`` for mindspore.float32, torch.float32, numpy.float32 or its name, and so on."""
    is_numpy = isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic))
    return np.dtype(dtype).name if is_numpy else str(dtype).rpartition(".")[2].lower()


def asked_dtype(mindspore_dtype: Any, torch_dtype: Any) -> str | None:
    """The name of the dtype that a function was given under either name. Raises: ConfigError for two that differ."""
    names = {name: dtype_name(dtype) for name, dtype in (("mindspore_dtype", mindspore_dtype),
                                                         ("torch_dtype", torch_dtype)) if dtype is not None}
    if len(set(names.values())) > 1:
        raise ConfigError(f"mindspore_dtype={names['mindspore_dtype']} and torch_dtype={names['torch_dtype']}: the two "
                          "mean the same. Give one of them.")
    return next(iter(names.values()), None)


def float_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of a name, a NumPy type or a MindSpore type. Raises: WeightError."""
    name = dtype_name(dtype)
    if name not in FLOATS:
        raise WeightError(f"dtype {dtype}: expected one of {listing(FLOATS)}.{nearest(name, FLOATS)}")
    return FLOATS[name]


def native(array: np.ndarray) -> np.ndarray:
    """The same bits with the dtype of NumPy or ml_dtypes, whoever registered the dtype of ``array``."""
    dtype = DTYPES[TAGS[array.dtype.name]] if array.dtype.name in TAGS else array.dtype
    return array if array.dtype == dtype else array.view(dtype)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """``array`` as floating-point ``dtype``; integers stay. Raises: WeightError when a value becomes infinite."""
    array = native(array)
    if array.dtype.name not in FLOATS or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.count_nonzero(np.isinf(result)) > np.count_nonzero(np.isinf(array)):
        raise WeightError(f"tensor '{name}' holds {np.abs(array[np.isfinite(array)]).max()}, too large for "
                          f"{dtype.name}. Choose bfloat16 or float32.")
    return result


def save_state_dict(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray] | Checkpoint,
                    metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file by the commit protocol. Its metadata always says format "pt", which others demand.

    Args:
        tensors: those of a `Checkpoint` are read when they are written: one is in memory.

    Raises: OutputError when it cannot be written; WeightError for a dtype or metadata the format cannot hold.
    """
    write_file(path, serialize(tensors, metadata))


def serialize(tensors: Mapping[str, np.ndarray] | Checkpoint,
              metadata: Mapping[str, str] | None = None) -> list[memoryview] | Stream:
    """A safetensors file: the header, then views of the tensors, widest dtype first so all are aligned. Of a
    `Checkpoint` it is a stream, which reads each tensor when it is written.

    Source: the format of safetensors 0.8.
    """
    if isinstance(tensors, Checkpoint):
        kinds = {name: (entry.read_as, entry.shape) for name, entry in tensors.entries.items()}
    else:
        odd = [f"tensor '{n}' is {type(a).__name__}" for n, a in tensors.items() if not isinstance(a, np.ndarray)]
        if odd:
            raise WeightError(f"safetensors cannot hold {listing(odd)}. Expected arrays.")
        kinds = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    text, order = _header(kinds, metadata or {})

    def pieces() -> Iterator[memoryview]:
        yield memoryview(text)
        for name in order:
            if (array := tensors[name]).nbytes:
                yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    size = len(text) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values())
    return Stream(size, pieces) if isinstance(tensors, Checkpoint) else list(pieces())


def _header(kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
            metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The first bytes of a file of tensors of these dtypes and shapes, and the order of the tensors behind them."""
    metadata = {str(k): v for k, v in metadata.items()} | {"format": "pt"}
    wrong = [f"metadata {k}={v!r} is not text" for k, v in metadata.items() if not isinstance(v, str)]
    wrong += [f"tensor '{name}' of {dtype}" for name, (dtype, _) in kinds.items() if dtype.name not in TAGS]
    if wrong:
        raise WeightError(f"safetensors cannot hold {listing(wrong)}. Expected text and arrays of {listing(TAGS, 20)}.")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    order, start = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name)), 0
    for name in order:
        dtype, shape = kinds[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": TAGS[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def save_sharded(folder: str | os.PathLike[str], tensors: Mapping[str, np.ndarray] | Checkpoint,
                 stem: str = "diffusion_pytorch_model", max_shard_bytes: int = 10 * 10**9,
                 config: Mapping[str, Any] | None = None, replace: bool = False) -> None:
    """Write a component folder as diffusers does: config.json and one file, or shards with their index.json.

    Args:
        tensors: those of a `Checkpoint` are read when they are written: one is in memory.
        stem: "diffusion_pytorch_model" for diffusers, "model" for transformers.
        max_shard_bytes: a tensor larger than this gets a shard of its own.
        replace: swap an existing folder; without it one that is not empty is refused.

    Raises: OutputError, WeightError; the folder is complete or not there.
    """
    shards: list[list[str]] = [[]]
    is_read_later = isinstance(tensors, Checkpoint)
    sizes = {name: value.nbytes for name, value in (tensors.entries if is_read_later else tensors).items()}
    size = 0
    for name, own in sizes.items():
        if shards[-1] and size + own > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    names = _shard_names(stem, len(shards))
    with stage_folder(folder, replace=replace, needed=sum(sizes.values())) as stage:
        for name, shard in zip(names, shards):
            part = {tensor: tensors[tensor] for tensor in shard} if not is_read_later else \
                tensors.with_entries({tensor: tensors.entries[tensor] for tensor in shard})
            stage.write(name, serialize(part))
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
            stage.write(stem + INDEX, _index(weight_map, sum(sizes.values())))
        if config is not None:
            stage.write("config.json", _json(config))


def link_sharded(folder: str | os.PathLike[str], checkpoint: Checkpoint, stem: str, config: Mapping[str, Any]) -> None:
    """The folder that `save_sharded` writes, of files that are there: they get a second name in it, or are copied where
    the file system has none.

    Args:
        checkpoint: whole files, as `open_checkpoint` gives them.

    Raises: OutputError.
    """
    names = dict(zip(checkpoint.files, _shard_names(stem, len(checkpoint.files))))
    with stage_folder(folder) as stage:
        for file, name in names.items():
            link_or_copy(file, Path(stage) / name)
        if len(names) > 1:
            weight_map = {tensor: names[entry.file] for tensor, entry in checkpoint.entries.items()}
            stage.write(stem + INDEX, _index(weight_map, sum(e.nbytes for e in checkpoint.entries.values())))
        stage.write("config.json", _json(config))


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]


def _index(weight_map: Mapping[str, str], size: int) -> bytes:
    return _json({"metadata": {"total_size": size}, "weight_map": weight_map})


def match(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]],
          where: str = "the checkpoint") -> None:
    """Check that a checkpoint holds exactly the tensors a model expects.

    Args:
        expected, found: name -> shape.
        where: the checkpoint's name for the message.

    Raises: WeightError listing missing, superfluous and mis-shaped tensors: the first ten of each, and how many.
    """
    missing = [n for n in expected if n not in found]
    superfluous = [n for n in found if n not in expected]
    shapes = [f"{n} {tuple(found[n])}, expected {tuple(expected[n])}" for n in expected
              if n in found and tuple(found[n]) != tuple(expected[n])]
    problems = []
    if missing:
        near = {n: get_close_matches(n, superfluous, n=1) for n in missing[:10]}
        hints = [f"{n} (near: {near[n][0]})" if near.get(n) else n for n in missing]
        problems.append(f"{len(missing)} missing: {listing(hints)}")
    if superfluous:
        problems.append(f"{len(superfluous)} superfluous: {listing(superfluous)}")
    if shapes:
        problems.append(f"{len(shapes)} of the wrong shape: {listing(shapes)}")
    if problems:
        raise WeightError(f"{where} does not fit the model ({len(expected)} tensors expected, {len(found)} found): "
                          f"{'; '.join(problems)}. Give the checkpoint of this model, or its own config.json.")


# -- reading -------------------------------------------------------------------------------------------------------


def read_header(file: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Names, shapes, dtypes and places of the tensors of one file, in the order of their bytes, and its metadata.

    Raises: WeightError for a file that is missing, cut off, damaged, or not safetensors.
    """
    file = Path(file)
    if file.suffix in PICKLES:
        raise WeightError(pickle_text([file]))
    try:
        if os.path.lexists(file):
            open_regular(os.fspath(file)).close()  # reading a pipe would wait for ever
        with safe_open(file, framework="np"):  # refuses bad lengths, and offsets that overlap or leave gaps
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length))
    except DataError as error:
        raise WeightError(f"{str(error).partition('. ')[0]}. Download or save it again.") from None
    except FileNotFoundError:
        raise WeightError(f"{file} does not exist.{nearest(file.name, names_in(file.parent))}") from None
    except (SafetensorError, ValueError, OSError) as error:
        size = file.stat().st_size if file.is_file() else "no"
        raise WeightError(f"{file} ({size} bytes) is not a complete safetensors file: {error}. "
                          "Download or save it again.") from error
    metadata = header.pop("__metadata__", None) or {}  # null is none: safetensors 0.8 opens such a file
    entries = {}
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if info["dtype"] not in DTYPES:
            raise WeightError(f"{file}: tensor '{name}' is {info['dtype']}; expected one of {listing(DTYPES, 20)}.")
        entries[name] = Entry(tuple(info["shape"]), DTYPES[info["dtype"]], file, 8 + length + info["data_offsets"][0])
    return entries, metadata


def _read_alone(entry: Entry) -> np.ndarray:
    if entry.members:
        array, start = np.empty(entry.shape, entry.dtype), 0
        for member in entry.members:
            array[start:start + member.shape[0]] = _read_alone(member).reshape(member.shape[0], *entry.shape[1:])
            start += member.shape[0]
        return array
    with open(entry.file, "rb") as file:
        return _read(file, entry)


def _read(file: Any, entry: Entry) -> np.ndarray:
    array = np.empty(entry.shape[::-1] if entry.is_transposed else entry.shape, entry.dtype)
    if array.nbytes:
        file.seek(entry.start)
        if file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:
            raise WeightError(f"{entry.file} became shorter while it was read. Download or save it again.")
    if entry.is_transposed:
        array = np.ascontiguousarray(array.T)
    if entry.is_swapped:
        array = np.roll(array, len(array) // 2, axis=0)
    if entry.scale is not None:
        array = array.astype(np.float32) * np.float32(_read_alone(entry.scale).reshape(()))
    return array


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
