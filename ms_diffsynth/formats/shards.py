"""Which safetensors files a source names, and whether they are all there: folders, globs, indices, numbered shards."""
from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ms_diffsynth.errors import WeightError, listing, nearest
from ms_diffsynth.formats.json_text import read_json, shown

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def find_files(source: Source) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a source, and the name -> shard map of the indices that were met.

    An index is honoured: every shard it names must be there. Without one, names of the form ``x-00001-of-00003`` must
    be complete, unless a single file is given by name.

    Raises: WeightError naming the missing shards and their tensors, or saying what is there instead of weights.
    """
    files, indices = _find(source)
    is_single = isinstance(source, (str, os.PathLike)) and Path(source).is_file() and not indices
    if not is_single:
        indices += [path for file in files if (path := _index_beside(file)) is not None]
        numbers: dict[tuple[Path, str, str], set[int]] = defaultdict(set)  # of shards without an index
        for file in files:
            if (found := _SHARD.fullmatch(file.name)) and _index_beside(file) is None:
                numbers[file.parent, found["stem"], found["count"]].add(int(found["number"]))
        missing = [str(folder / f"{stem}-{k:05d}-of-{count}.safetensors")
                   for (folder, stem, count), there in numbers.items()
                   for k in range(1, int(count) + 1) if k not in there]
        if missing:
            raise WeightError(f"{len(missing)} of the numbered files are missing: {listing(missing)}. "
                              "Download them, or give the path of a single file to load only that one.")
    weight_map: dict[str, str] = {}
    for index in dict.fromkeys(indices):
        own = _weight_map(index)
        problems = []
        for shard in sorted(set(own.values())):
            path = index.parent / shard
            if path not in files or not path.is_file():
                held = [name for name, of in own.items() if of == shard]
                state = "was not given" if path.is_file() else "is missing"
                problems.append(f"{path} {state}; it holds {len(held)} tensors: {listing(held)}")
        if problems:
            raise WeightError(f"{index.name} names {len(problems)} files that cannot be read: {'; '.join(problems)}. "
                              "Download the missing files, or give the folder.")
        weight_map |= own
    return list(dict.fromkeys(files)), weight_map


def _find(source: Source) -> tuple[list[Path], list[Path]]:
    """The files a source names, and the index files that were met."""
    if not isinstance(source, (str, os.PathLike)):
        found = [_find(item) for item in source]
        if not found:
            raise WeightError("an empty list of weight files was given. Expected at least one path.")
        return [f for files, _ in found for f in files], [i for _, indices in found for i in indices]
    path = Path(source)
    if path.is_dir():
        indices = sorted(path.glob("*" + INDEX))
        if len(indices) > 1:
            raise WeightError(f"{path} holds {len(indices)} indices: {listing(i.name for i in indices)}. "
                              "Give the path of one.")
        if indices:
            return _index_files(indices[0]), indices
        return _safetensors(path, sorted(path.iterdir())), []
    if path.is_file():
        if path.name.endswith(INDEX):
            return _index_files(path), [path]
        return _safetensors(path, [path]), []
    return _safetensors(path, [Path(p) for p in sorted(glob.glob(str(path)))]), []


def _safetensors(source: Path, paths: list[Path]) -> list[Path]:
    """Those of ``paths`` that are safetensors files; at least one."""
    files = [p for p in paths if p.suffix == ".safetensors" and p.is_file()]
    if files:
        return files
    if pickles := [p for p in paths if p.suffix in PICKLES]:
        raise WeightError(pickle_text(pickles))
    folder = source if source.is_dir() else source.parent
    raise WeightError(f"{source}: no safetensors file found. {folder} holds {listing(names_in(folder)) or 'nothing'}."
                      f"{nearest(source.name, names_in(folder))}")


def names_in(folder: Path) -> list[str]:
    """Names of the entries of a folder; none when there is no such folder."""
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def pickle_text(paths: list[Path]) -> str:
    """Why pickles are refused."""
    return (f"{listing(paths)}: pickled weights are not read, because reading them executes code. Expected "
            ".safetensors. Get the safetensors variant of the model, or convert the file where you trust it.")


def _weight_map(index: Path) -> dict[str, str]:
    remedy = "Download it again."
    names = read_json(index, WeightError, remedy).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise WeightError(f"{index} is not an index of shards: its weight_map is {shown(names)}, expected names of "
                          f"tensors and of files. {remedy}")
    outside = sorted({shard for shard in names.values() if Path(shard).name != shard or "\0" in shard})
    if outside:
        raise WeightError(f"{index} names files outside its folder: {listing(outside)}. Expected plain file names.")
    return names


def _index_files(index: Path) -> list[Path]:
    return [index.parent / shard for shard in sorted(set(_weight_map(index).values()))]


def _index_beside(file: Path) -> Path | None:
    found = _SHARD.fullmatch(file.name)
    path = file.with_name(found["stem"] + INDEX) if found else None
    return path if path is not None and path.is_file() else None
