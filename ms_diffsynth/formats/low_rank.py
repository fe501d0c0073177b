"""What is done with LoRAs in files: another rank, several as one, the difference of two checkpoints, into a base."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ms_diffsynth.errors import WeightError, listing
from ms_diffsynth.formats.adapters import LORA, A, B, Format, Parts
from ms_diffsynth.formats.lora import AdapterFile
from ms_diffsynth.formats.shards import INDEX
from ms_diffsynth.formats.weights import FLOATS, Checkpoint, native, open_checkpoint, save_state_dict
from ms_diffsynth.storage.files import stage_folder

EXACT = 1024  # a matrix whose smaller side is at most this is decomposed as it is
SPARE, ROUNDS = 16, 4  # further columns of a random range, and how often it is multiplied by the matrix


def norm_of(kind: Format, parts: Parts, scale: float) -> float:
    """The Frobenius norm of the change of a weight; of a DoRA that of its B A."""
    if B in parts:
        a, b = parts[A].astype(np.float64), parts[B].astype(np.float64)
        return abs(scale) * math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))
    return abs(scale) * float(np.linalg.norm(kind.product(parts)))


def decomposed(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r], float32, with B A next to ``change`` [out, in] of all of this rank.

    Large matrices by a random range: Halko et al. 2011 (arXiv:0909.4061), algorithm 4.4; exact where the rank of
    ``change`` is at most r.
    """
    rank = min(rank, *change.shape)
    if min(change.shape) <= max(EXACT, rank + SPARE):
        u, s, v = np.linalg.svd(change, full_matrices=False)
    else:
        basis = change @ np.random.default_rng(0).standard_normal((change.shape[1], rank + SPARE), np.float32)
        for _ in range(ROUNDS):
            basis = change @ np.linalg.qr(change.T @ np.linalg.qr(basis)[0])[0]
        basis = np.linalg.qr(basis)[0]
        u, s, v = np.linalg.svd(basis.T @ change, full_matrices=False)
        u = basis @ u
    root = np.sqrt(s[:rank])
    return (root[:, None] * v[:rank]).astype(np.float32), (u[:, :rank] * root).astype(np.float32)


def resized(file: AdapterFile, rank: int) -> tuple[AdapterFile, dict[str, float]]:
    """A LoRA of this rank of any additive adapter, and for each module the share of the change that is lost.

    Raises: WeightError for a DoRA, whose change depends on the weight.
    """
    modules, lost = {}, {}
    for module, parts in file.modules.items():
        kind, scale = file.formats[module], np.float32(file.scales[module])
        if kind.product is None:
            raise WeightError(f"{module} has a {kind.name}, whose change depends on the weight: expected a LoRA, LoKr, "
                              "LoHa or weight change. Merge it into its base, and extract a LoRA.")
        if kind is LORA and min(LORA.rank(parts), rank) == LORA.rank(parts):
            modules[module], lost[module] = {A: parts[A], B: parts[B] * scale}, 0.0
            continue
        if kind is LORA:  # in its own rank: B A = Qb (Rb Ra^T) Qa^T
            (qa, ra), (qb, rb) = (np.linalg.qr(m.astype(np.float32)) for m in (parts[A].T, parts[B]))
            core = rb @ ra.T * scale
            a, b = decomposed(core, rank)
            left = core - b @ a
            modules[module], total = {A: a @ qa.T, B: qb @ b}, np.linalg.norm(core)
        else:
            change = kind.product(parts) * scale
            a, b = decomposed(change, rank)
            modules[module], left, total = {A: a, B: b}, change - b @ a, np.linalg.norm(change)
        lost[module] = float(np.linalg.norm(left) / total) if total else 0.0
    return _as_lora(modules, file.biases), lost


def merged(files: Sequence[AdapterFile], factors: Sequence[float]) -> AdapterFile:
    """One LoRA that is the sum of several, each with a factor: exact, its rank is the sum of theirs.

    Raises: WeightError for other kinds of adapters.
    """
    modules: dict[str, Parts] = {}
    biases: dict[str, np.ndarray] = {}
    for file, factor in zip(files, factors):
        for module, parts in file.modules.items():
            if file.formats[module] is not LORA:
                raise WeightError(f"{module} has a {file.formats[module].name}: expected LoRAs to merge into one. Make "
                                  "one of it before (ms-diffsynth lora resize), or merge into a base (--base).")
            scale = np.float32(file.scales[module] * factor)
            down, up = parts[A].astype(np.float32), parts[B].astype(np.float32) * scale
            if module in modules:
                down, up = np.concatenate([modules[module][A], down]), np.concatenate([modules[module][B], up], axis=1)
            modules[module] = {A: down, B: up}
        for module, bias in file.biases.items():
            biases[module] = biases.get(module, 0) + bias.astype(np.float32) * np.float32(factor)
    return _as_lora(modules, biases)


def _as_lora(modules: Mapping[str, Parts], biases: Mapping[str, np.ndarray]) -> AdapterFile:
    return AdapterFile(modules, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, LORA), biases)


def extracted(base: Checkpoint, tuned: Checkpoint, rank: int,
              is_layer: Callable[[str], bool] = lambda module: True) -> tuple[AdapterFile, dict[str, float], list[str]]:
    """A LoRA that is the difference of two checkpoints of one model, as far as it has this rank.

    Args:
        is_layer: whether a module is a linear layer that can have a LoRA.

    Returns: the LoRA; for each module the share of the difference that is lost; tensors that differ and are of no
        linear layer, which a LoRA cannot hold.
    Raises: WeightError when names or shapes differ.
    """
    odd = [name for name in {**base.shapes, **tuned.shapes} if base.shapes.get(name) != tuned.shapes.get(name)]
    if odd:
        raise WeightError(f"{listing(base.files, 2)} and {listing(tuned.files, 2)} differ in {len(odd)} names or "
                          f"shapes: {listing(odd)}. Expected two checkpoints of one model, in one naming.")
    modules, lost, others = {}, {}, []
    for name, shape in base.shapes.items():
        change = tuned[name].astype(np.float32) - base[name].astype(np.float32)
        if not change.any():
            continue
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module == name or not is_layer(module):
            others.append(name)
            continue
        a, b = decomposed(change, rank)
        modules[module] = {A: a, B: b}
        lost[module] = float(np.linalg.norm(change - b @ a) / np.linalg.norm(change))
    return _as_lora(modules, {}), lost, others


def merge_into(base: str | os.PathLike[str], output: str | os.PathLike[str], files: Sequence[AdapterFile],
               factors: Sequence[float]) -> int:
    """Write the weights of a component folder, or of one file, with adapters in them; returns the number of layers.

    One shard is in memory at a time. Each change is computed in float32, their sum rounded once.

    Raises: WeightError for modules that the base does not have, or of another shape; OutputError.
    """
    checkpoint = open_checkpoint(base)
    changed = {module for file in files for module in (*file.modules, *file.biases)}
    wrong = [module for module in changed if f"{module}.weight" not in checkpoint]
    wrong += [f"{module} {checkpoint.shapes[f'{module}.weight']}" for file in files
              for module, parts in file.modules.items() if f"{module}.weight" in checkpoint
              and not file.formats[module].fits(parts, checkpoint.shapes[f"{module}.weight"])]
    wrong += [f"{module} (no bias)" for file in files for module in file.biases if f"{module}.bias" not in checkpoint]
    if wrong:
        raise WeightError(f"{base}: {len(wrong)} of {len(changed)} layers of the adapters are not in it, or of another "
                          f"shape: {listing(sorted(wrong))}. Expected the weights of the model they were made for, in "
                          "diffusers' names.")
    base = Path(base)
    with stage_folder(output) as stage:
        if base.is_dir():
            for name in ("config.json", *(file.name for file in base.glob("*" + INDEX))):
                if (base / name).is_file():
                    stage.write(name, (base / name).read_bytes())
        for file in checkpoint.files:
            shard = Checkpoint([file])
            tensors = {name: _with(name, native(array), files, factors) for name, array in shard.tensors()}
            save_state_dict(Path(stage) / file.name, tensors, shard.metadata)
    return len(changed)


def _with(name: str, array: np.ndarray, files: Sequence[AdapterFile], factors: Sequence[float]) -> np.ndarray:
    """A tensor with the changes of all adapters that have some for it."""
    module, _, part = name.rpartition(".")
    own = [(file, factor) for file, factor in zip(files, factors)
           if (part == "weight" and module in file.modules) or (part == "bias" and module in file.biases)]
    if not own:
        return array
    if array.dtype.name not in FLOATS:
        raise WeightError(f"{name} is {array.dtype}: expected {listing(FLOATS)}. Merge into the weights before they "
                          "were stored in 8 bits.")
    value = array.astype(np.float32)
    for file, factor in own:
        if part == "bias":
            value = value + np.float32(factor) * file.biases[module].astype(np.float32)
        else:
            kind, parts = file.formats[module], file.modules[module]
            scaled = {**parts, kind.scaled: parts[kind.scaled].astype(np.float32) * np.float32(file.scales[module])}
            value = kind.fused(value, scaled, factor)
    return value.astype(array.dtype)
