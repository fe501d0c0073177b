"""The models of a pipeline: where their files lie, how each is built and filled, and the store that loads them at first
use."""
from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import os
import re
import shutil
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.errors import (
    ConfigError,
    HubError,
    UserError,
    WeightError,
    is_memory_short,
    is_mistake,
    listing,
    nearest,
    said,
)
from ms_diffsynth.formats.interchange import Model, Table
from ms_diffsynth.formats.json_text import is_of, read_json, shown, words_of
from ms_diffsynth.formats.originals import in_our_names, models_of
from ms_diffsynth.formats.weights import Checkpoint, link_sharded, match, open_checkpoint, save_sharded
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.nn.adapters.layer import adapted_layers
from ms_diffsynth.nn.names import assign, state_dict, torch_parameters, torch_shapes
from ms_diffsynth.nn.quant import store_8bit
from ms_diffsynth.ops import network
from ms_diffsynth.ops.sinusoid import Sinusoids
from ms_diffsynth.storage.files import sha256_of

logger = logging.getLogger(__name__)

SCHEDULER_FILE = "scheduler_config.json"
SAMPLING_FILE = "sampling_config.json"  # beside model_index.json: what sampling and training do where they are not told
STORED_IN_8_BITS = "8 bits"  # what was done to weights in memory alone
LARGEST_NUMBER = 1 << 31  # of a config.json: a size that a tensor can have, and every rope_theta
FLOATS = (ms.float32, ms.float16, ms.bfloat16)
MOST_LAYERS = 1000  # the largest models have 100; a network of a million would take hours to be built, and fit no file

# what a value of a config.json must be: in words, and whether it is
Kind = tuple[str, Callable[[Any], bool]]

SIZE: Kind = ("a whole number from 1", lambda value: type(value) is int and value >= 1)
COUNT: Kind = ("a whole number from 0", lambda value: type(value) is int and value >= 0)
NUMBER: Kind = ("a number", lambda value: type(value) in (int, float))
SCALE: Kind = ("a number above 0", lambda value: type(value) in (int, float) and value > 0)
FLAG: Kind = ("true or false", lambda value: type(value) is bool)
SIZES: Kind = ("a list of whole numbers from 1", lambda value: _is_list(value, lambda v: type(v) is int and v >= 1))
NUMBERS: Kind = ("a list of numbers", lambda value: _is_list(value, lambda v: type(v) in (int, float)))
SIDES: Kind = ("null, a whole number from 1, or two of them",
               lambda value: value is None or SIZE[1](value) or (SIZES[1](value) and len(value) == 2))
LIST: Kind = ("a list", lambda value: _is_list(value, lambda v: True))


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_item, value))


def optional(kind: Kind) -> Kind:
    """The same, or null, or not there."""
    return f"{kind[0]}, or null", lambda value: value is None or kind[1](value)


def _setting(config: Mapping[str, Any], name: str) -> Any:
    """A setting of a config.json; ``text_config.vocab_size`` is one inside another. None where there is none."""
    for key in name.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


Shapes = Mapping[str, tuple[int, ...]]


def blocks(begin: str) -> Callable[[Shapes], int]:
    """How many blocks there are whose names begin with ``begin`` and a number."""
    pattern = re.compile(re.escape(begin) + r"(\d+)\.")
    return lambda shapes: len({found[1] for name in shapes if (found := pattern.match(name))})


def columns(*names: str) -> Callable[[Shapes], int | None]:
    """The second side of the tensor that comes under one of these names; None where there is none."""
    return lambda shapes: next((shapes[name][1] for name in names if len(shapes.get(name, ())) > 1), None)


def rows(*names: str) -> Callable[[Shapes], int | None]:
    """The first side of the tensor that comes under one of these names; None where there is none."""
    return lambda shapes: next((shapes[name][0] for name in names if shapes.get(name)), None)


def has(name: str) -> Callable[[Shapes], bool]:
    """Whether there is a tensor."""
    return lambda shapes: name in shapes


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
        build_for: the same as ``build``, also from the names of the tensors in the checkpoint: for a model whose files
            come under several names.
        recomputes_itself: its code applies gradient checkpointing by itself.
        reads: what the pipeline itself reads in its config.json, and what that must be.
        known: name -> config.json of published models, which stands in where files come without one.
        part_of: another component whose files hold this one too; it is there when they have tensors that it does not
            ignore.
        told_by: setting of ``known`` (``text_config.vocab_size`` is one inside another) -> what the names and shapes of
            a checkpoint say of it; by these one is chosen.
        marks: setting that is on -> the tensor by which ComfyUI's files say so, which holds nothing.
        unlike: where ComfyUI's file and diffusers' folder cannot be made of each other: a tensor of the former alone,
            and why.
        left_out: tensor -> from the shapes of the others to its values, where publishers' files are without it.
        encoder: cells of a VAE that decoding does not use.
        is_optional: whole models may be without it, and need not say so.
    """

    name: str
    folder: str
    build: Callable[[Any], Any]
    class_name: str = ""
    ignored: tuple[str, ...] = ()
    default_folder: Path | None = None
    weight_dtype: Callable[[str, ms.Type], ms.Type] = lambda name, dtype: dtype
    libraries: tuple[str, ...] = ()
    build_for: Callable[[dict[str, Any], Iterable[str]], nn.Cell] | None = None
    recomputes_itself: bool = False
    reads: Mapping[str, Kind] = field(default_factory=dict, hash=False)
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    told_by: Mapping[str, Callable[[Shapes], Any]] = field(default_factory=dict, hash=False)
    part_of: str = ""
    left_out: Mapping[str, Callable[[Shapes], np.ndarray]] = field(default_factory=dict, hash=False)
    encoder: tuple[str, ...] = ()
    marks: Mapping[str, str] = field(default_factory=dict, hash=False)
    unlike: tuple[str, str] | None = None
    is_optional: bool = False

    @property
    def is_tokenizer(self) -> bool:
        """Whether it is built from a folder of the model's, without weights."""
        return bool(self.folder) and not self.class_name


@dataclass(frozen=True)
class Source:
    """Files a component is loaded from.

    Attributes:
        config: what stands in for the config.json that is not beside them.
        names: how their tensors are called, where that is not as in diffusers.
        only: names of the tensors that are of the component, in files that hold others too; empty for all.
        left_out: as of the component, where the files may be without.
        marks: names of tensors that hold nothing, see `Component.marks`.
        without: beginnings of names of tensors that are not of the component.
    """

    folder: Path
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] | None = field(default=None, compare=False)
    names: Model | None = field(default=None, compare=False)
    only: tuple[str, ...] = field(default=(), compare=False)
    left_out: Mapping[str, Callable[[Shapes], np.ndarray]] = field(default_factory=dict, compare=False)
    marks: tuple[str, ...] = field(default=(), compare=False)
    without: tuple[str, ...] = field(default=(), compare=False)

    def read_config(self) -> dict[str, Any]:
        """config.json, or what stands in for it."""
        return dict(self.config) if self.config is not None else read_config(self.folder)

    def checkpoint(self) -> Checkpoint:
        """The tensors by diffusers' names."""
        checkpoint = open_checkpoint(list(self.files) or self.folder)
        if self.only:
            checkpoint = checkpoint.with_entries({name: checkpoint.entries[name] for name in self.only})
        found = in_our_names(checkpoint, self.names)
        if self.marks:
            found = found.with_entries({name: e for name, e in found.entries.items() if name not in self.marks})
        if self.without:
            found = found.with_entries({k: e for k, e in found.entries.items() if not k.startswith(self.without)})
        lost = {name: values(found.shapes) for name, values in self.left_out.items() if name not in found}
        return found.with_arrays(lost) if lost else found


def load_component(component: Component, source: Source, dtype: ms.Type, without: Sequence[str] = ()) -> nn.Cell:
    """Build a component's cell and fill it from its checkpoint, shard by shard; frozen and in evaluation mode.

    Args:
        without: cells of it that are left out; their tensors are not read.

    Raises: WeightError for the config.json of another model, or naming missing, superfluous and mis-shaped tensors, or
        a missing shard.
    """
    config = source.read_config()
    if class_name_of(config) != component.class_name:
        raise WeightError(f"{source.folder / 'config.json'} describes a {class_name_of(config)}, but "
                          f"'{component.name}' is a {component.class_name}. Give the folder of such a model.")
    _check_reads(config, source.folder / "config.json", component.reads)
    checkpoint = source.checkpoint()
    cell = _build(component, config, source.folder / "config.json", checkpoint.shapes)
    make_exact(cell)
    for part in without:
        if isinstance(getattr(cell, part, None), nn.Cell):
            delattr(cell, part)
    ignored = (*component.ignored, *(f"{part}." for part in without))
    checkpoint = checkpoint.with_entries({k: e for k, e in checkpoint.entries.items() if not k.startswith(ignored)})
    found = checkpoint.shapes
    match(torch_shapes(cell), found, where=str(source.folder))
    checkpoint.refuse_integers(found)
    assign(cell, ((k, finite(k, v, checkpoint)) for k, v in checkpoint.tensors()),
           lambda k: component.weight_dtype(k, dtype))
    for parameter in cell.get_parameters():
        parameter.requires_grad = False
    return cell.set_train(False)


class LayerNorm(nn.LayerNorm):
    """MindSpore's, by `network.layer_norm`: the gradient of its own is not told epsilon on an Ascend."""

    def construct(self, x):
        return network.layer_norm(x, self.gamma, self.beta, self.epsilon)


def make_exact(cell: nn.Cell) -> None:
    """Let what a network has of mindone compute in float32 on an Ascend: attention, which is cast to float16 there, the
    frequencies of sinusoids, which are the device's exp, and the gradient of norms."""
    for _, part in list(cell.cells_and_names()):
        if hasattr(part, "set_flash_attention_force_cast_dtype"):
            part.set_flash_attention_force_cast_dtype(None)
        if type(part) is nn.LayerNorm and part.begin_norm_axis == -1:
            part.__class__ = LayerNorm
        for name, inner in part.name_cells().items():
            if type(inner).__name__ == "Timesteps":
                setattr(part, name, Sinusoids(inner))


def finite(name: str, array: np.ndarray, checkpoint: Checkpoint) -> np.ndarray:
    """``array``. Raises: WeightError naming the tensor and its file when it holds a NaN or an infinity."""
    kind = array.dtype.name
    if kind == "bfloat16":  # by its bits: ml_dtypes would take minutes for a large model
        bad = ((array.view(np.uint16) & 0x7FFF) >= 0x7F80).any()
    else:
        wide = array.astype(np.float32) if kind.startswith("float8") else array
        bad = kind.startswith("float") and not np.isfinite(wide).all()
    if bad:
        raise WeightError(f"{checkpoint.entries[name].file}: {name} holds numbers that are not finite, with which no "
                          "model computes. Download it again, or take the file of another precision.")
    return array


def _build(component: Component, config: dict[str, Any], file: Path, shapes: Mapping[str, Sequence[int]]) -> nn.Cell:
    """The cell of a config.json, its weights still to come. Raises: WeightError naming the file, whatever goes wrong:
    these are classes of other packages, which take what they are given until something breaks.
    """
    from mindspore.nn.utils import no_init_parameters

    try:
        with no_init_parameters():
            if component.build_for is None:
                return component.build(config)
            return component.build_for(config, shapes)
    except WeightError as error:
        raise WeightError(f"{file}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        if is_memory_short(error):
            text = "its sizes need more memory than there is"
        else:
            text = said(error)
        named = [f"{k}={shown(v)}" for k, v in config.items() if re.search(rf"\b{re.escape(k)}\b", str(error))]
        named = named or [f"{k}={v}" for k, v in config.items() if type(v) in (int, float) and not 0 < v < 1 << 20]
        raise WeightError(f"no {component.class_name} can be built from {file} ({text})"
                          f"{', which says ' + listing(named) if named else ''}. Expected the settings of that class; "
                          "download the file again.") from error


def build_tokenizer(component: Component, folder: Path) -> Any:
    """A tokenizer from its folder. Raises: WeightError naming the file that is missing or damaged, or the folder."""
    remedy = "Download the whole folder again."
    if not folder.is_dir():
        raise WeightError(f"{folder} is not a folder: expected that of the tokenizer '{component.name}'. {remedy}")
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".json")):
        found = read_json(folder / name, WeightError, remedy)  # transformers leaves out what is broken
        if name == "vocab.json" and (odd := [k for k, v in found.items() if type(v) is not int or v < 0]):
            raise WeightError(f"{folder / name} gives {shown(odd[0])} the number {shown(found[odd[0]])}: expected "
                              f"whole numbers from 0. {remedy}")
    shipped = sorted(os.listdir(component.default_folder)) if component.default_folder else []
    is_whole = (folder / "tokenizer.json").is_file()
    names = [name for name in shipped if not (is_whole or name.startswith(("special_tokens", "added_tokens")))]
    lost = [name for name in {"tokenizer_config.json": None, **dict.fromkeys(names)} if not (folder / name).is_file()]
    try:
        if lost:
            raise WeightError(f"{folder} lacks {listing(lost)}, of the tokenizer '{component.name}'. {remedy}")
        tokenizer = component.build(folder)
        ids = tokenizer("a cat", padding="max_length", max_length=8, truncation=True).input_ids
        if not all(type(number) is int and number >= 0 for number in ids):
            raise WeightError(f"the tokenizer in {folder} gives 'a cat' the numbers {shown(ids)}. {remedy}")
        return tokenizer
    except UserError:
        raise
    except BaseException as error:  # of the package tokenizers it is no Exception, when its own code fails
        if not is_mistake(error):
            raise
        raise WeightError(f"no tokenizer '{component.name}' can be made of the files in {folder} ({said(error)}). "
                          f"{remedy}") from error


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises: WeightError when there is none, it is something else, or a number in it is none of a model.
    """
    path = folder / name
    if not os.path.lexists(path):
        raise WeightError(f"{path} is missing: expected the {name} of a diffusers or transformers model beside "
                          "its weights. Download the whole component folder.")
    config = read_json(path, WeightError, "Download it again.")
    if wrong := list(_impossible(config, "")):
        raise WeightError(f"{path} says {listing(wrong)}. Download it again.")
    return config


SAMPLING: dict[str, Kind] = {"cfg_scale": SCALE, "embedded_guidance": SCALE, "height": SIZE, "width": SIZE,
                             "num_inference_steps": SIZE, "num_frames": SIZE, "max_sequence_length": SIZE}


def sampling_config(folder: Path) -> dict[str, Any]:
    """sampling_config.json of a whole model: some of SAMPLING, which win over what its family does by default.

    Empty where there is none. Raises: WeightError for a setting that there is not, or a value that it cannot be.
    """
    if not os.path.lexists(folder / SAMPLING_FILE):
        return {}
    config = read_config(folder, SAMPLING_FILE)
    if odd := [key for key in config if key not in SAMPLING]:
        raise WeightError(f"{folder / SAMPLING_FILE} says {listing(odd)}: expected some of {listing(SAMPLING, 10)}."
                          f"{nearest(odd[0], SAMPLING)}")
    _check_reads(config, folder / SAMPLING_FILE, {key: SAMPLING[key] for key in config})
    return config


def _check_reads(config: Mapping[str, Any], path: Path, reads: Mapping[str, Kind]) -> None:
    wrong = [f"{key}={shown(config[key]) if key in config else 'nothing'}: expected {words}"
             for key, (words, is_right) in reads.items() if not is_right(config.get(key))]
    if wrong:
        raise WeightError(f"{path} says {listing(wrong)}. Download it again.")


def _impossible(config: Mapping[str, Any], place: str) -> Iterable[str]:
    """Each number that no model has."""
    for key, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _impossible(item, f"{place}{key}.")
            elif type(item) is int and abs(item) > LARGEST_NUMBER:
                yield f"{place}{key}={item}: expected a number up to {LARGEST_NUMBER}"
            elif type(item) is int and item > MOST_LAYERS and re.search(r"layers|blocks|depth|num_.*heads", key):
                yield f"{place}{key}={item}: expected at most {MOST_LAYERS}"


def arguments(cls: type, config: Mapping[str, Any], later: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of a class's constructor from a config.json. Names that begin with _ are diffusers' own.

    Args:
        later: settings of newer versions, and the value with which the network is the one that ``cls`` makes.

    Raises: WeightError naming each value of another kind than the constructor's annotations, or its defaults, say, and
        each later setting that is on.
    """
    parameters, hints = inspect.signature(cls.__init__).parameters, {}
    with contextlib.suppress(NameError, TypeError):  # of a class whose annotations name what it does not import
        hints = typing.get_type_hints(inspect.unwrap(cls.__init__))
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {k: v for k, v in config.items() if not k.startswith("_") and not (k in (later or {}) and v == later[k])}
    wrong = [f"{k}={shown(v)}: expected {shown(later[k])}, for which this version computes" for k, v in given.items()
             if k in (later or {})]
    for key, value in given.items():
        if key not in parameters:
            continue
        default, hint = parameters[key].default, hints.get(key)
        if hint is None and default is not inspect.Parameter.empty and default is not None:
            hint = type(default) | None
        if hint is not None and not is_of(value, hint):
            wrong.append(f"{key}={shown(value)}: expected {words_of(hint)}")
    lost = [n for n, p in list(parameters.items())[1:]
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n not in given]
    wrong += [f"nothing of {name}: expected {words_of(hints.get(name, object))}" for name in lost]
    if wrong:
        raise WeightError(f"it says {listing(wrong)}. Expected the settings of a {cls.__name__}; download the file "
                          "again.")
    unknown = [] if is_open else [k for k in given if k not in parameters and k != "architectures"]
    if unknown:
        logger.warning("%s: its config.json has %s, which this version does not know and leaves out. If the images are "
                       "wrong, the model needs a newer version.", cls.__name__, listing(unknown))
    given = {k: v for k, v in given.items() if is_open or k in parameters}
    return given if is_open else {k: tuple(v) if isinstance(v, list) and not isinstance(parameters[k].default, list)
                                  else v for k, v in given.items()}


def class_name_of(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return str(config.get("_class_name") or first or "model without a class name")


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


@dataclass(frozen=True)
class Trained:
    """Weights of a model that training saved. ``names``: its name of a tensor -> that of the file ``path``."""

    path: Path
    names: Mapping[str, str]

    def check(self, name: str, model: nn.Cell) -> None:
        """Raises: WeightError naming each tensor that the model does not have, or has in another shape."""
        known, shapes = torch_shapes(model), open_checkpoint(self.path).shapes
        match({n: shape for n, shape in known.items() if n in self.names},
              {n: shapes[key] for n, key in self.names.items()}, where=f"{self.path} ({name})")

    def without(self, parts: Sequence[str]) -> Trained:
        """The same but for the tensors of these cells."""
        ends = tuple(f"{part}." for part in parts)
        return replace(self, names={n: key for n, key in self.names.items() if not n.startswith(ends)})

    def put(self, name: str, model: nn.Cell) -> None:
        """Assign them. Raises: as `check`."""
        self.check(name, model)
        checkpoint = open_checkpoint(self.path)
        assign(model, ((n, checkpoint[key]) for n, key in self.names.items()))


class ModelStore:
    """The models of one pipeline by name: loaded when they are first asked for, and unloaded when they are not needed.

    Args:
        components: what the family is made of.
        parts: components that the files of others may hold besides; see `Component.part_of`.
        further: components that may be there or not, such as a ControlNet.
        variants: other sets of components it may be made of instead. The files that are given decide.
        owner: name of the pipeline, for messages.
        loaded: models and tokenizers that are there already.
        names: how others call the layers of its models.

    Attributes:
        components: what this pipeline is made of.
        sources: name -> where its files are.
        given_as: ``"owner/name:pattern"`` -> the name of the model that these files turned out to be.
        index: model_index.json of a whole model that was given. whole: its folder.
        known_configs: config.json of models whose files are not here: the cache of prepared rows brings them.
        weight_changes: name -> what was done to its weights after loading.
        trained: name -> weights of a training that it gets after it is loaded.
        scheduler_file: a scheduler_config.json that was given, or came with the network.
        sampling_config: the sampling_config.json of a whole model that was given.
        absent: components that a whole model is without, by its model_index.json.
    """

    def __init__(self, components: Sequence[Component], dtype: ms.Type, owner: str,
                 variants: Sequence[Sequence[Component]] = (), parts: Sequence[Component] = (),
                 loaded: dict[str, Any] | None = None, names: Table | None = None,
                 further: Sequence[Component] = ()):
        self.components, self.variants = tuple(components), tuple(map(tuple, variants))
        self.parts, self.further, self.index = tuple(parts), tuple(further), {}
        self.whole: Path | None = None
        self.dtype, self.owner, self.table = dtype, owner, names
        self.loaded = dict(loaded or {})
        self.sources: dict[str, Source] = {}
        self.given_as: dict[str, str] = {}
        self.known_configs: dict[str, dict[str, Any]] = {}
        self.weight_changes: dict[str, list[str]] = {}
        self.trained: dict[str, list[Trained]] = {}
        self.scheduler_file: Path | None = None
        self.sampling_config: dict[str, Any] = {}
        self.absent: set[str] = set()
        self._digests: dict[Source, str] = {}  # of the files of each model: ten gigabytes are read once
        self._configs: dict[tuple[Path, str], dict[str, Any]] = {}  # each file is read once: every batch asks for them

    # -- what there is -----------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models and tokenizers."""
        return tuple(c.name for c in self.components)

    def component(self, name: str) -> Component:
        """The component called ``name``."""
        return next(c for c in (*self.components, *self.parts, *self.further) if c.name == name)

    def has_config(self, name: str) -> bool:
        """Whether `config` has an answer."""
        return name in self.loaded or name in self.sources or name in self.known_configs

    def add_component(self, component: Component, source: Source | None = None, model: Any = None) -> None:
        """A component that is not of the family, in place of one of its name; with its files, or loaded already."""
        self.components = (*(c for c in self.components if c.name != component.name), component)
        if source is not None:
            self.sources[component.name] = source
        if model is not None:
            self.loaded[component.name] = model

    # -- files -------------------------------------------------------------------------------------------------

    def add(self, config: ModelConfig, network: str) -> None:
        """Find out which component, or components, the files are of: from the config.json beside them, or from the
        names and shapes of their tensors.

        Args:
            network: name of the model whose repository may hold the scheduler_config.json.

        Raises: WeightError for the files of another model, HubError.
        """
        paths = config.resolve(runtime.model_base_path())
        folder = paths[0] if paths[0].is_dir() else paths[0].parent
        if paths[0].name == SCHEDULER_FILE or (folder.name == "scheduler" and (folder / SCHEDULER_FILE).is_file()):
            self.scheduler_file = folder / SCHEDULER_FILE
            return
        if config.model_id and not (folder / "config.json").is_file() and not paths[0].is_dir():
            beside = (PurePosixPath(config.origin_file_pattern or "").parent / "config.json").as_posix()
            with contextlib.suppress(HubError):  # the publisher's single files have none
                replace(config, origin_file_pattern=beside).resolve(runtime.model_base_path())
        if os.path.lexists(folder / "model_index.json") and paths[0].is_dir():
            self.index, self.whole = self._read(folder, "model_index.json"), folder
            self.absent = {c.name for c in self.components if self.index.get(c.folder) == [None, None]}
            self.components = tuple(c for c in self.components if not c.is_optional or (
                c.folder in self.index and c.name not in self.absent))
            self.sampling_config = sampling_config(folder)
            for component in (*self.components, *self.further):
                if (folder / component.folder).is_dir():
                    self.sources[component.name] = Source(folder / component.folder)
            self._choose_variant()
            self.take_parts()
            return
        source = Source(folder, () if paths[0].is_dir() else tuple(paths))
        if os.path.lexists(folder / "config.json") or not any(c.known for c in self._all_components()):
            name = self._name_of(folder, class_name_of(self._read(folder)))
            names = self.table.models.get(name) if self.table else None
            marks = tuple(mark for c in self._all_components() if c.name == name for mark in c.marks.values())
            found = {name: replace(source, names=names, marks=marks)}
        else:
            found = self._recognised(source)
        self.sources |= found
        self._choose_variant()
        self.take_parts()
        if config.model_id:
            self.given_as[f"{config.model_id}:{config.origin_file_pattern}"] = next(iter(found))
            if network in found and self.scheduler_file is None:
                with contextlib.suppress(HubError):  # not every repository has one
                    config = replace(config, origin_file_pattern=f"scheduler/{SCHEDULER_FILE}")
                    self.scheduler_file = config.resolve(runtime.model_base_path())[0]

    def take_parts(self) -> None:
        """Be made of the parts too that the files given so far hold, and of further components."""
        for component in self.further:
            if component.name in self.sources:
                self.add_component(component)
        for part in self.parts:
            if part.part_of in self.sources:
                source = self.sources[part.part_of]
                if any(not name.startswith(part.ignored) for name in source.checkpoint().shapes):
                    self.add_component(part, source)

    def _all_components(self) -> list[Component]:
        known = dict.fromkeys(c for components in (self.components, self.further, *self.variants)
                              for c in components)
        return [component for component in known if not component.part_of]

    def _recognised(self, source: Source) -> dict[str, Source]:
        """The components of files without config.json, by the names and shapes of their tensors: one, or those of a
        whole pipeline in one file.

        Raises: WeightError when they are those of no published model.
        """
        parts = models_of(open_checkpoint(list(source.files) or source.folder), self.table) if self.table else {}
        if others := parts.pop("", []):
            logger.warning("%s: %d tensors are of no model that is used here, and left out: %s.",
                           listing(source.files) or source.folder, len(others), listing(others))
        components = self._all_components()
        if not parts:
            return self._known(source, components)
        found = [self._known(replace(source, only=tuple(names)), [c for c in components if c.name == model])
                 for model, names in parts.items()]
        return {name: own for part in found for name, own in part.items()}

    def _known(self, source: Source, components: Sequence[Component]) -> dict[str, Source]:
        """The one of ``components`` that files are of. Raises: as `_recognised`."""
        for component in components:
            names = self.table.models.get(component.name) if self.table else None
            own = replace(source, names=names)
            shapes = own.checkpoint().shapes if component.known else {}
            said = {setting: told(shapes) for setting, told in component.told_by.items()}
            said |= {setting: mark in shapes for setting, mark in component.marks.items()}
            for title, config in component.known.items():
                if all((_setting(config, name) or None) == (value or None) for name, value in said.items()):
                    files = listing(file.name for file in source.files) or str(source.folder)
                    logger.info("%s: no config.json; by names and shapes it is the %s of %s.", files, component.name,
                                title)
                    return {component.name: replace(own, config=config, left_out=component.left_out,
                                                    marks=tuple(component.marks.values()))}
        known = [title for c in components for title in c.known]
        part = f"the {components[0].name} in " if source.only else ""
        raise WeightError(f"{source.folder / 'config.json'} is missing, and the names and shapes in {part}"
                          f"{listing(source.files) or source.folder} are those of no model that is known without it: "
                          f"{listing(dict.fromkeys(known)) or 'none'}. Put the config.json of the model beside its "
                          "weights: download the whole component folder.")

    def _name_of(self, folder: Path, class_name: str) -> str:
        """The component that a folder holds: the one of its class; of two of a class the one its name tells."""
        known = self._all_components()
        of_class = [c for c in known if c.class_name == class_name]
        if not of_class:
            raise WeightError(f"{folder / 'config.json'} describes a {class_name}, but {self.owner} is made of "
                              f"{listing(c.class_name for c in known if c.class_name)}. Give the folder or files of "
                              "one of those.")
        is_one = len({c.name for c in of_class}) == 1
        named = of_class if is_one else [c for c in of_class if folder.name in (c.folder, c.name)]
        if not named:
            raise WeightError(f"{folder} holds a {class_name}, of which {self.owner} has "
                              f"{listing(c.name for c in of_class)}: expected a folder called "
                              f"{' or '.join(c.folder for c in of_class)}, by which they are told apart. Rename it.")
        return named[0].name

    def know(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the config.json of models whose files are not here, so that the pipeline can be planned without them."""
        self.known_configs.update({name: dict(config) for name, config in configs.items()})
        self.known_configs.update({part.name: dict(configs[part.part_of]) for part in self.parts
                                   if part.part_of in configs})
        for component in self.further:
            if component.name in configs:
                self.add_component(component)
        self._choose_variant()

    def _choose_variant(self) -> None:
        """Be made of the first set of components that has the classes of all files given so far.

        Where none has, the present one stays, and loading says what does not fit.
        """
        if not self.variants:
            return
        found = {name: class_name_of(config) for name, config in self.known_configs.items()}
        found |= {name: class_name_of(self._config_of(source)) for name, source in self.sources.items()
                  if source.config is not None or (source.folder / "config.json").is_file()}
        for components in (self.components, *self.variants):
            classes = {c.name: c.class_name for c in components}
            if all(classes.get(name) in ("", class_name) for name, class_name in found.items()):
                self.components = components
                return

    def source(self, name: str) -> Source:
        """Where the files of a component are. Raises: WeightError when none were given for it."""
        if name in self.sources:
            return self.sources[name]
        component = self.component(name)
        if component.default_folder is not None:
            return Source(component.default_folder)
        raise WeightError(f"the model '{name}' is needed, but no files were given for it; given: "
                          f"{listing(self.sources) or 'none'}. Add a ModelConfig for its '{component.folder}' folder.")

    def _config_of(self, source: Source) -> dict[str, Any]:
        return self._read(source.folder) if source.config is None else dict(source.config)

    def _read(self, folder: Path, name: str = "config.json") -> dict[str, Any]:
        if (folder, name) not in self._configs:
            self._configs[folder, name] = read_config(folder, name)
        return self._configs[folder, name]

    def config(self, name: str) -> dict[str, Any]:
        """config.json of a component, without loading its weights."""
        if name in self.loaded:
            config = self.loaded[name].config
            return config.to_dict() if hasattr(config, "to_dict") else dict(config)  # transformers has classes
        if name in self.sources or name not in self.known_configs:
            source = self.source(name)
            config = self._config_of(source)
            _check_reads(config, source.folder / "config.json", self.component(name).reads)
            return config
        return self.known_configs[name]

    def scheduler_config(self, network: str) -> dict[str, Any] | None:
        """scheduler_config.json of the model, in ``scheduler/`` beside its network; None where there is none."""
        files = [self.scheduler_file] if self.scheduler_file else []
        if network in self.sources:
            folder = self.sources[network].folder
            files += [folder.parent / "scheduler" / SCHEDULER_FILE, folder / SCHEDULER_FILE]
        return next((self._read(f.parent, f.name) for f in files if f.is_file()), None)

    # -- weights -----------------------------------------------------------------------------------------------

    def get(self, name: str) -> Any:
        """The model or tokenizer called ``name``, loaded if it is not."""
        if name not in self.loaded:
            component, source = self.component(name), self.source(name)
            self.loaded[name] = (load_component(component, source, self.dtype) if component.class_name
                                 else self._tokenizer(component, source.folder))
            for weights in self.trained.get(name, ()):
                weights.put(name, self.loaded[name])
        return self.loaded[name]

    def decoder(self, name: str) -> nn.Cell:
        """The model called ``name`` for decoding: itself where it is loaded, else without what only encoding uses, as
        ``<name>.decoder`` in ``loaded``.
        """
        if name in self.loaded:
            return self.loaded[name]
        part = f"{name}.decoder"
        if part not in self.loaded:
            component = self.component(name)
            model = load_component(component, self.source(name), self.dtype, without=component.encoder)
            for weights in self.trained.get(name, ()):
                weights.without(component.encoder).put(name, model)
            if STORED_IN_8_BITS in self.weight_changes.get(name, ()):
                store_8bit(model)
            self.loaded[part] = model
        return self.loaded[part]

    def add_trained(self, name: str, weights: Trained) -> None:
        """Weights of a training, for a model: it has them now, or gets them whenever it is loaded."""
        if name in self.loaded:
            weights.put(name, self.loaded[name])
        if weights not in self.trained.setdefault(name, []):
            self.trained[name].append(weights)
        self.note_change(name, f"weights {sha256_of(weights.path)}", is_once=True)

    def save(self, name: str, folder: Path, changed: bool, max_shard_bytes: int, *, is_linked: bool = False,
             replace: bool = False) -> list[str | None]:
        """Write a component as diffusers has it; returns its entry of a model_index.json.

        What is unchanged is read from its files, tensor by tensor, in the precision they have; also what this package
        does not load of a model.

        Args:
            changed: write the weights that the model has in memory.
            is_linked: files of what is unchanged get a second name, where they are as diffusers has them.
            replace: put it in the place of what ``folder`` holds.

        Raises: WeightError for a model with an adapter, or stored in 8 bits, and one without files.
        """
        component = self.component(name)
        if name in self.absent or (name in self.loaded and self.loaded[name] is None):
            return [None, None]  # left out, as Stable Diffusion 3's T5 may be
        if component.is_tokenizer:
            shutil.copytree(self.source(name).folder, folder)
            settings = read_config(folder, "tokenizer_config.json")
            return ["transformers", settings.get("tokenizer_class", "AutoTokenizer")]
        changes = [change for change in self.weight_changes.get(name, ()) if change != STORED_IN_8_BITS]
        is_changed = changed or bool(changes) or bool(self.trained.get(name))
        config = self._config_of(self.source(name)) if name in self.sources else self.config(name)
        is_encoder = "architectures" in config
        config = config if is_encoder else {**config, "_class_name": component.class_name}
        stem = "model" if is_encoder else "diffusion_pytorch_model"
        entry: list[str | None] = ["transformers" if is_encoder else "diffusers", component.class_name]
        if component.unlike and name in self.sources and component.unlike[0] in self.source(name).checkpoint():
            logger.warning("%s: diffusers cannot read the %s that is written there, this package can: %s.", folder,
                           name, component.unlike[1])
        if not is_changed:
            tensors: Checkpoint | dict[str, np.ndarray] = self.source(name).checkpoint()
            files = open_checkpoint(list(self.source(name).files) or self.source(name).folder)
            if is_linked and files.entries == tensors.entries:
                link_sharded(folder, files, stem, config)
                return entry
        else:
            tensors = state_dict(model := self.get(name))
            odd = [key for key in tensors if key.endswith(".weight_scale") or ".lora_" in key]
            if odd or adapted_layers(model):
                raise WeightError(f"'{name}' has an adapter, or is stored in 8 bits ({listing(odd) or 'an adapter'}): "
                                  "save the adapter by itself, and load it by load_lora into a fresh pipeline.")
            if name in self.sources:
                tensors = self.source(name).checkpoint().with_arrays(tensors)
        save_sharded(folder, tensors, stem, max_shard_bytes, config, replace)
        return entry

    def save_unread(self, folder: Path, written: Collection[str]) -> dict[str, list[str | None]]:
        """Copy what a whole model has besides, which diffusers asks for: as Qwen-Image-Edit's ``processor``.

        Args:
            folder: that of the whole model that is written. written: what is there, as in model_index.json.

        Returns: its entries of model_index.json.
        """
        found = {}
        for name, entry in self.index.items():
            if not isinstance(entry, list) or name in written or name == "scheduler" or not name.isidentifier():
                continue
            if self.whole is not None and (self.whole / name).is_dir():
                shutil.copytree(self.whole / name, folder / name)
                found[name] = entry
            elif entry == [None, None]:
                found[name] = entry
        return found

    def restore(self, name: str, tensors: Iterable[str]) -> None:
        """Give tensors of a model the values again that they have in its files and those of a training, in place.

        Raises: ConfigError for a model without files, or whose weights are in another form by now.
        """
        if name not in self.loaded:
            return
        if name not in self.sources:
            raise ConfigError(f"'{name}' was not read from files, so its weights of before are not known: make the "
                              "pipeline by from_pretrained, or load the model again.")
        adapted = adapted_layers(self.loaded[name])
        checkpoint, parameters = self.source(name).checkpoint(), torch_parameters(self.loaded[name])
        parameters |= {f"{layer}.{part}": parameters[f"{layer}.base.{part}"] for layer in adapted
                       for part in ("weight", "bias") if f"{layer}.base.{part}" in parameters}
        values = dict.fromkeys(tensors, checkpoint)
        for weights in self.trained.get(name, ()):
            trained = open_checkpoint(weights.path)
            values |= {tensor: {tensor: trained[key]} for tensor, key in weights.names.items() if tensor in values}
        for tensor, file in values.items():
            if parameters[tensor].dtype not in FLOATS:
                raise ConfigError(f"'{name}' is stored in 8 bits by now: clear its LoRAs before.")
            array = file[tensor]
            if array.dtype.name.startswith("float8"):
                array = array.astype(np.float32)
            ops.assign(parameters[tensor], Tensor(array, parameters[tensor].dtype))
        for layer, cell in adapted.items():
            if f"{layer}.weight" in values:
                cell.weight_changed()

    def _tokenizer(self, component: Component, folder: Path) -> Any:
        """A tokenizer. Raises: WeightError also for one with more tokens than its text encoder has rows for."""
        tokenizer, encoder = build_tokenizer(component, folder), component.name.replace("tokenizer", "text_encoder")
        if self.has_config(encoder):
            config = self.config(encoder)
            rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
            token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
            if type(rows) is int and highest >= rows:
                raise WeightError(f"the tokenizer in {folder} has the token {shown(token)} of number {highest}, but "
                                  f"'{encoder}' has a vocab_size of {rows}: expected the two of one model. Download "
                                  "both folders again.")
        return tokenizer

    def unload(self, names: Iterable[str]) -> None:
        """Let go of models, which are loaded again at first use."""
        for name in names:
            self.loaded.pop(name, None)
            self.loaded.pop(f"{name}.decoder", None)

    def note_change(self, name: str, what: str, is_once: bool = False) -> None:
        """Something was done to the weights of a model: its digest is another one from here on.

        Args:
            is_once: it is the same however often it is done.
        """
        changes = self.weight_changes.setdefault(name, [])
        if not (is_once and what in changes):
            changes.append(what)

    def weights_digest(self, name: str) -> str | None:
        """SHA-256 over a model's or tokenizer's files and what was done to its weights; None without files."""
        if name not in self.sources and self.component(name).default_folder is None:
            return None
        source = self.source(name)
        if source not in self._digests:
            self._digests[source] = files_digest(source)
        changes = self.weight_changes.get(name, [])
        return hashlib.sha256("\n".join([self._digests[source], *changes]).encode()).hexdigest()
