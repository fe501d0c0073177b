"""LoRA files: one naming out (that of diffusers, which diffusers and ComfyUI read), the common namings in.

A file's scale is alpha / rank. Some readers take it from the metadata, some from ``.alpha`` tensors, some not at all,
so it is folded into B when a file is written, with ``lora_alpha = r`` in the metadata: it means the same everywhere.
"""
from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ms_diffsynth.errors import WeightError, listing, nearest
from ms_diffsynth.io.weights import FLOATS, Checkpoint, native, save_state_dict

ADAPTER_METADATA = "lora_adapter_metadata"
PREFIXES = ("transformer.", "unet.", "diffusion_model.")
KOHYA = "lora_unet_"
_KEY = re.compile(r"(?P<stem>.+)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))")
_SIDES = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}

Pair = tuple[np.ndarray, np.ndarray]
Scaled = tuple[np.ndarray, np.ndarray, float]


def save_lora(path: str | os.PathLike[str], pairs: Mapping[str, Pair], alpha: float, prefix: str = "transformer",
              metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA as ``<prefix>.<module>.lora_A.weight`` and ``.lora_B.weight``.

    Shapes: pairs[module] = (A [r, in], B [out, r]), the same r everywhere.

    Args:
        alpha: the weight change is alpha / r * B @ A; folded into B in float32.
        prefix: "transformer" (diffusers, ComfyUI), "diffusion_model" (ComfyUI, DiffSynth-Studio) or "".

    Raises: WeightError for pairs that do not fit together; OutputError when the file cannot be written.
    """
    if not pairs:
        raise WeightError(f"{path}: no LoRA pairs to save. Expected at least one module with a LoRA.")
    wrong = [f"{m}: A {a.shape}, B {b.shape}" for m, (a, b) in pairs.items() if not _fits(a, b)]
    ranks = sorted({a.shape[0] for a, _ in pairs.values() if a.ndim == 2})
    if wrong or len(ranks) > 1:
        raise WeightError(f"{path}: LoRA pairs do not fit together: {listing(wrong) or f'ranks {listing(ranks)}'}. "
                          "Expected A [r, in] and B [out, r] with one r.")
    rank = ranks[0]
    dot = prefix.rstrip(".") + "." if prefix else ""
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{dot}{module}.lora_A.weight"] = a
        tensors[f"{dot}{module}.lora_B.weight"] = b if alpha == rank else _scaled(b, alpha / rank)
    # diffusers 0.39 makes peft's LoraConfig of these, and reads rank_pattern before it does
    adapter = {f"{dot}r": rank, f"{dot}lora_alpha": rank, f"{dot}rank_pattern": {},
               f"{dot}target_modules": sorted(pairs)}
    text = json.dumps(adapter, indent=2, sort_keys=True)
    save_state_dict(path, tensors, dict(metadata or {}) | {ADAPTER_METADATA: text})


def load_lora(path: str | os.PathLike[str], modules: Iterable[str] | None = None) -> dict[str, Scaled]:
    """Read a LoRA file as module -> (A [r, in], B [out, r], scale); the weight change is scale * B @ A.

    Accepts names with ``transformer.``, ``unet.``, ``diffusion_model.`` or no prefix, with or without ``.default``,
    with lora_A / lora_B or lora_down / lora_up and ``.alpha``; and kohya's ``lora_unet_`` names where ``modules`` tells
    what they mean.

    Args:
        modules: the names of the model's modules; every pair of the file must belong to one of them.

    Raises: WeightError listing everything that is not understood, unmatched or incomplete.
    """
    checkpoint = Checkpoint([path])
    names = None if modules is None else _Names(modules)
    raw: dict[str, _Raw] = {}
    problems: list[str] = []
    for key in checkpoint.entries:
        found = _KEY.fullmatch(key)
        module = _module(found["stem"], names, problems) if found else None
        if found is None:
            problems.append(f"{key} is no part of a LoRA")
        if module is None:
            continue
        side = "alpha" if found["alpha"] else _SIDES[found["part"]]
        if side in raw.setdefault(module, _Raw()).keys:
            problems.append(f"{key} and {raw[module].keys[side]} both mean {module}")
        raw[module].keys[side] = key
    settings = _settings(checkpoint.metadata, path)
    result = {}
    for module, pair in raw.items():
        try:
            result[module] = pair.read(module, checkpoint, settings)
        except WeightError as error:
            problems.append(str(error))
    if problems:
        problems = list(dict.fromkeys(problems))
        raise WeightError(f"{path}: {len(problems)} entries cannot be used: {listing(problems)}. "
                          "Nothing was loaded. Give a LoRA made for this model, in diffusers naming.")
    if not result:
        raise WeightError(f"{path} holds no LoRA: expected names that end in .lora_A.weight and .lora_B.weight.")
    return result


@dataclass
class _Raw:
    """The keys of one module's A, B and alpha."""

    keys: dict[str, str] = field(default_factory=dict)

    def read(self, module: str, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Scaled:
        if absent := [side for side in ("A", "B") if side not in self.keys]:
            raise WeightError(f"{module} has no {' and no '.join(absent)}")
        a, b = checkpoint[self.keys["A"]], checkpoint[self.keys["B"]]
        if not _fits(a, b):
            raise WeightError(f"{module}: A {a.shape} and B {b.shape} are no pair [r, in], [out, r]")
        if not {a.dtype.name, b.dtype.name} <= FLOATS.keys():
            raise WeightError(f"{module}: A is {a.dtype} and B {b.dtype}, expected {listing(FLOATS)}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise WeightError(f"{module} holds numbers that are not finite")
        rank = a.shape[0]
        told = _metadata_scale(module, rank, settings)
        if "alpha" not in self.keys:
            return a, b, 1.0 if told is None else told
        alpha = checkpoint[self.keys["alpha"]]
        if alpha.size != 1:
            raise WeightError(f"{module}: alpha has shape {alpha.shape}, expected one number")
        scale = float(alpha.reshape(())) / rank
        if not math.isfinite(scale):
            raise WeightError(f"{module}: alpha is {alpha.reshape(())}, expected a finite number")
        if told is not None and not math.isclose(told, scale, rel_tol=1e-2):  # bfloat16 alpha has 8 bits
            raise WeightError(f"{module}: scale {scale:g} by its .alpha but {told:g} by the metadata")
        return a, b, scale


class _Names:
    """The modules of a model, and what kohya's underscored names can mean."""

    def __init__(self, modules: Iterable[str]):
        self.all = set(modules)
        self.flat: dict[str, list[str]] = {}
        for module in sorted(self.all):
            self.flat.setdefault(module.replace(".", "_"), []).append(module)


def _module(stem: str, names: _Names | None, problems: list[str]) -> str | None:
    """The module a key belongs to; None, with a problem noted, when that cannot be said."""
    if stem.startswith(KOHYA):
        if names is None:
            problems.append(f"{stem}: kohya's underscored names need the list of the model's modules")
            return None
        meant = names.flat.get(stem.removeprefix(KOHYA), [])
        if len(meant) != 1:
            problems.append(f"{stem} could be {listing(meant)}" if meant else f"{stem} is no module of the model")
            return None
        return meant[0]
    if names is not None and stem in names.all:
        return stem
    module = next((stem.removeprefix(p) for p in PREFIXES if stem.startswith(p)), stem)
    if names is not None and module not in names.all:
        problems.append(f"{stem} is no module of the model.{nearest(module, names.all)}")
        return None
    return module


def _settings(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The adapter's settings from the metadata, without the prefix of the model."""
    if ADAPTER_METADATA not in metadata:
        return {}
    try:
        settings = dict(json.loads(metadata[ADAPTER_METADATA]))
    except (ValueError, TypeError) as error:
        raise WeightError(f"{path}: the metadata '{ADAPTER_METADATA}' is no JSON object ({error}). "
                          "Save it again.") from error
    settings = {next((k.removeprefix(p) for p in PREFIXES if k.startswith(p)), k): v for k, v in settings.items()}
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_alpha, (alpha, *patterns.values()))):
        raise WeightError(f"{path}: the metadata '{ADAPTER_METADATA}' says lora_alpha={alpha!r}, alpha_pattern="
                          f"{patterns!r}: expected finite numbers. Save it again.")
    return settings


def _metadata_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float | None:
    """alpha / r (alpha / sqrt(r) for rank-stabilised LoRA) by the metadata; None when it says nothing."""
    patterns = settings.get("alpha_pattern") or {}
    own = [value for name, value in patterns.items() if module == name or module.endswith("." + name)]
    alpha = own[0] if own else settings.get("lora_alpha")
    if alpha is None:
        return None
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_alpha(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _fits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.ndim == 2 and b.ndim == 2 and a.shape[0] == b.shape[1] and a.shape[0] > 0


def _scaled(b: np.ndarray, scale: float) -> np.ndarray:
    b = native(b)
    return (b.astype(np.float32) * np.float32(scale)).astype(b.dtype)
