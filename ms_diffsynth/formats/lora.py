"""Files of adapters: one naming out (that of diffusers, which diffusers and ComfyUI read), the common namings in.

A file's scale is alpha / rank. Some readers take it from the metadata, some from ``.alpha`` tensors, some not at all,
so it is folded into B when a file is written, with ``lora_alpha = r`` in the metadata: it means the same everywhere.
"""
from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ms_diffsynth.errors import WeightError, listing, nearest
from ms_diffsynth.formats.json_text import NotJSON, parse_json
from ms_diffsynth.formats.weights import FLOATS, Checkpoint, native, save_state_dict

logger = logging.getLogger(__name__)

ADAPTER_METADATA = "lora_adapter_metadata"
PREFIXES = ("transformer.", "unet.", "diffusion_model.")
KOHYA = "lora_unet_"
ALPHA = "alpha"
LARGEST_ALPHA = 1e6

Parts = Mapping[str, np.ndarray]  # part -> tensor of one module
Pair = tuple[np.ndarray, np.ndarray]
Scaled = tuple[np.ndarray, np.ndarray, float]


def rank_of(parts: Parts) -> int:
    """The rank r of A [r, in] and B [out, r]; 0 when they do not fit together."""
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    return a.shape[0] if a.ndim == 2 and b.ndim == 2 and a.shape[0] == b.shape[1] else 0


def fits(parts: Parts, weight: tuple[int, int]) -> bool:
    """Whether A [r, in] and B [out, r] belong to a weight [out, in]."""
    return (parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[1]) == weight


@dataclass(frozen=True, eq=False)
class Format:
    """How an adapter is written: the tensors of a module, and what the metadata say of them.

    Attributes:
        name: what messages call it. group, shapes: what they call the tensors of a module, and expect of them.
        parts: part -> what it is called in files, before a ``.default`` and a ``.weight`` that readers of all kinds add
            or leave out. A part is the end of a tensor's name as it is written, behind the module.
        scaled: the part that takes the scale of the file: the weight depends on the scale times it.
        rank: of the tensors of a module, 0 when they do not fit together.
        fits: whether these belong to a weight of this shape [out, in].
        settings: what peft's adapter sets, such as ``use_dora``, next to its rank, scale and modules.
    """

    name: str
    group: str
    shapes: str
    parts: Mapping[str, tuple[str, ...]]
    scaled: str
    rank: Callable[[Parts], int]
    fits: Callable[[Parts, tuple[int, int]], bool]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def missing(self, parts: Iterable[str]) -> list[str]:
        """The parts that are not among ``parts``, as messages call them."""
        return [label(part) for part in self.parts if part not in parts]


LORA = Format(name="LoRA", group="pair", shapes="A [r, in] and B [out, r]", scaled="lora_B.weight", rank=rank_of,
              fits=fits, parts={"lora_A.weight": ("lora_A", "lora_down"), "lora_B.weight": ("lora_B", "lora_up")})


def label(part: str) -> str:
    """What messages call a part: ``A`` for ``lora_A.weight``."""
    return part.partition(".")[0].removeprefix("lora_")


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: ``modules`` as module -> part -> tensor, the scale of each not yet in it."""

    format: Format
    modules: Mapping[str, Parts]
    scales: Mapping[str, float]

    def with_scale(self, divided_by: Mapping[str, float] | None = None) -> dict[str, dict[str, np.ndarray]]:
        """The tensors with their scale in them, or with that of ``divided_by`` for those who apply this one later."""
        scaled = {}
        for module, parts in self.modules.items():
            scale = self.scales[module] / (divided_by or {}).get(module, 1.0)
            scaled[module] = {**parts, self.format.scaled: parts[self.format.scaled] * np.float32(scale)}
        return scaled


def save_adapter(path: str | os.PathLike[str], file_format: Format, modules: Mapping[str, Parts], scale: float,
                 prefix: str = "transformer", metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter as ``<prefix>.<module>.<part>``.

    Args:
        modules: module -> part -> tensor, the same rank everywhere.
        scale: alpha / rank; folded into one part in float32.
        prefix: "transformer" (diffusers, ComfyUI), "diffusion_model" (ComfyUI, DiffSynth-Studio) or "".

    Raises: WeightError for tensors that do not fit together; OutputError when the file cannot be written.
    """
    if not modules:
        raise WeightError(f"{path}: no {file_format.name} {file_format.group}s to save. Expected at least one module "
                          f"with a {file_format.name}.")
    ranks = {module: file_format.rank(parts) for module, parts in modules.items()}
    wrong = [f"{module}: {_shapes(modules[module])}" for module, rank in ranks.items() if not rank]
    if wrong or len(set(ranks.values())) > 1:
        wrong = wrong or [f"ranks {listing(sorted(set(ranks.values())))}"]
        raise WeightError(f"{path}: {file_format.name} {file_format.group}s do not fit together: {listing(wrong)}. "
                          f"Expected {file_format.shapes} with one r.")
    rank = next(iter(ranks.values()))
    dot = prefix.rstrip(".") + "." if prefix else ""
    tensors = {f"{dot}{module}.{part}": _scaled(parts[part], scale) if part == file_format.scaled else parts[part]
               for module, parts in modules.items() for part in file_format.parts}
    # diffusers 0.34 to 0.39 and mindone make peft's LoraConfig of these, and read both patterns before they do
    adapter = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {},
               "target_modules": sorted(modules), **file_format.settings}
    text = json.dumps({f"{dot}{name}": value for name, value in adapter.items()}, indent=2, sort_keys=True)
    save_state_dict(path, tensors, dict(metadata or {}) | {ADAPTER_METADATA: text})


def save_lora(path: str | os.PathLike[str], pairs: Mapping[str, Pair], alpha: float, prefix: str = "transformer",
              metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA as ``<prefix>.<module>.lora_A.weight`` and ``.lora_B.weight``.

    Shapes: pairs[module] = (A [r, in], B [out, r]), the same r everywhere.

    Args:
        alpha: the weight change is alpha / r * B @ A; folded into B in float32.
        prefix: "transformer" (diffusers, ComfyUI), "diffusion_model" (ComfyUI, DiffSynth-Studio) or "".

    Raises: WeightError for pairs that do not fit together; OutputError when the file cannot be written.
    """
    modules = {module: dict(zip(LORA.parts, pair)) for module, pair in pairs.items()}
    rank = next((rank for parts in modules.values() if (rank := LORA.rank(parts))), 1)
    save_adapter(path, LORA, modules, alpha / rank, prefix, metadata)


def load_lora(path: str | os.PathLike[str], modules: Iterable[str] | None = None) -> dict[str, Scaled]:
    """Read a LoRA file as module -> (A [r, in], B [out, r], scale); the weight change is scale * B @ A.

    The names it accepts, ``modules`` and errors are those of `load_adapter`.
    """
    found = load_adapter(path, modules)
    return {module: (*(parts[part] for part in LORA.parts), found.scales[module])
            for module, parts in found.modules.items()}


def models_in(path: str | os.PathLike[str], prefixes: Mapping[str, str]) -> list[str]:
    """The models that a file of adapters is for, by its names: ``prefixes`` is model -> prefix. A name with none of
    them is of the first model.
    """
    first, *others = prefixes
    found = {next((model for model in others if key.startswith(prefixes[model] + ".")), first)
             for key in Checkpoint([path]).entries}
    return [model for model in prefixes if model in found] or [first]


def load_adapter(path: str | os.PathLike[str], modules: Iterable[str] | None = None,
                 formats: Sequence[Format] = (LORA,), prefixes: Sequence[str] = PREFIXES,
                 others: Sequence[str] = ()) -> AdapterFile:
    """Read the file of an adapter, of the first of ``formats`` that has all of its tensors.

    Accepts names with one of ``prefixes`` or none, with or without ``.default``, with lora_A / lora_B or lora_down /
    lora_up and ``.alpha``; and kohya's ``lora_unet_`` names where ``modules`` tells what they mean.

    Args:
        modules: the names of the model's modules; every tensor of the file must belong to one of them.
        others: prefixes of what the file holds for other models, which is passed over.

    Raises: WeightError listing everything that is not understood, unmatched or incomplete.
    """
    checkpoint = Checkpoint([path])
    known = None if modules is None else set(modules)
    flat: dict[str, list[str]] = {}  # what kohya's underscored names can mean
    for module in sorted(known or ()):
        flat.setdefault(module.replace(".", "_"), []).append(module)
    part_of = {name: part for f in formats for part, names in f.parts.items() for name in names}
    pattern = re.compile(rf"(?P<stem>.+)\.(?:(?P<name>{'|'.join(map(re.escape, part_of))})"
                         r"(?:\.default)?(?P<weight>\.weight)?|alpha)")
    keys: dict[str, dict[str, str]] = {}  # module -> part -> key
    problems: list[str] = []
    for key in checkpoint.entries:
        if key.startswith(tuple(others)):
            continue
        found = pattern.fullmatch(key)
        part = part_of.get(found["name"], ALPHA) if found else ""
        if not part or (part.endswith(".weight") and not found["weight"]):  # only a vector goes without .weight
            problems.append(f"{key} is not part of a {' or a '.join(f.name for f in formats)}")
            continue
        module = _module(found["stem"], known, flat, prefixes, problems)
        if module is None:
            continue
        if part in keys.setdefault(module, {}):
            problems.append(f"{key} and {keys[module][part]} both mean {module}")
        keys[module][part] = key
    settings = _settings(checkpoint.metadata, path, prefixes)
    parts = {part for found in keys.values() for part in found} - {ALPHA}
    file_format = next((f for f in formats if parts <= f.parts.keys()), formats[0])
    tensors, scales = {}, {}
    for module, found in keys.items():
        try:
            tensors[module], scales[module] = _read(module, found, checkpoint, settings, file_format)
        except WeightError as error:
            problems.append(str(error))
    for name in {name: None for f in formats for name in f.settings} if settings else ():
        if bool(settings.get(name)) != bool(file_format.settings.get(name)):
            problems.append(f"the metadata say {name}={settings.get(name)}, the tensors are those of a "
                            f"{file_format.name}")
    if problems:
        problems = list(dict.fromkeys(problems))
        raise WeightError(f"{path}: {len(problems)} entries cannot be used: {listing(problems)}. "
                          "Nothing was loaded. Give a LoRA made for this model, in diffusers naming.")
    if not tensors:
        raise WeightError(f"{path} holds no LoRA: expected names that end in .lora_A.weight and .lora_B.weight.")
    for what, odd in (("alpha 0, so they change nothing", [m for m, scale in scales.items() if scale == 0]),
                      ("a negative alpha, so they undo what was learned", [m for m, s in scales.items() if s < 0])):
        if odd:
            logger.warning("%s: %d of %d modules have %s: %s.", path, len(odd), len(scales), what, listing(odd))
    return AdapterFile(file_format, tensors, scales)


def _read(module: str, keys: Mapping[str, str], checkpoint: Checkpoint, settings: Mapping[str, Any],
          file_format: Format) -> tuple[dict[str, np.ndarray], float]:
    """The tensors of a module and their scale. Raises: WeightError."""
    if absent := file_format.missing(keys):
        raise WeightError(f"{module} has no {' and no '.join(absent)}")
    parts = {part: checkpoint[keys[part]] for part in file_format.parts}
    rank = file_format.rank(parts)
    if not rank:
        raise WeightError(f"{module}: {_shapes(parts)} are not a {file_format.group} {file_format.shapes}")
    if not {array.dtype.name for array in parts.values()} <= FLOATS.keys():
        found = " and ".join(f"{label(part)} {array.dtype}" for part, array in parts.items())
        raise WeightError(f"{module}: {found.replace(' ', ' is ', 1)}, expected {listing(FLOATS)}")
    if not all(np.isfinite(array).all() for array in parts.values()):
        raise WeightError(f"{module} holds numbers that are not finite")
    told = _metadata_scale(module, rank, settings)
    if ALPHA not in keys:
        return parts, 1.0 if told is None else told
    alpha = checkpoint[keys[ALPHA]]
    if alpha.size != 1:
        raise WeightError(f"{module}: alpha has shape {alpha.shape}, expected one number")
    scale = float(alpha.reshape(())) / rank
    if not abs(scale * rank) <= LARGEST_ALPHA:  # nor when it is NaN
        raise WeightError(f"{module}: alpha is {alpha.reshape(())}, expected a number up to {LARGEST_ALPHA:g}")
    if told is not None and not math.isclose(told, scale, rel_tol=1e-2):  # bfloat16 alpha has 8 bits
        raise WeightError(f"{module}: scale {scale:g} by its .alpha but {told:g} by the metadata")
    return parts, scale


def _module(stem: str, known: set[str] | None, flat: Mapping[str, list[str]], prefixes: Sequence[str],
            problems: list[str]) -> str | None:
    """The module a key belongs to; None, with a problem noted, when that cannot be said."""
    if stem.startswith(KOHYA):
        if known is None:
            problems.append(f"{stem}: kohya's underscored names need the list of the model's modules")
            return None
        meant = flat.get(stem.removeprefix(KOHYA), [])
        if len(meant) != 1:
            problems.append(f"{stem} could be {listing(meant)}" if meant else f"{stem} is not a module of the model")
            return None
        return meant[0]
    if known is not None and stem in known:
        return stem
    module = next((stem.removeprefix(p) for p in prefixes if stem.startswith(p)), stem)
    if known is not None and module not in known:
        problems.append(f"{stem} is not a module of the model.{nearest(module, known)}")
        return None
    return module


def _settings(metadata: Mapping[str, str], path: str | os.PathLike[str], prefixes: Sequence[str]) -> dict[str, Any]:
    """The adapter's settings from the metadata, without the prefix of the model."""
    if ADAPTER_METADATA not in metadata:
        return {}
    try:
        settings = parse_json(metadata[ADAPTER_METADATA])
    except NotJSON as error:
        raise WeightError(f"{path}: the metadata '{ADAPTER_METADATA}' {error}. Save it again.") from error
    settings = {next((k.removeprefix(p) for p in prefixes if k.startswith(p)), k): v for k, v in settings.items()}
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(
            value is None or (type(value) in (int, float) and abs(value) <= LARGEST_ALPHA)
            for value in (alpha, *patterns.values())):
        raise WeightError(f"{path}: the metadata '{ADAPTER_METADATA}' says lora_alpha={alpha!r}, alpha_pattern="
                          f"{patterns!r}: expected numbers up to {LARGEST_ALPHA:g}. Save it again.")
    return settings


def _metadata_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float | None:
    """alpha / r (alpha / sqrt(r) for rank-stabilised LoRA) by the metadata; None when it says nothing."""
    patterns = settings.get("alpha_pattern") or {}
    own = [value for name, value in patterns.items() if module == name or module.endswith("." + name)]
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
