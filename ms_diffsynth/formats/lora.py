"""Files of adapters: read in every naming of a family's table, written in the one that is asked for.

A file's scale is alpha / rank. Some readers take it from the metadata, some from ``.alpha`` tensors, some not at all,
so it is folded into B when a file is written, with ``lora_alpha = r`` in the metadata: it means the same everywhere.
kohya's layout alone has an ``.alpha`` for each layer, which its readers ask for.
"""
from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ms_diffsynth.errors import WeightError, listing, nearest
from ms_diffsynth.formats.adapters import DORA, FULL, LORA, MAGNITUDE, READ, ROWS, A, B, Format, Parts, label
from ms_diffsynth.formats.interchange import DIFFUSERS, LAYOUTS, Found, Model, Table
from ms_diffsynth.formats.json_text import NotJSON, parse_json, read_json
from ms_diffsynth.formats.weights import FLOATS, Checkpoint, native, save_state_dict

logger = logging.getLogger(__name__)

ADAPTER_METADATA, TRAINED_MODELS = "lora_adapter_metadata", "ms_diffsynth.lora_base_model"
PEFT_CONFIG, PEFT_WEIGHTS, PEFT_BEGINNING = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ALPHA, BIAS, DIFF_BIAS = "alpha", "lora_B.bias", "diff_b"
LARGEST_ALPHA = 1e6
BEGINNINGS = {"": "no prefix", "transformer.": "diffusers", "diffusion_model.": "ComfyUI", PEFT_BEGINNING: "peft",
              "model.diffusion_model.": "ComfyUI", "lora_unet_": "kohya", "lora_transformer_": "OneTrainer",
              "lycoris_": "LyCORIS"}
# of other kinds of adapters, which are recognised and not read -> what they are
OTHERS = {r"oft_|boft_": "OFT", r"lokr_t2|hada_t\d|lora_mid": "a convolution's Tucker decomposition",
          r"lora_embedding_": "a LoRA of embeddings", r"set_weight|reshape_weight|w_norm": "ComfyUI's replaced weights",
          r"ia3_l|\.(a1|a2|b1|b2)\.weight$": "IA3 or GLoRA"}

Pair = tuple[np.ndarray, np.ndarray]
Scaled = tuple[np.ndarray, np.ndarray, float]


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds for one model.

    Attributes:
        modules: module -> part -> tensor. scales: the scale of each, not yet in it. formats: the kind of each.
        biases: module -> change of its bias.
        layout: what the names were recognised as.
    """

    modules: Mapping[str, Parts]
    scales: Mapping[str, float]
    formats: Mapping[str, Format]
    biases: Mapping[str, np.ndarray] = field(default_factory=dict)
    layout: str = ""

    @property
    def format(self) -> Format | None:
        """The kind of all modules; None where they differ."""
        first, *others = {id(kind): kind for kind in self.formats.values()}.values()
        return None if others else first

    @property
    def name(self) -> str:
        """What messages call it."""
        return " and ".join(dict.fromkeys(kind.name for kind in self.formats.values()))

    def with_scale(self, divided_by: Mapping[str, float] | None = None) -> dict[str, dict[str, np.ndarray]]:
        """The tensors with their scale in them, or with that of ``divided_by`` for those who apply this one later."""
        scaled = {}
        for module, parts in self.modules.items():
            scale, part = self.scales[module] / (divided_by or {}).get(module, 1.0), self.formats[module].scaled
            scaled[module] = {**parts, part: parts[part] * np.float32(scale)}
        return scaled


# -- writing -----------------------------------------------------------------------------------------------------------


def save_adapter(path: str | os.PathLike[str], file_format: Format, modules: Mapping[str, Parts], scale: float,
                 prefix: str = "transformer", metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter as ``<prefix>.<module>.<part>``.

    Args:
        modules: module -> part -> tensor.
        scale: alpha / rank; folded into one part in float32.
        prefix: "transformer" (diffusers, ComfyUI), "diffusion_model" (ComfyUI, DiffSynth-Studio) or "".

    Raises: WeightError for tensors that do not fit together; OutputError when the file cannot be written.
    """
    table = Table({"": Model({DIFFUSERS: prefix.rstrip(".") + "." if prefix else ""})})
    file = AdapterFile(modules, dict.fromkeys(modules, scale), dict.fromkeys(modules, file_format))
    save_adapters(path, {"": file}, table, DIFFUSERS, metadata, kind=file_format)


def save_lora(path: str | os.PathLike[str], pairs: Mapping[str, Pair], alpha: float, prefix: str = "transformer",
              metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA as ``<prefix>.<module>.lora_A.weight`` and ``.lora_B.weight``.

    Shapes: pairs[module] = (A [r, in], B [out, r]).

    Args:
        alpha: the weight change is alpha / r * B @ A; folded into B in float32.
        prefix: "transformer" (diffusers, ComfyUI), "diffusion_model" (ComfyUI, DiffSynth-Studio) or "".

    Raises: WeightError for pairs that do not fit together; OutputError when the file cannot be written.
    """
    modules = {module: dict(zip(LORA.parts, pair)) for module, pair in pairs.items()}
    scales = {module: alpha / (LORA.rank(parts) or 1) for module, parts in modules.items()}
    table = Table({"": Model({DIFFUSERS: prefix.rstrip(".") + "." if prefix else ""})})
    save_adapters(path, {"": AdapterFile(modules, scales, dict.fromkeys(modules, LORA))}, table, DIFFUSERS, metadata)


def save_adapters(path: str | os.PathLike[str], files: Mapping[str, AdapterFile], table: Table, layout: str,
                  metadata: Mapping[str, str] | None = None, kind: Format = LORA) -> None:
    """Write adapters of one model or several.

    Args:
        files: model, as in ``table`` -> its adapter.
        layout: of `interchange.LAYOUTS`.
        kind: what messages call an empty file.

    Raises: WeightError for tensors that do not fit together, and for what the layout has no names for; OutputError.
    """
    if not any(file.modules for file in files.values()):
        raise WeightError(f"{path}: no {kind.name} {kind.group}s to save. Expected at least one module with a "
                          f"{kind.name}.")
    if layout not in table.columns:
        raise WeightError(f"layout '{layout}': {LAYOUTS.get(layout, 'it')} has no names for {table.title}. Expected "
                          f"one of {listing(table.columns)}.{nearest(layout, table.columns)}")
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for name, file in files.items():
        _check(path, file)
        begins = table.models[name].prefixes.get(layout)
        if begins is None:
            problems.append(f"{name}: the layout {layout} has no names for it")
            continue
        has_alpha, ranks = layout in table.with_alpha, {}
        tensors |= _written(file, table.models[name], layout, has_alpha, begins, table.columns[layout], ranks, problems)
        own = table.models[name].prefixes[DIFFUSERS]
        if ranks and own not in ("", "diffusion_model.") and not has_alpha and layout != "diffsynth":
            settings |= {f"{own}{key}": value for key, value in _peft_settings(file, ranks).items()}
    if problems:
        raise WeightError(f"{path}: {len(problems)} layers cannot be written in the layout {layout} "
                          f"({LAYOUTS[layout]}): {listing(problems)}. Choose another layout, or make a LoRA of other "
                          "kinds of adapters first: ms-diffsynth lora resize --rank 16.")
    metadata = dict(metadata or {})
    if settings:
        metadata[ADAPTER_METADATA] = json.dumps(settings, indent=2, sort_keys=True)
    save_state_dict(path, tensors, metadata)


def _check(path: str | os.PathLike[str], file: AdapterFile) -> None:
    ranks = {module: file.formats[module].rank(parts) for module, parts in file.modules.items()}
    if wrong := [f"{module}: {_shapes(file.modules[module])}" for module, rank in ranks.items() if not rank]:
        kind = next(file.formats[module] for module, rank in ranks.items() if not rank)
        raise WeightError(f"{path}: {kind.name} {kind.group}s do not fit together: {listing(wrong)}. "
                          f"Expected {kind.shapes} with one r.")


def _peft_settings(file: AdapterFile, ranks: Mapping[str, int]) -> dict[str, Any]:
    """What peft's LoraConfig is made of, for modules of these ranks, by diffusers' names of them.

    diffusers 0.34 to 0.39 and mindone read both patterns before they make it. Without them a layer of another rank than
    most gets another scale (diffusers 0.39).
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    odd = {module: own for module, own in ranks.items() if own != rank}
    return {"r": rank, "lora_alpha": rank, "rank_pattern": odd, "alpha_pattern": odd,
            "target_modules": sorted(ranks), **({"lora_bias": True} if file.biases else {}),
            **{k: v for kind in file.formats.values() for k, v in kind.settings.items()}}


def _written(file: AdapterFile, model: Model, layout: str, has_alpha: bool, begins: str, column: str,
             ranks: dict[str, int], problems: list[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by the names of a layout.

    ``ranks`` gets that of each module; ``problems`` what has no name.
    """
    tensors: dict[str, np.ndarray] = {}
    done: set[str] = set()
    file = _with_one_rank(file) if has_alpha else file
    for module in dict.fromkeys((*file.modules, *file.biases)):
        if module in done:
            continue
        place, kind = model.place(module, column), file.formats.get(module, FULL)
        if place is None or (kind.layouts is not None and layout not in kind.layouts):
            what = kind.name if module in file.modules else "change of a bias alone"
            problems.append(f"{module} ({what if place else 'no name for it'})")
            continue
        name, row, members = place
        done |= set(members)
        try:
            parts, scale, bias = _joined(file, members, row) if row else _one(file, module)
        except WeightError as error:
            problems.append(f"{name} ({error})")
            continue
        if row and row.swaps(_shape_of_change(kind, parts)):
            kind, parts, bias = _swapped(kind, parts, bias)
        stem = begins + (name.replace(".", "_") if begins.endswith("_") else name)
        if bias is None and file.biases and layout == DIFFUSERS:
            bias = np.zeros(parts[B].shape[0], parts[B].dtype)  # peft has one for every layer or none
        if kind in (LORA, DORA):
            ranks |= dict.fromkeys(members, kind.rank(parts))
        tensors |= {f"{stem}.{part}": array
                    for part, array in _parts(kind, parts, scale, bias, layout, has_alpha).items()}
    return tensors


def _with_one_rank(file: AdapterFile) -> AdapterFile:
    """The same with ranks filled up by zeros: diffusers 0.39 reads kohya's files of several ranks with wrong scales."""
    ranks = {m: file.formats[m].rank(p) for m, p in file.modules.items() if file.formats[m] in (LORA, DORA)}
    if len(set(ranks.values())) < 2:
        return file
    modules = dict(file.modules)
    for m, rank in ranks.items():
        more, parts = max(ranks.values()) - rank, file.modules[m]
        modules[m] = {**parts, A: np.pad(native(parts[A]), [(0, more), (0, 0)]),
                      B: np.pad(native(parts[B]), [(0, 0), (0, more)])}
    return replace(file, modules=modules)


def _parts(kind: Format, parts: Parts, scale: float, bias: np.ndarray | None, layout: str,
           has_alpha: bool) -> dict[str, np.ndarray]:
    """Tensors of a module by the ends of their names in a layout."""
    if has_alpha and kind in (LORA, DORA):
        rank = kind.rank(parts)
        found = {"lora_down.weight": parts[A], "lora_up.weight": parts[B], "alpha": np.array(scale * rank, np.float32)}
        if MAGNITUDE in parts:
            found["dora_scale"] = parts[MAGNITUDE][:, None]
    else:
        infix = ".default.weight" if layout == "diffsynth" else ".weight"
        found = {part.replace(".weight", infix): _scaled(array, scale) if part == kind.scaled else array
                 for part, array in parts.items()}
    if bias is not None:
        found[BIAS if layout in (DIFFUSERS, "diffsynth") else DIFF_BIAS] = bias
    return found


def _one(file: AdapterFile, module: str) -> tuple[Parts, float, np.ndarray | None]:
    parts = file.modules.get(module, {})
    if ROWS in parts:
        raise WeightError(f"a {file.formats[module].name} of several layers together, which cannot be divided")
    return parts, file.scales.get(module, 1.0), file.biases.get(module)


def _joined(file: AdapterFile, members: Sequence[str], row: Any) -> tuple[Parts, float, np.ndarray | None]:
    """One layer of several: B block by block, or below each other where all have one A. Absent ones are zero rows.

    Raises: WeightError for what cannot be joined.
    """
    there = {m: file.modules[m] for m in members if m in file.modules}
    if len(members) == 1:
        return _one(file, members[0])
    if not there or (file.biases.keys() & members) - there.keys():
        raise WeightError("the change of a bias alone, of one layer of several")
    first, kinds = next(iter(there.values())), {file.formats[m] for m in there}
    kind = kinds.pop()
    if kinds or kind not in (LORA, DORA):
        same = [p for p in there.values() if all(p.get(k) is v for k, v in first.items() if k != ROWS)]
        if kinds or len(same) < len(members):
            raise WeightError(f"one layer there, {len(members)} here, which a {kind.name} cannot join")
        whole = {k: v for k, v in first.items() if k != ROWS}
        return whole, file.scales[members[0]], _joined_bias(file, members, [p[ROWS] for p in there.values()])
    if kind is DORA and len(there) < len(members):
        raise WeightError(f"no {listing(m for m in members if m not in there)}: a DoRA is of a whole layer")
    unit = next(iter(there[m][B].shape[0] // share for m, share in zip(members, row.shares) if m in there))
    sizes = [unit * share for share in row.shares]
    odd = [f"{m} {_shapes(there[m])}" for m, size in zip(members, sizes) if m in there
           and (there[m][B].shape[0], there[m][A].shape[1]) != (size, first[A].shape[1])]
    if odd:
        raise WeightError(f"{listing(odd)}: expected {row.shares} parts of {unit} rows, and one width")
    ends = np.cumsum([0, *sizes])
    scales = {file.scales[m] for m in there}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ups = {m: parts[B] if len({file.scales[n] for n in there}) == 1 else _scaled(parts[B], file.scales[m])
           for m, parts in there.items()}
    dtype = np.result_type(*(p.dtype for p in ups.values())) if len({p.dtype for p in ups.values()}) > 1 else \
        next(iter(ups.values())).dtype
    if all(p[A] is first[A] or (p[A].shape == first[A].shape and np.array_equal(p[A], first[A]))
           for p in there.values()):
        down = first[A]
        up = np.zeros((ends[-1], down.shape[0]), dtype)
        for k, m in enumerate(members):
            if m in there:
                up[ends[k]:ends[k + 1]] = ups[m]
    else:  # all blocks of one rank, absent ones too: diffusers then finds the members again
        rank = max(LORA.rank(p) for p in there.values())
        down = np.zeros((rank * len(members), first[A].shape[1]), first[A].dtype)
        up = np.zeros((ends[-1], rank * len(members)), dtype)
        for k, m in enumerate(members):
            if m in there:
                own = LORA.rank(there[m])
                down[k * rank:k * rank + own] = there[m][A]
                up[ends[k]:ends[k + 1], k * rank:k * rank + own] = ups[m]
    parts = {A: down, B: up}
    if kind is DORA:
        parts[MAGNITUDE] = np.concatenate([there[m][MAGNITUDE] for m in members])
    return parts, scale, _joined_bias(file, members, list(pairwise(ends)))


def _joined_bias(file: AdapterFile, members: Sequence[str], places: Sequence[Any]) -> np.ndarray | None:
    found = {m: file.biases[m] for m in members if m in file.biases}
    if not found:
        return None
    bias = np.zeros(int(places[-1][1]), next(iter(found.values())).dtype)
    for m, (start, end) in zip(members, places):
        if m in found:
            bias[start:end] = found[m]
    return bias


def _shape_of_change(kind: Format, parts: Parts) -> tuple[int, ...] | None:
    """The shape of the weight that is changed; None where only a bias is."""
    if not parts:
        return None
    return (parts[B].shape[0], parts[A].shape[1]) if kind in (LORA, DORA) else kind.product(parts).shape


def _swapped(kind: Format, parts: Parts, bias: np.ndarray | None) -> tuple[Format, Parts, np.ndarray | None]:
    """The same with the halves of the output in the other order."""
    def swap(array: np.ndarray) -> np.ndarray:
        return np.roll(array, array.shape[0] // 2, axis=0)

    if kind not in (LORA, DORA):
        kind, parts = FULL, {"diff": swap(kind.product(parts))} if parts else {}
    else:
        parts = {part: array if part == A else swap(array) for part, array in parts.items()}
    return kind, parts, None if bias is None else swap(bias)


# -- reading -----------------------------------------------------------------------------------------------------------


def load_lora(path: str | os.PathLike[str], modules: Iterable[str] | None = None) -> dict[str, Scaled]:
    """Read a LoRA file as module -> (A [r, in], B [out, r], scale); the weight change is scale * B @ A.

    The names it accepts, ``modules`` and errors are those of `load_adapter`.
    """
    found = load_adapter(path, modules)
    return {module: (*(parts[part] for part in LORA.parts), found.scales[module])
            for module, parts in found.modules.items()}


def models_in(path: str | os.PathLike[str], table: Table) -> list[str]:
    """The models that a file of adapters is for, by its names. A name that tells none is of the network."""
    checkpoint, _ = _open(path)
    found = {table.split(key)[0] for key in checkpoint.entries}
    return [model for model in table.models if model in found] or [table.network]


def metadata_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of a file, or of the one in peft's folder."""
    return _open(path)[0].metadata


def unmatched(path: str | os.PathLike[str], table: Table) -> list[str]:
    """What ``table`` does not know of a file's names."""
    reader = _Reader(path, *_open(path), dict.fromkeys(table.models), READ, table)
    shapes = reader.checkpoint.shapes
    for found, names in reader.keys().values():
        if found.row is not None and found.row.ratio and {A, B} <= names.keys():
            if shapes[names[B]][0] != found.row.ratio * shapes[names[A]][-1]:
                reader.problems.append(f"{names[B]} has not the shape of {table.title}'s")
    return reader.problems


def families_of(path: str | os.PathLike[str], tables: Mapping[str, Table]) -> list[str]:
    """The families, of those with ``tables``, that a file of adapters can be of: those that know all of its names, or
    the one of them that its header says; where none does, the one of its header."""
    header = metadata_of(path)
    kohya, modelspec = header.get("ss_base_model_version", ""), header.get("modelspec.architecture", "")
    told = [name for name, table in tables.items() if name == header.get("ms_diffsynth.family")] or [
        name for name, table in tables.items() if kohya.startswith(table.base_version)
        or modelspec.startswith(table.architecture)]
    fitting = [name for name, table in tables.items() if not unmatched(path, table)]
    return [name for name in told if name in fitting][:1] or fitting or told[:1]


def load_adapter(path: str | os.PathLike[str], modules: Iterable[str] | None = None,
                 formats: Sequence[Format] = (LORA,), table: Table | None = None,
                 model: str | None = None, families: Callable[[], Mapping[str, Table]] = dict) -> AdapterFile:
    """Read the file of an adapter for one model; what it holds for others is passed over.

    Args: as `load_adapters`; ``model`` is the one of ``table``, by default its network.
    """
    table = table or Table()
    model = table.network if model is None else model
    return load_adapters(path, {model: modules}, formats, table, families)[model]


def load_adapters(path: str | os.PathLike[str], models: Mapping[str, Iterable[str] | None],
                  formats: Sequence[Format], table: Table,
                  families: Callable[[], Mapping[str, Table]] = dict) -> dict[str, AdapterFile]:
    """Read the file of adapters, or peft's folder of one.

    Accepts the names of ``table`` with any of the beginnings that programs give them; ``lora_A`` / ``lora_B``,
    ``lora_down`` / ``lora_up``, an adapter's name behind them, ``.alpha``, and the scales of the metadata.

    Args:
        models: model of ``table`` -> the names of its linear layers; every tensor of the file must belong to one of
            them. None: names are taken as ``table`` knows them.
        formats: the kinds that are accepted, in the order in which they are tried.
        families: gives the tables of all families, by name: asked which one a file is of that does not fit at all.

    Raises: WeightError listing everything that is not understood, unmatched or incomplete.
    """
    checkpoint, config = _open(path)
    reader = _Reader(path, checkpoint, config, {m: None if known is None else list(known)
                                                for m, known in models.items()}, formats, table, families)
    return reader.read()


def _open(path: str | os.PathLike[str]) -> tuple[Checkpoint, dict[str, Any] | None]:
    """The tensors of a file, or of peft's folder, and the adapter_config.json of the latter."""
    file = Path(path)
    if file.is_dir() and (file / PEFT_CONFIG).is_file():
        file = file / PEFT_WEIGHTS
    config = file.with_name(PEFT_CONFIG)
    is_peft = file.name == PEFT_WEIGHTS and config.is_file()
    return Checkpoint([file]), read_json(config, WeightError, "Save it again.") if is_peft else None


class _Reader:
    """Reads one file; gathers what is wrong with it."""

    def __init__(self, path: Any, checkpoint: Checkpoint, config: dict[str, Any] | None,
                 models: Mapping[str, list[str] | None], formats: Sequence[Format], table: Table,
                 families: Callable[[], Mapping[str, Table]] = dict):
        self.path, self.checkpoint, self.config = path, checkpoint, config
        self.models, self.formats, self.table, self.families = models, formats, table, families
        self.problems: list[str] = []
        self.strangers: dict[str, str] = {}  # problem -> the layer whose name means nothing here
        self.layouts: Counter[str] = Counter()
        self.flat: dict[str, dict[str, list[str]]] = {}  # model -> what underscored names can mean
        for model, known in models.items():
            for module in sorted(known or ()):
                self.flat.setdefault(model, {}).setdefault(module.replace(".", "_"), []).append(module)

    def read(self) -> dict[str, AdapterFile]:
        keys = self.keys()
        if not keys and self.problems:
            self._refuse_other_models()
        unmatched = len(self.problems)
        parts = {part for _, names in keys.values() for part in names} - {ALPHA, BIAS, DIFF_BIAS}
        common = next((f for f in self.formats if f.gathered is None and parts and parts <= f.parts.keys()), None)
        files: dict[str, dict[str, dict]] = {}
        settings = {model: self._settings(model) for model in self.models}
        kinds: dict[str, Format] = {}
        for (model, _), (found, names) in keys.items():
            own = names.keys() - {ALPHA, BIAS, DIFF_BIAS}
            kind = common or next((f for f in self.formats if own and own <= f.parts.keys()), self.formats[0])
            if kind is LORA and MAGNITUDE in parts and DORA in self.formats:
                kind = DORA  # peft has one setting for all
            file = files.setdefault(model, {"modules": {}, "scales": {}, "formats": {}, "biases": {}})
            if own:
                kinds[kind.name] = kind
            try:
                self._put(file, found, names, kind, settings[model])
            except WeightError as error:
                self.problems.append(str(error))
        is_peft = self.config is None and ADAPTER_METADATA not in self.checkpoint.metadata and all(
            key.startswith(PEFT_BEGINNING) for key in self.checkpoint.entries)
        if is_peft and any(found.row is None and ALPHA not in names for found, names in keys.values()):
            self.problems.append(f"a file with peft's names has its scale in {PEFT_CONFIG}, which is not beside it: "
                                 f"give the folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}")
        for model in files:
            self._check_settings(settings[model], list(kinds.values()))
        layout = listing(name for name, _ in self.layouts.most_common(3))
        if self.problems:
            problems = list(dict.fromkeys(self.problems))
            text = f"{self.path} ({layout or 'names of no known layout'}): {len(problems)} entries cannot be used: "
            raise WeightError(f"{text}{listing(problems)}.{self._other_side(keys) if unmatched else ''} Nothing was "
                              f"loaded. Give a LoRA made for this model.")
        if not files:
            raise WeightError(f"{self.path} holds no LoRA: expected names that end in .lora_A.weight and "
                              ".lora_B.weight.")
        for file in files.values():
            self._warn(file["scales"])
        return {model: AdapterFile(**file, layout=layout) for model, file in files.items()}

    # -- names ---------------------------------------------------------------------------------------------------

    def keys(self) -> dict[tuple[str, tuple[str, ...]], tuple[Found, dict[str, str]]]:
        """(model, modules) -> how they are named, and part -> key."""
        part_of = {name: part for f in self.formats for part, names in f.parts.items() for name in names}
        names = "|".join(map(re.escape, sorted(part_of, key=len, reverse=True)))
        pattern = re.compile(rf"(?P<stem>.+)\.(?:(?P<name>{names})"
                             r"(?:\.(?!weight$|bias$)[\w-]+)?(?P<end>\.weight|\.bias)?|(?P<other>alpha|diff_b))")
        keys: dict[tuple[str, tuple[str, ...]], tuple[Found, dict[str, str]]] = {}
        for key in self.checkpoint.entries:
            model = self.table.split(key)[0]
            if model not in self.models:
                continue
            found = pattern.fullmatch(key)
            part = (found["other"] or part_of[found["name"]]) if found else ""
            if found and found["end"] == ".bias":
                part = BIAS if part == B else ""
            is_short = part.endswith(".weight") and not found["end"]  # only a vector goes without .weight
            if not part or is_short or (part in (BIAS, DIFF_BIAS) and FULL not in self.formats):
                self.problems.append(self._not_a_part(key))
                continue
            stem = found["stem"].removesuffix(".lora").removesuffix(".lora_linear_layer")
            if (target := self._target(model, stem)) is None:
                continue
            _, names_of = keys.setdefault((model, target.modules), (target, {}))
            if part in names_of:
                self.problems.append(f"{key} and {names_of[part]} both mean {listing(target.modules)}")
            names_of[part] = key
        return keys

    def _not_a_part(self, key: str) -> str:
        kinds = " or a ".join(f.name for f in self.formats)
        other = next((what for pattern, what in OTHERS.items() if re.search(pattern, key)), "")
        return f"{key} is {f'of {other}' if other else f'not part of a {kinds}'}"

    def _target(self, model: str, stem: str) -> Found | None:
        """What a name means; None, with a problem noted, when that cannot be said."""
        known = self.models[model]
        if known is not None and stem in known:
            self.layouts["diffusers names"] += 1
            return Found((stem,), None, DIFFUSERS)
        _, begins, rest, is_flat = self.table.split(stem)
        names = self.table.models[model]
        found = [f for f in names.find(rest, is_flat) if known is None or set(f.modules) <= set(known)]
        if not found and is_flat:
            found = [Found((module,), None, DIFFUSERS) for module in self.flat.get(model, {}).get(rest, ())]
        elif not found and (rest in (known or ()) or (known is None and not names.rows)):
            found = [Found((rest,), None, DIFFUSERS)]
        if len(found) == 1:
            begin = BEGINNINGS.get(begins, begins)
            self.layouts[f"{begin}, {found[0].column} names"] += 1
            return found[0]
        if found:
            self.problems.append(f"{stem} could be {listing(m for f in found for m in f.modules)}")
        elif is_flat and known is None and not names.rows:
            self.problems.append(f"{stem}: underscored names, such as kohya's, need the list of the model's modules")
        elif known is None:
            self.problems.append(f"{stem} is not a layer of {self.table.title}")
        else:
            meant = names.find(rest, is_flat)
            near = "" if meant else nearest(rest, known)
            what = f" (it is {listing(m for f in meant for m in f.modules)})" if meant and meant[0].row else ""
            self.problems.append(f"{stem} is not a module of the model{what}{near and f'.{near[:-1]}'}")
            if not meant:
                self.strangers[self.problems[-1]] = stem
        return None

    def _refuse_other_models(self) -> None:
        """No layer of the file is one of the model. Raises: WeightError that says of which family it is; or, where no
        name means anything here, what both have."""
        todo = "Nothing was loaded. Give a LoRA made for this model."
        tables = self.families()
        found = families_of(self.path, tables)
        own = next((name for name, table in tables.items() if table.title == self.table.title), None)
        if found and own not in found:
            theirs = " or of ".join(f"{tables[name].title} ({name})" for name in found)
            ours = f"{self.table.title} ({own})" if own else "of another family"
            raise WeightError(f"{self.path} is a LoRA of {theirs}; this model is {ours}. {todo}")
        if self.strangers.keys() == set(self.problems):
            known = [module for modules in self.models.values() for module in modules or ()]
            raise WeightError(f"{self.path}: none of its {len(self.strangers)} layers is a module of the model. It has "
                              f"{listing(self.strangers.values(), 3)}; the model has {listing(known, 3)}. {todo}")

    def _other_side(self, keys: Iterable[tuple[str, tuple[str, ...]]]) -> str:
        """What of the model is not in the file, where it is known."""
        there = {(model, module) for model, modules in keys for module in modules}
        known = [(model, module) for model, modules in self.models.items() for module in modules or ()]
        lost = [module for model, module in known if (model, module) not in there]
        return f" Of the model's {len(known)} layers {len(known) - len(lost)} are in the file; not in it: " \
               f"{listing(lost, 5) or 'none'}." if known else ""

    # -- values --------------------------------------------------------------------------------------------------

    def _put(self, file: dict[str, dict], found: Found, names: Mapping[str, str], kind: Format,
             settings: Mapping[str, Any]) -> None:
        """Read the tensors of a layer and put what they are for each module into ``file``."""
        what = found.modules[0] if len(found.modules) == 1 else listing(found.modules)
        parts, scale, bias = self._layer(what, found, names, kind, settings)
        if found.row is not None and found.row.swaps(_shape_of_change(kind, parts)):
            kind, parts, bias = _swapped(kind, parts, bias)
        pieces = {found.modules[0]: (parts, bias)}
        if len(found.modules) > 1:
            pieces = _divided(kind, parts, bias, found)
            if pieces is None:
                raise WeightError(f"{what} are one layer there, whose rows are not {found.row.shares} parts")
        for module, (own, own_bias) in pieces.items():
            if module in file["modules"] or (own_bias is not None and module in file["biases"]):
                raise WeightError(f"{module} is changed twice")
            if own:
                file["modules"][module], file["scales"][module], file["formats"][module] = own, scale, kind
            if own_bias is not None:
                file["biases"][module] = own_bias

    def _layer(self, what: str, found: Found, names: Mapping[str, str], kind: Format,
               settings: Mapping[str, Any]) -> tuple[Parts, float, np.ndarray | None]:
        """Tensors, scale and change of the bias of a layer; no tensors where the bias alone changes."""
        arrays = {part: self._array(what, part, key) for part, key in names.items()}
        bias, alpha = arrays.pop(DIFF_BIAS, None), arrays.pop(ALPHA, None)
        scaled_bias = arrays.pop(BIAS, None)
        rows = next((arrays[part].shape[:1] for part in (B, "diff") if part in arrays), None)
        for array in (bias, scaled_bias):
            if array is not None and (array.ndim != 1 or array.shape != (rows or array.shape)):
                raise WeightError(f"{what}: the change of the bias has shape {array.shape}, expected {rows or '[out]'}")
        if (absent := kind.missing(arrays)) and (arrays or bias is None):
            raise WeightError(f"{what} has no {' and no '.join(absent)}")
        if not arrays:
            return {}, 1.0, bias
        if MAGNITUDE in arrays and arrays[MAGNITUDE].ndim == 2 and arrays[MAGNITUDE].shape[1] == 1:
            arrays[MAGNITUDE] = arrays[MAGNITUDE][:, 0]
        rank: int | None
        if kind.gathered is not None:
            try:
                arrays, rank = kind.gathered(arrays)
            except WeightError as error:
                raise WeightError(f"{what}: {kind.name}: {error}") from None
        elif not (rank := kind.rank(arrays)):
            raise WeightError(f"{what}: {_shapes(arrays)} are not a {kind.group} {kind.shapes}")
        scale = self._scale(what, found, alpha, rank, settings if kind.gathered is None else {})
        if scaled_bias is not None:
            bias = _scaled(scaled_bias, scale)
        return arrays, scale, bias

    def _array(self, what: str, part: str, key: str) -> np.ndarray:
        array = native(self.checkpoint[key])
        if part == ALPHA:
            return array
        if array.dtype.name.startswith("float8"):
            array = array.astype(ml_dtypes.bfloat16)  # exact
        if array.dtype.name not in FLOATS:
            raise WeightError(f"{what}: {label(part)} is {array.dtype}, expected {listing(FLOATS)}")
        if not np.isfinite(array).all():
            raise WeightError(f"{what} holds numbers that are not finite")
        return array

    def _scale(self, what: str, found: Found, alpha: np.ndarray | None, rank: int | None,
               settings: Mapping[str, Any]) -> float:
        if rank is None:
            return 1.0
        told = {_metadata_scale(module, rank, settings) for module in found.modules}
        if len(told) > 1:
            raise WeightError(f"{what}: scales {listing(sorted(map(str, told)))} by the metadata, for one layer")
        told_scale = told.pop()
        if alpha is None:
            return 1.0 if told_scale is None else told_scale
        if alpha.size != 1:
            raise WeightError(f"{what}: alpha has shape {alpha.shape}, expected one number")
        scale = float(alpha.reshape(())) / rank
        if not abs(scale * rank) <= LARGEST_ALPHA:  # nor when it is NaN
            raise WeightError(f"{what}: alpha is {alpha.reshape(())}, expected a number up to {LARGEST_ALPHA:g}")
        if told_scale is not None and not math.isclose(told_scale, scale, rel_tol=1e-2):  # bfloat16 has 8 bits
            raise WeightError(f"{what}: scale {scale:g} by its .alpha but {told_scale:g} by the metadata")
        return scale

    def _warn(self, scales: Mapping[str, float]) -> None:
        for what, odd in (("alpha 0, so they change nothing", [m for m, s in scales.items() if s == 0]),
                          ("a negative alpha, so they undo what was learned", [m for m, s in scales.items() if s < 0])):
            if odd:
                logger.warning("%s: %d of %d modules have %s: %s.", self.path, len(odd), len(scales), what,
                               listing(odd))

    # -- settings ------------------------------------------------------------------------------------------------

    def _settings(self, model: str) -> dict[str, Any]:
        """peft's settings of a model's adapter, from the metadata or adapter_config.json."""
        where = f"the metadata '{ADAPTER_METADATA}'"
        if self.config is not None:
            settings, where = dict(self.config), PEFT_CONFIG
            kind = settings.get("peft_type", "LORA")
            if kind not in ("LORA", "LOKR", "LOHA"):
                raise WeightError(f"{self.path}: {PEFT_CONFIG} says peft_type={kind!r}: expected LORA, LOKR or LOHA.")
        elif ADAPTER_METADATA in self.checkpoint.metadata:
            try:
                settings = parse_json(self.checkpoint.metadata[ADAPTER_METADATA])
            except NotJSON as error:
                raise WeightError(f"{self.path}: {where} {error}. Save it again.") from error
            begins = [*self.table.models[model].prefixes.values()]
            if model == self.table.network:
                begins += ["transformer.", "unet.", "diffusion_model."]
            begins = sorted(filter(None, begins), key=len, reverse=True)
            settings = {next((k.removeprefix(p) for p in begins if k.startswith(p)), k): v
                        for k, v in settings.items()}
        else:
            return {}
        alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(
                value is None or (type(value) in (int, float) and abs(value) <= LARGEST_ALPHA)
                for value in (alpha, *patterns.values())):
            raise WeightError(f"{self.path}: {where} says lora_alpha={alpha!r}, alpha_pattern={patterns!r}: expected "
                              f"numbers up to {LARGEST_ALPHA:g}. Save it again.")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise WeightError(f"{self.path}: {where} has the alpha_pattern {pattern!r}, which is no regular "
                                  f"expression: {error}. Save it again.") from error
            if re.search(r"\)[*+{]", pattern):  # such as (a+)+, which may be matched for ever
                raise WeightError(f"{self.path}: {where} has the alpha_pattern {pattern!r}: groups that repeat are "
                                  "not read. Write the pattern without.")
        return settings

    def _check_settings(self, settings: Mapping[str, Any], kinds: Sequence[Format]) -> None:
        if not settings or any(kind.gathered is not None for kind in kinds):
            return
        for name in {name: None for f in self.formats for name in f.settings}:
            for kind in kinds:
                if bool(settings.get(name)) != bool(kind.settings.get(name)):
                    self.problems.append(f"the metadata say {name}={settings.get(name)}, the tensors are those of a "
                                         f"{kind.name}")


def _divided(kind: Format, parts: Parts, bias: np.ndarray | None,
             found: Found) -> dict[str, tuple[Parts, np.ndarray | None]] | None:
    """What one layer of several modules is for each; None when its rows cannot be divided.

    Of a LoRA, columns of B that are zero for a module are left out with their rows of A, and a module for which all are
    is left out: so what was joined is found again.
    """
    rows = bias.shape[0] if not parts else parts[B].shape[0] if B in parts else kind.product(parts).shape[0]
    sizes = found.row.sizes(rows)
    if sizes is None:
        return None
    ends = np.cumsum([0, *sizes])
    pieces = {}
    is_sparse = kind is LORA and _is_sparse(parts[B], ends)
    for module, start, end in zip(found.modules, ends, ends[1:]):
        own_bias = None if bias is None else bias[start:end]
        if not parts or B in parts:
            own = {part: array if part == A else array[start:end] for part, array in parts.items()}
            if is_sparse:
                used = np.flatnonzero(np.any(own[B], axis=0))
                if not len(used) and own_bias is None:
                    continue
                if len(used):
                    used = np.arange(used[0], used[-1] + 1)
                    own = {A: own[A][used], B: np.ascontiguousarray(own[B][:, used])}
        else:
            own = {**parts, ROWS: np.array([start, end])}
        pieces[module] = (own, own_bias)
    return pieces


def _is_sparse(up: np.ndarray, ends: np.ndarray) -> bool:
    """Whether no column of B is used by two modules, or it is zero for one of them."""
    used = np.array([np.any(up[start:end], axis=0) for start, end in pairwise(ends)])
    return bool(used.any()) and (int(used.sum(axis=0).max()) <= 1 or not used.any(axis=1).all())


def _metadata_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float | None:
    """alpha / r (alpha / sqrt(r) for rank-stabilised LoRA) by the metadata; None when it says nothing.

    A pattern is a regular expression for the end of a name after a dot, the first that matches; peft 0.21,
    utils/other.py, get_pattern_key.
    """
    patterns = settings.get("alpha_pattern") or {}
    own = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = own[0] if own else settings.get("lora_alpha")
    if alpha is None:
        return None
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _shapes(parts: Parts) -> str:
    return " and ".join(f"{label(part)} {array.shape}" for part, array in parts.items())


def _scaled(array: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1:
        return array
    array = native(array)
    return (array.astype(np.float32) * np.float32(scale)).astype(array.dtype)
