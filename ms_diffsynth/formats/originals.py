"""Checkpoints in the names of their publishers, or of ComfyUI, as the same files in diffusers' names.

Nothing is copied: a layer of several of diffusers' is divided by rows, and rows of a tensor lie together in a file. So
no more than one tensor is in memory when such a file is read.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ms_diffsynth.errors import WeightError, listing
from ms_diffsynth.formats.interchange import Model
from ms_diffsynth.formats.weights import Checkpoint, Entry

# ComfyUI's files of 8 bits: a weight's factor; that of an input, and marks, are not needed
SCALES, MARKS = ("scale_weight", "weight_scale"), ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")


def in_our_names(checkpoint: Checkpoint, model: Model | None = None) -> Checkpoint:
    """The checkpoint by diffusers' names, weights of 8 bits with their factor.

    Args:
        model: its names; None leaves them.

    Raises: WeightError for a factor that is not one number, and for rows that cannot be divided.
    """
    entries = _with_scales(checkpoint)
    if model is None:
        return checkpoint.with_entries(entries)
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        stem, _, part = _without_beginning(name, model).rpartition(".")
        meant = model.find(stem, False) or [None]
        if meant[0] is None or meant[0].row is None:
            found[f"{stem}.{part}" if stem else part] = entry
            continue
        found |= _members(name, part, entry, *meant[0][:2])
    return checkpoint.with_entries(found)


def is_of(checkpoint: Checkpoint, model: Model) -> bool:
    """Whether most of a checkpoint's tensors have names of a model, in any column."""
    stems = {_without_beginning(name, model).rpartition(".")[0] for name in checkpoint.entries
             if not name.endswith((*SCALES, *MARKS))}
    known = sum(bool(model.find(stem, False)) for stem in stems)
    return known > 0.8 * len(stems)


def _without_beginning(name: str, model: Model) -> str:
    begins = sorted({*model.prefixes.values(), *model.also, "model.diffusion_model."}, key=len, reverse=True)
    return next((name.removeprefix(begin) for begin in begins if begin and name.startswith(begin)), name)


def _members(name: str, part: str, entry: Entry, modules: tuple[str, ...], row) -> dict[str, Entry]:
    part = "weight" if part == row.weight else part
    shape = entry.shape[:2] if row.is_convolution and entry.shape[2:] == (1, 1) else entry.shape
    sizes = row.sizes(shape[0])
    if sizes is None:
        raise WeightError(f"{name} {entry.shape}: {listing(modules)} are one layer there, whose rows are not "
                          f"{row.shares} parts.")
    bytes_of_row = math.prod(shape[1:]) * entry.dtype.itemsize
    members, start = {}, entry.start
    for module, size in zip(modules, sizes):
        members[f"{module}.{part}"] = replace(entry, shape=(size, *shape[1:]), start=start, is_swapped=row.is_swapped)
        start += size * bytes_of_row
    return members


def _with_scales(checkpoint: Checkpoint) -> Mapping[str, Entry]:
    ends = tuple(f".{end}" for end in (*SCALES, *MARKS))
    entries = {n: e for n, e in checkpoint.entries.items() if not (n.endswith(ends) or n in MARKS)}
    for name, scale in checkpoint.entries.items():
        stem, _, end = name.rpartition(".")
        weight = f"{stem}.weight"
        if end in SCALES and weight in entries and entries[weight].dtype.name.startswith("float8"):
            if math.prod(scale.shape) != 1:
                raise WeightError(f"{name} {scale.shape} in {scale.file}: expected one factor for a weight of 8 bits. "
                                  "Give the file in bfloat16.")
            entries[weight] = replace(entries[weight], scale=scale)
    return entries
