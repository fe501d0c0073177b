"""One model of a family: where it lies in a diffusers-format folder, how it is built, and how it is filled."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import nn

from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.weights import match, open_checkpoint
from ms_diffsynth.nn.names import assign, torch_shapes
from ms_diffsynth.storage.files import sha256_of


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model of a family: where it lives in a diffusers folder, and how it is built.

    Attributes:
        name: what the pipeline calls it, e.g. ``dit``.
        folder: its folder in a diffusers-format model, e.g. ``transformer``.
        class_name: ``_class_name`` or ``architectures[0]`` in its config.json; empty for a tokenizer.
        build: from the config to an uninitialised cell; for a tokenizer from its folder to the tokenizer.
        ignored: beginnings of names that checkpoints may hold beyond the cell's parameters (tied weights, buffers).
        default_folder: used when no source is given (tokenizers that ship with the package).
        weight_dtype: from a weight's name and the compute dtype to the dtype it is kept in; by default the latter.
        libraries: installed packages whose version may change what the component makes of its input.
    """

    name: str
    folder: str
    build: Callable[[Any], Any]
    class_name: str = ""
    ignored: tuple[str, ...] = ()
    default_folder: Path | None = None
    weight_dtype: Callable[[str, ms.Type], ms.Type] = lambda name, dtype: dtype
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Files a component is loaded from."""

    folder: Path
    files: tuple[Path, ...] = ()


def load_component(component: Component, source: Source, dtype: ms.Type) -> nn.Cell:
    """Build a component's cell and fill it from its checkpoint, shard by shard; frozen and in evaluation mode.

    Raises: WeightError for the config.json of another model, or naming missing, superfluous and mis-shaped tensors, or
        a missing shard.
    """
    from mindspore.nn.utils import no_init_parameters

    config = read_config(source.folder)
    if class_name_of(config) != component.class_name:
        raise WeightError(f"{source.folder / 'config.json'} describes a {class_name_of(config)}, but "
                          f"'{component.name}' is a {component.class_name}. Give the folder of such a model.")
    try:
        with no_init_parameters():
            cell = component.build(config)
    except TypeError as error:
        raise WeightError(f"no {component.class_name} can be built from {source.folder / 'config.json'} ({error}). "
                          "Expected the settings of that class; download the file again.") from error
    for _, part in cell.cells_and_names():
        if hasattr(part, "set_flash_attention_force_cast_dtype"):  # mindone's, which casts float32 to float16 on Ascend
            part.set_flash_attention_force_cast_dtype(None)
    checkpoint = open_checkpoint(list(source.files) or source.folder)
    found = {k: v for k, v in checkpoint.shapes.items() if not k.startswith(component.ignored)}
    match(torch_shapes(cell), found, where=str(source.folder))
    assign(cell, ((k, v) for k, v in checkpoint.tensors() if k in found), lambda k: component.weight_dtype(k, dtype))
    for parameter in cell.get_parameters():
        parameter.requires_grad = False
    return cell.set_train(False)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in a file of a model. Raises: WeightError when there is none, or something else."""
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightError(f"{path} is missing: expected the config.json of a diffusers or transformers model beside "
                          "its weights. Download the whole component folder.") from None
    except ValueError as error:
        raise WeightError(f"{path} is not JSON ({error}): download it again.") from None
    if not isinstance(config, dict):
        raise WeightError(f"{path} holds {str(config)[:40]}: expected a JSON object. Download it again.")
    return config


def class_name_of(config: dict[str, Any]) -> str:
    return config.get("_class_name") or (config.get("architectures") or ["model without a class name"])[0]


def files_digest(source: Source) -> str:
    """SHA-256 over the files of a component, its config.json included.

    The hub's cache names large files by their SHA-256 already; they are not read again.
    """
    digest = hashlib.sha256()
    files = [*source.files, source.folder / "config.json"] if source.files else source.folder.iterdir()
    for file in sorted(f for f in files if f.is_file() and not f.name.startswith(".")):
        blob = file.resolve()
        is_named = blob.parent.name == "blobs" and len(blob.name) == 64
        digest.update(f"{file.name} {blob.name if is_named else sha256_of(file)}\n".encode())
    return digest.hexdigest()
