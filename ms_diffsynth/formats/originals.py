"""Checkpoints in the names of their publishers, or of ComfyUI, as the same files in diffusers' names; and the reverse.

Nothing is copied: a layer of several of diffusers' is divided by rows, and rows of a tensor lie together in a file. So
no more than one tensor is in memory when such a file is read, or written.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ms_diffsynth.errors import WeightError, listing
from ms_diffsynth.formats.interchange import Model, Row, Table
from ms_diffsynth.formats.weights import Checkpoint, Entry

# ComfyUI's files of 8 bits: a weight's factor; that of an input, and marks, are not needed
SCALES, MARKS = ("scale_weight", "weight_scale"), ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")
UNUSED = (".logit_scale",)  # ends of names in files of whole pipelines: of CLIP's training


def in_our_names(checkpoint: Checkpoint, model: Model | None = None) -> Checkpoint:
    """The checkpoint by diffusers' names, weights of 8 bits with their factor.

    Args:
        model: its names; None leaves them.

    Raises: WeightError for a factor that is not one number, or is one of whole numbers, and for rows that cannot be
        divided.
    """
    entries = _with_scales(checkpoint)
    if model is None:
        return checkpoint.with_entries(entries)
    entries = {_without_beginning(name, model): entry for name, entry in entries.items()}
    turned = {theirs for ours, theirs in model.tensors.items() if ours in model.transposed}
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        stem, _, part = name.rpartition(".")
        alone = model.tensor(name, is_ours=False)
        meant = [None] if alone else model.find(stem, False) or [None]
        if meant[0] is None or meant[0].row is None:
            found[alone or name] = _transposed(entry) if name in turned else entry
            continue
        row = meant[0].row
        weight = entries.get(f"{stem}.{row.weight}")
        found |= _members(name, part, entry, meant[0].modules, row, row.swaps(weight and weight.shape))
    return checkpoint.with_entries(found)


def in_original_names(checkpoint: Checkpoint, model: Model) -> Checkpoint:
    """A checkpoint in diffusers' names by its publisher's, without a beginning.

    Raises: WeightError for tensors that have no name there, and for a layer of theirs of which a part is missing.
    """
    entries, found, problems = checkpoint.entries, {}, []
    columns = model.columns_of(entries)
    has_own = any(row.names.keys() & columns for row in model.rows)  # otherwise names are the same everywhere
    done: set[str] = set()
    for name, entry in entries.items():
        stem, _, part = name.rpartition(".")
        alone = model.tensor(name, is_ours=True)
        place = (alone, None, ()) if alone else next(filter(None, (model.place(stem, c) for c in columns)), None)
        if name in done:
            continue
        if place is None and has_own:
            problems.append(name)
        elif place is None or place[1] is None:
            found[alone or name] = _transposed(entry) if name in model.transposed else entry
        else:
            other, row, modules = place
            names = [f"{module}.{part}" for module in modules]
            weight = entries.get(f"{stem}.weight")
            if lost := [n for n in names if n not in entries]:
                problems.append(f"{name} without {listing(lost)}")
            else:
                members = [entries[n] for n in names]
                joined = members[0] if len(members) == 1 else _joined(names, members)
                if row.swaps(weight and weight.shape):
                    joined = replace(joined, is_swapped=not joined.is_swapped)
                if row.is_convolution and part == "weight":
                    joined = replace(joined, shape=(*joined.shape[:2], 1, 1))
                found[f"{other}.{row.part(part)}"] = joined
            done |= set(names)
    if problems:
        raise WeightError(f"{listing(checkpoint.files)}: {len(problems)} tensors have no place among the publisher's "
                          f"names: {listing(problems)}. Expected a whole model of this family.")
    return checkpoint.with_entries(found)


def in_one_file(checkpoints: Mapping[str, Checkpoint], table: Table) -> Checkpoint:
    """Models in diffusers' names, by model, as one checkpoint in their publisher's.

    Raises: WeightError for several models of a family that no program has in one file.
    """
    if unknown := [name for name in checkpoints if name not in table.models]:
        raise WeightError(f"the publisher's names of {listing(unknown)} of {table.title} are not known: expected one "
                          f"of {listing(table.models)}. Give the folder of that model, such as transformer.")
    begins = {name: table.models[name].whole if len(checkpoints) > 1 else table.models[name].alone
              for name in checkpoints}
    if None in begins.values():
        raise WeightError(f"no program has {listing(checkpoints)} of {table.title} in one file. Expected the folder of "
                          "one model, such as transformer.")
    entries, whole = {}, None
    for name, checkpoint in checkpoints.items():
        own = in_original_names(checkpoint, table.models[name])
        entries |= {begins[name] + key: entry for key, entry in own.entries.items()}
        arrays = {begins[name] + key: array for key, array in own.arrays.items()}
        whole = own.with_entries(entries) if whole is None else whole.with_entries(entries)
        whole = whole.with_arrays(arrays)
    return whole


def models_of(checkpoint: Checkpoint, table: Table) -> dict[str, list[str]]:
    """Of a file that holds a whole pipeline: model -> the names of its tensors; empty for a file of one model.

    Names that belong to no model come under "".
    """
    found: dict[str, list[str]] = {}
    for name in checkpoint.entries:
        model, begin, _, is_flat = table.split(name)
        found.setdefault(model if begin and not is_flat else "", []).append(name)
    if len(found.keys() - {""}) < 2:
        return {}
    found[""] = [name for name in found.get("", ()) if not name.endswith((*UNUSED, *SCALES, *MARKS))]
    return found


def _transposed(entry: Entry) -> Entry:
    return replace(entry, shape=entry.shape[::-1], is_transposed=not entry.is_transposed)


def _without_beginning(name: str, model: Model) -> str:
    begins = sorted({*model.prefixes.values(), *model.also, "model.diffusion_model."}, key=len, reverse=True)
    return next((name.removeprefix(begin) for begin in begins if begin and name.startswith(begin)), name)


def _joined(names: list[str], members: list[Entry]) -> Entry:
    """One entry of the rows of several. Raises: WeightError for those that do not fit below each other."""
    kinds = {(member.read_as, member.shape[1:]) for member in members}
    if len(kinds) > 1:
        described = listing(f"{n} {m.shape} {m.read_as}" for n, m in zip(names, members))
        raise WeightError(f"{described} are one layer of the publisher's: expected one dtype and one width.")
    rows = sum(member.shape[0] for member in members)
    first = members[0]
    return Entry((rows, *first.shape[1:]), first.read_as, first.file, first.start, members=tuple(members))


def _members(name: str, part: str, entry: Entry, modules: tuple[str, ...], row: Row,
             is_swapped: bool) -> dict[str, Entry]:
    part = row.part(part)
    shape = entry.shape[:2] if row.is_convolution and entry.shape[2:] == (1, 1) else entry.shape
    sizes = row.sizes(shape[0])
    if sizes is None:
        raise WeightError(f"{name} {entry.shape}: {listing(modules)} are one layer there, whose rows are not "
                          f"{row.shares} parts.")
    bytes_of_row = math.prod(shape[1:]) * entry.dtype.itemsize
    members, start = {}, entry.start
    for module, size in zip(modules, sizes):
        members[f"{module}.{part}"] = replace(entry, shape=(size, *shape[1:]), start=start, is_swapped=is_swapped)
        start += size * bytes_of_row
    return members


def _with_scales(checkpoint: Checkpoint) -> Mapping[str, Entry]:
    ends = tuple(f".{end}" for end in (*SCALES, *MARKS))
    entries = {n: e for n, e in checkpoint.entries.items() if not (n.endswith(ends) or n in MARKS)}
    for name, scale in checkpoint.entries.items():
        stem, _, end = name.rpartition(".")
        weight = f"{stem}.weight"
        if end not in SCALES or weight not in entries:
            continue
        if entries[weight].dtype.kind in "iu":
            raise WeightError(f"{weight} in {scale.file} is {entries[weight].dtype} with factors, as files of 4 bits "
                              "and of whole numbers are: expected floating-point numbers. Give the file in bfloat16 or "
                              "fp8.")
        if entries[weight].dtype.name.startswith("float8"):
            if math.prod(scale.shape) != 1:
                raise WeightError(f"{name} {scale.shape} in {scale.file}: expected one factor for a weight of 8 bits. "
                                  "Give the file in bfloat16.")
            entries[weight] = replace(entries[weight], scale=scale)
    return entries
