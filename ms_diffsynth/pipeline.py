"""A pipeline: units, and the programs made of them. Inference and training run the same units.

Its models are in a `models.ModelStore`, which loads each at first use: a job loads exactly those that its half of the
cut names.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.compile import Announce, CompiledStep, log_only
from ms_diffsynth.data.images import to_pixels
from ms_diffsynth.data.metadata import models_that_take
from ms_diffsynth.diffusion.schedule import Schedule
from ms_diffsynth.diffusion.tasks import Task, task
from ms_diffsynth.diffusion.units import Objective, SampleLatents, StartLatents
from ms_diffsynth.errors import ConfigError, DataError, ProgramError, WeightError, listing, nearest
from ms_diffsynth.formats.adapters import FULL, LOHA, LOKR
from ms_diffsynth.formats.interchange import Model, Table
from ms_diffsynth.formats.lora import load_adapters, models_in
from ms_diffsynth.formats.weights import asked_dtype, open_checkpoint
from ms_diffsynth.hub.card import Licence, Loader
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.models import SAMPLING_FILE, SCHEDULER_FILE, Component, ModelStore, Source, Trained
from ms_diffsynth.nn.adapters import formats
from ms_diffsynth.nn.adapters.layer import bare_layers, linear_modules
from ms_diffsynth.nn.adapters.linear import fuse
from ms_diffsynth.nn.recompute import use_recompute
from ms_diffsynth.program import Cut, Program, slot
from ms_diffsynth.registry import interchange_tables
from ms_diffsynth.storage.files import sha256_of, stage_folder
from ms_diffsynth.units import PipelineUnit, TensorUnit, run_unit, run_units

logger = logging.getLogger(__name__)

# Of FLUX.1-dev's text encoders, 1,346 kernels called one by one took the host 1.2 s, compiled 0.05, after 15 s of
# compilation; of its VAE 0.03, 0.005 and 1.1 (MindSpore 2.10 on the stand-in, shapes only, 2026-11-29).
ROWS_WORTH_COMPILING = 32
SHARD = 5 * 10**9  # bytes of a file of weights


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What sampling does where it is not told otherwise: a family's, unless the model's sampling_config.json says.

    Attributes:
        cfg_scale: of two-branch guidance; 1 is none.
        embedded_guidance: the scale told to a guidance-distilled network; others are told none.
        height, width: pixels; None is what the network was made for.
        num_inference_steps: sampling steps; None depends on the sampler.
        num_frames: of a video; None for images.
    """

    cfg_scale: float = 1.0
    embedded_guidance: float = 3.5
    height: int | None = 1024
    width: int | None = 1024
    num_inference_steps: int | None = 30
    num_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a family's networks hold beside their weights, so that memory can be worked out from shapes.

    Each is a number of values, in the dtype that is computed in; measured by MindSpore's allocator on the stand-in for
    CANN (``python benchmarks/memory.py``, ``python benchmarks/vae_peaks.py``).

    Attributes:
        kept: that a block of the network keeps for backward, for each token and channel.
        inside: that are held at one time inside of a block that is computed again in backward, likewise.
        inner: further ones of these for each channel of the feed-forward, where models of a family differ in that.
        encode, decode: at the peak of the VAE, for each pixel of the image and channel of its first block.
    """

    kept: float
    inside: float
    encode: float
    decode: float
    inner: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of a model family without its weights. Nothing outside ``pipelines`` asks for a family by name.

    Attributes:
        pipeline: its pipeline class.
        write_tiny: writes a tiny, randomly initialised model in the family's checkpoint format, from a seed.
        tiny_variants: name -> the same for tiny models with more than that one has, such as what editing needs.
        published: settings of its published models: name -> component -> config.json, without those that no training
            of a prepared data set needs.
        repositories: of a hub -> which of the published models it holds.
        activations: what they take beside their weights; None where that is not known.
        prepared_shapes: from such configs, the shape of an image's latents and a number of text tokens to the shapes
            of the prepared slots of a row.
        licences: base model -> the licence of what is trained from it, for the model card.
        loader: from the name of the base model, or None, the names by which model cards say how to load it; None when
            only this package can.
    """

    name: str
    pipeline: type[Pipeline]
    write_tiny: Callable[[Path, int], None]
    tiny_variants: Mapping[str, Callable[[Path, int], None]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, dict[str, Any]]] = field(default_factory=dict)
    repositories: Mapping[str, str] = field(default_factory=dict)
    activations: Activations | None = None
    prepared_shapes: Callable[..., dict[str, tuple[int, ...]]] | None = None
    licences: Mapping[str, Licence] = field(default_factory=dict)
    loader: Callable[[str | None], Loader | None] = lambda base_model: None

    @property
    def takes_prompts(self) -> bool:
        """Whether what is sampled follows a prompt."""
        return "prompt" in self.pipeline.inputs

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of its tokenizers; the setting ``<name>_path`` says where one is."""
        return tuple(c.name for c in self.pipeline.components if c.is_tokenizer)

    @property
    def sampling(self) -> SamplingDefaults:
        """What sampling does where it is not told otherwise."""
        return self.pipeline.sampling


@dataclass
class Added:
    """The LoRAs in the weights of a model: tensors that they changed, how the digest tells them, files with factors."""

    tensors: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    files: list[tuple[Path, float]] = field(default_factory=list)


class UnitSequence(nn.Cell):
    """The step of a cut as one cell: units called in order, wired by constant indices, so that it can be compiled.

    ``construct`` takes the values of ``inputs`` as one tuple and returns those of ``outputs``.
    """

    def __init__(self, cut: Cut, pipe: Any, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None):
        super().__init__(auto_prefix=False)
        self.inputs = tuple(inputs or cut.cache + cut.draws)
        self.outputs = tuple(outputs or cut.outputs)
        position = {name: k + 1 for k, name in enumerate(self.inputs)}  # 0 is the absent slot: the constant None
        reads = []
        for unit in cut.step:
            unit.attach(pipe)
            reads.append(tuple(position.get(slot(p), 0) for p in unit.input_params))
            for param in unit.output_params:
                position[param] = len(position) + 1
        self.units = nn.CellList(list(cut.step), auto_prefix=False)
        self.reads = tuple(reads)
        self.returned = tuple(position[name] for name in self.outputs)

    def construct(self, inputs):
        slots = (None,) + inputs
        for k in range(len(self.units)):
            slots = slots + self.units[k](*[slots[i] for i in self.reads[k]])
        return tuple([slots[i] for i in self.returned])

    def positional(self, *inputs):
        """The same with single Tensors as arguments, for compilation."""
        return self.construct(inputs)


class UnitRunner:
    """Run one unit on the documents' three dictionaries and return them, updated copies.

    A unit that reads something of ``inputs_posi`` (the prompt, or what was made of it) writes there, and runs again on
    the negative side when ``cfg_scale`` is not 1; any other unit reads and writes ``inputs_shared``.

    Args:
        run: runs a unit on named slots, as `units.run_unit` does.
    """

    def __init__(self, run: Callable[..., dict[str, Any]] = run_unit):
        self.run = run

    def __call__(self, unit: PipelineUnit | TensorUnit, pipe: Pipeline, inputs_shared: dict[str, Any],
                 inputs_posi: dict[str, Any], inputs_nega: dict[str, Any]) -> tuple[dict, dict, dict]:
        shared, posi, nega = dict(inputs_shared), dict(inputs_posi), dict(inputs_nega)
        reads = {slot(p) for p in unit.input_params}
        if not reads & set(posi):
            shared.update(self.run(unit, pipe, shared))
            return shared, posi, nega
        outputs = self.run(unit, pipe, shared | posi)
        if shared.get("cfg_scale", 1) == 1:
            nega.update(outputs)
        else:
            negative = {k.removeprefix("negative_"): v for k, v in nega.items()}
            nega.update(self.run(unit, pipe, shared | negative))
        posi.update(outputs)
        return shared, posi, nega


class Pipeline:
    """Base of every family's pipeline. A family gives components, units and shapes; the rest is here.

    Args:
        models: loaded models and tokenizers by component name.
        dtype: compute dtype; None takes the runtime's.

    Attributes:
        store: the models: where they lie, and what was done to them.
        units: from the inputs to conditions and ``input_latents``, in order. Every program is made of this list: a unit
            added to it is part of training and sampling.
        sigmas: the grid trained on, float32 [1000]; None before training.
        sampled_sigmas: the levels that are sampled now, float32 [n + 1]; None while rows are prepared for training.
        prepared_prompts: in stage two of split training, prompt -> its slots without batch axis: no other prompt can be
            sampled, and of the VAE the decoder alone is loaded. Else None.
    """

    components: tuple[Component, ...] = ()  # of the family; those of one pipeline are ``store.components``
    variants: tuple[tuple[Component, ...], ...] = ()  # what it may be made of instead, as the given files decide
    parts: tuple[Component, ...] = ()  # what the files of a component may hold besides
    medium: str = "image"  # what it makes: "image" or "video"
    frame_rate: float = 0.0  # frames a second of its videos
    frame_factor: int = 1  # a video has one frame more than a multiple of this many
    further: tuple[Component, ...] = ()  # what may be there or not: a ControlNet
    inputs: tuple[str, ...] = ("prompt", "input_image", "height", "width")
    sampling = SamplingDefaults()
    division_factor = 16  # heights and widths are multiples of this many pixels
    absent_inputs: tuple[str, ...] = ()  # further inputs that a row of a data set may do without
    aligned_inputs: tuple[str, ...] = ()  # further inputs that are images as the row's own, place by place
    input_options: tuple[str, ...] = ()  # what sampling takes beside further inputs, and training does not
    objective_class: type[Task] | None = None  # the only task it is trained for; None is any of `registry.TASKS`
    lora_target_modules: tuple[str, ...] = ()  # layers that get a LoRA when none are named
    encoder_lora_target_modules: Mapping[str, tuple[str, ...]] = {}  # the same of models where these are others
    lora_prefixes: dict[str, str] = {}  # model name -> its prefix in a LoRA file, where there is no ``interchange``
    diffusers_class: str = ""  # what diffusers calls the pipeline
    interchange: Table | None = None  # how others call the layers of its models
    fusible: tuple[str, ...] = ()  # units that may be compiled into the training step although they could be prepared
    prepare_settings: tuple[str, ...] = ()  # attributes that shape what is prepared; a cache must have the same
    padded_slots: tuple[str, ...] = ()  # prepared slots [B, L, ...] of varying L, padded with zeros outside prepare
    samplers: tuple[str, ...] = ()  # names of those that fit what the network predicts; the first is the default
    # slot -> setting of the network's config.json, axis of the slot, how often it goes into the setting
    widths: Mapping[str, tuple[str, int, int]] = {}
    prompt_lengths: tuple[int, ...] = ()  # the lengths they are padded to; each is one compilation
    announce: Announce = staticmethod(log_only)  # what is told when something is compiled
    sampled_draws: tuple[str, ...] = ("latents", "sigma")  # what ``denoise`` reads besides conditions when sampling
    # inputs of units that a caller need not give: where sampling starts, and how the VAE works; see `shared.tiles`
    input_defaults: Mapping[str, Any] = {"noise": None, "start_noise": None, "tiled": False, "tile_size": None,
                                         "tile_stride": None}

    def __init__(self, models: dict[str, Any] | None = None, dtype: ms.Type | None = None):
        self.dtype = dtype or runtime.compute_dtype(None)
        cls = type(self)
        self.store = ModelStore(cls.components, self.dtype, cls.__name__, cls.variants, cls.parts, models,
                                cls.interchange, cls.further)
        self.device = runtime.current().device
        self.objective = Objective()
        self.sigmas: np.ndarray | None = None
        self.sampled_sigmas: np.ndarray | None = None
        self.random = _fresh_random
        self.unit_runner = UnitRunner()
        self._loras: dict[str, Added] = {}  # model -> the LoRAs in it
        self.compiled_steps: dict[tuple[str, tuple[str, ...]], CompiledStep] = {}
        self.units_to_compile: frozenset[str] = frozenset()
        self.records_loss = False  # True while a training module's own forward is recorded
        self.keeps_models = True  # False: what has prepared the rows is unloaded then
        self.prepared_prompts: dict[str, dict[str, np.ndarray]] | None = None
        self.units = self.build_units()
        if any("moments" in unit.output_params for unit in self.units):  # no VAE, no posterior
            self.units.append(SampleLatents("mean"))
        self._replaced: dict[str, PipelineUnit | TensorUnit] = {}  # units of the family that others stand for
        self.denoise = self.build_denoise()

    # -- what a family provides ---------------------------------------------------------------------------------

    def build_units(self) -> list[PipelineUnit | TensorUnit]:
        """Units from the pipeline's inputs to conditions and ``moments``; without a VAE, ``input_latents``."""
        raise TypeError(f"{type(self).__name__} has no build_units: implement it.")

    def build_optional_units(self) -> dict[str, list[PipelineUnit | TensorUnit]]:
        """Units that run only with a further input, by its name: before the others, or instead of the one that is
        called the same; see `use_input`."""
        return {}

    @functools.cached_property
    def optional_units(self) -> dict[str, list[PipelineUnit | TensorUnit]]:
        """`build_optional_units`, once: when they are first asked for, the files of the models are known."""
        return self.build_optional_units()

    def build_denoise(self) -> TensorUnit:
        """The unit that calls the network: reads ``latents`` and ``sigma``, writes ``velocity``."""
        raise TypeError(f"{type(self).__name__} has no build_denoise: implement it.")

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        """Shape of a sample's latents for a size in pixels: (height, width), or (frames, height, width) of a video."""
        raise TypeError(f"{type(self).__name__} has no latent_shape: implement it.")

    def training_schedule(self, objective: str) -> Schedule:
        """The grid of noise levels trained on, for the objective ``"sft"`` or ``"dreambooth"``."""
        raise TypeError(f"{type(self).__name__} has no training_schedule: implement it.")

    # -- programs ------------------------------------------------------------------------------------------------

    def objective_for(self, objective: Task | None, name: str = "sft") -> Task:
        """What is minimised when ``objective`` is asked for; None is that of the task, `registry.TASKS`."""
        return objective or task(name)

    def training_program(self, objective: Task, sigmas: np.ndarray) -> Program:
        """Everything from a row of the data set to ``loss``: ``units``, then the objective around ``denoise``."""
        units = [SampleLatents(objective.posterior) if isinstance(u, SampleLatents) else u for u in self.units]
        units = [*map(at_the_start, units), *objective.units(self, sigmas)]
        return Program(units, (*self.inputs, *objective.inputs, *self._defaults(units, objective.draws)),
                       objective.draws)

    def _defaults(self, units: Sequence[PipelineUnit | TensorUnit], draws: Sequence[str]) -> list[str]:
        """Of ``input_defaults`` those that nothing else writes."""
        written = {*draws, *(name for unit in units for name in unit.output_params)}
        return [name for name in self.input_defaults if name not in written]

    @property
    def takes_guidance(self) -> bool:
        """Whether the network is told a guidance scale; so far as its settings are known."""
        return any(slot(param) == "guidance" for param in self.denoise.input_params)

    def sampling_program(self, extra: Sequence[str] = ()) -> Program:
        """From a prompt, and the ``extra`` inputs, to ``velocity`` at given ``latents`` and ``sigma``; and from
        ``input_image`` and ``start_noise`` to ``start_latents``, from where sampling starts.
        """
        optional = {id(unit) for units in self.optional_units.values() for unit in units}
        own = [self._replaced.get(unit.name, unit) for unit in self.units]
        own = [at_the_start(unit) for unit in own if id(unit) not in optional]
        further = {unit.name: unit for name in extra for unit in self.optional_units[name]}
        units = with_further(own, list(further.values()))
        written = {name for unit in units for name in unit.output_params}
        if "input_latents" in written and "start_latents" not in written:
            units.append(StartLatents())
        guidance = ("guidance",) if self.takes_guidance else ()
        units, draws = [*units, self.denoise], self.sampled_draws
        return Program(units, (*type(self).inputs, *extra, *guidance, *self._defaults(units, draws)), draws)

    def use_input(self, name: str) -> None:
        """Train on a further input: its units join ``units``. Sampling reads it whenever it is given, trained or not.

        Raises: ConfigError for an input the pipeline does not have.
        """
        if name not in self.optional_units:
            hint = " Set template_model_id_or_path." if name == "template_inputs" else ""
            raise ConfigError(f"extra_inputs names '{name}': {type(self).__name__} has "
                              f"{listing(self.optional_units) or 'no further inputs'}."
                              f"{hint or models_that_take([name]) or nearest(name, self.optional_units)}")
        if name not in self.inputs:
            self.inputs, further = (*self.inputs, name), self.optional_units[name]
            names = {unit.name for unit in further}
            self._replaced |= {unit.name: unit for unit in self.units if unit.name in names}
            self.units[:] = with_further(self.units, further)

    @property
    def model_fn(self) -> Callable[..., Tensor]:
        """The network's velocity for named slots (``latents``, ``sigma``, conditions); others are ignored."""
        return self._model_fn

    @model_fn.setter
    def model_fn(self, function: Any) -> None:
        raise ProgramError(f"{type(self).__name__}.model_fn was assigned: training and sampling would not use it, they "
                           "compile the unit pipe.denoise. Write a TensorUnit that reads latents and sigma and writes "
                           "velocity, and assign that to pipe.denoise.")

    def _model_fn(self, **slots: Any) -> Tensor:
        self.recompute_as_asked(slots)
        return run_unit(self.denoise, self, slots)[self.denoise.output_params[0]]

    def prepare_training(self, trained: Sequence[str]) -> None:
        """Called before training: ``trained`` are the names of the models that learn, or of parts of them.

        Raises: ConfigError where the inputs of the run do not fit each other, or the models.
        """

    def film_problem(self, frames: int, inputs: Collection[str]) -> str:
        """Why a film of so many frames cannot be trained on with these inputs, without a full stop; usually nothing."""
        return ""

    def recompute_as_asked(self, slots: Mapping[str, Any]) -> None:
        """Let the network's blocks be computed again in backward if ``use_gradient_checkpointing``, or with
        ``_offload`` at its end, is among ``slots`` and true. A network without blocks stays as it is.
        """
        is_offloaded = bool(slots.get("use_gradient_checkpointing_offload"))
        if not (slots.get("use_gradient_checkpointing") or is_offloaded):
            return
        network, component = getattr(self, self.network), self.store.component(self.network)
        has_blocks = any(isinstance(cell, nn.CellList) for cell in network.cells())
        if has_blocks and not (component.recomputes_itself or getattr(network, "has_recomputed_blocks", False)):
            use_recompute(network, offload=is_offloaded)
            self.forget_compiled()

    def run(self, units: Sequence[Any], slots: dict[str, Any]) -> dict[str, Any]:
        """Run units eagerly on named slots; returns all slots."""
        return run_units(tuple(units), self, slots)

    def check_widths(self, slots: Mapping[str, Any]) -> None:
        """Raises: WeightError for slots that are not as wide as the network takes them: models of two sizes."""
        config = self.config(self.network) if self.widths and self.store.has_config(self.network) else {}
        for name, (setting, axis, factor) in self.widths.items():
            wanted = config.get(setting)
            if name in slots and type(wanted) is int and slots[name].shape[axis] * factor != wanted:
                place = f"{self.sources[self.network].folder / 'config.json'}" if self.network in self.sources else "it"
                raise WeightError(f"{name} has {slots[name].shape[axis]} channels, but '{self.network}' takes "
                                  f"{wanted // factor} ({place} says {setting}={wanted}). Expected the text encoder, "
                                  "the vae and the network of one model: compare their config.json, and give those.")

    # -- models --------------------------------------------------------------------------------------------------

    @property
    def always_fused(self) -> tuple[str, ...]:
        """Names of the units that run in the training step, whatever is trained."""
        return tuple(unit.name for unit in self.units if unit.is_always_fused)

    @property
    def network(self) -> str:
        """Name of the model that ``denoise`` calls."""
        return self.denoise.onload_model_names[0]

    @property
    def torch_dtype(self) -> ms.Type:
        """``dtype``, by DiffSynth-Studio's name; a dtype of MindSpore."""
        return self.dtype

    @property
    def models(self) -> dict[str, Any]:
        """The models and tokenizers that are loaded, by name."""
        return self.store.loaded

    @property
    def sources(self) -> dict[str, Source]:
        """Where the files of each are."""
        return self.store.sources

    @property
    def given_as(self) -> dict[str, str]:
        """``"owner/name:pattern"`` -> the model that these files turned out to be."""
        return self.store.given_as

    @property
    def known_configs(self) -> dict[str, dict[str, Any]]:
        """config.json of models whose files are not here, by name: a cache of prepared rows brings them."""
        return self.store.known_configs

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the models and tokenizers this family has."""
        return self.store.names

    def __getattr__(self, name: str) -> Any:
        store = self.__dict__.get("store")  # not self.store, which would come here again in a copy that is being made
        if store is None or name not in store.names:
            raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")
        return store.get(name)

    def compiled(self, name: str, build: Callable[[], Callable[..., Any]], which: tuple[str, ...] = ()) -> CompiledStep:
        """The function that ``build`` makes at first use, compiled; ``which`` of those with this name."""
        if (name, which) not in self.compiled_steps:
            self.compiled_steps[name, which] = CompiledStep(build(), name, runtime.current().mode,
                                                       announce=lambda *what: self.announce(*what))
        return self.compiled_steps[name, which]

    def forget_compiled(self) -> None:
        """Compile again at next use: the structure of a model has changed. (New weights need no compilation.)"""
        self.compiled_steps.clear()

    def compile_to_prepare(self, units: Sequence[PipelineUnit | TensorUnit], rows: int) -> None:
        """Let those of ``units`` that can be be compiled, where ``rows`` are worth it: on an Ascend in mode graph.

        Not when models are to be unloaded afterwards: MindSpore 2.10 has no way to free a compiled function on an
        Ascend, and with it the weights that it reads, which leaves the process alive.
        """
        place = runtime.current()
        if self.keeps_models and rows >= ROWS_WORTH_COMPILING and (place.device, place.mode) == ("Ascend", "graph"):
            self.units_to_compile = frozenset(unit.name for unit in units if getattr(unit, "has_few_shapes", False))

    def function_of(self, unit: TensorUnit) -> Callable[..., tuple[Tensor, ...]]:
        """What computes ``unit`` outside of a step."""
        if unit.name not in self.units_to_compile:
            return unit
        return self.compiled(unit.name, lambda: unit.construct)

    def unload_models(self, model_names: Iterable[str]) -> None:
        """Free the memory of models, which are loaded again at next use."""
        names = set(model_names)
        self.forget_compiled()
        for unit in (*self.units, *(unit for units in self.optional_units.values() for unit in units), self.denoise):
            if isinstance(unit, TensorUnit):
                unit.detach(names)
        self.store.unload(names)

    def load_models_to_device(self, model_names: Sequence[str]) -> None:
        """Load the named models now; otherwise each is loaded at first use."""
        for name in model_names:
            if name not in self.model_names:
                raise ConfigError(f"'{name}' is not a model of {type(self).__name__}: it has "
                                  f"{listing(self.model_names)}.{nearest(name, self.model_names)}")
            getattr(self, name)

    def load_lora(self, module: nn.Cell | str | None, path: str | Path | Sequence[str | Path],
                  alpha: float | Sequence[float] = 1.0) -> int:
        """Add files of LoRAs, or of other adapters, to the weights; returns the number of layers.

        A file has any naming that the family's table knows (docs/reference/interchange.md), or is peft's folder. What
        was added before stays; `clear_lora` takes all of it out.

        Args:
            module: the model that it is for, or its name; None reads that in the file, which may be of several.
            path: a file, or several.
            alpha: factor on the file's own scale, or one for each file.

        Raises: WeightError when a key of the file fits no layer; nothing of it is added then. ConfigError for a name
        of no model.
        """
        if isinstance(module, str):
            if module not in (names := list(self.lora_table.models)):
                raise ConfigError(f"{module}={path}: no model {module} that LoRAs are for. Expected one of "
                                  f"{listing(names)}.{nearest(module, names)}")
            module = getattr(self, module)
        paths = [path] if isinstance(path, (str, Path)) else list(path)
        alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha] * len(paths)
        if len(alphas) != len(paths):
            raise ConfigError(f"{len(alphas)} factors for {len(paths)} LoRA files: expected one for each.")
        return sum(self._load_lora(module, Path(one), factor) for one, factor in zip(paths, alphas))

    def _load_lora(self, module: nn.Cell | None, path: Path, alpha: float) -> int:
        table, given = self.lora_table, {name: model for name, model in self.models.items() if model is module}
        if module is None:
            given = {name: getattr(self, name) for name in self.models_of_lora(path)}
        if given:
            table = self.lora_table_of(next(iter(given)))
        if module is not None and not set(given) & set(table.models):  # a model that is not of this pipeline
            given, table = {"": module}, Table()
        files = load_adapters(path, {name: list(linear_modules(model)) for name, model in given.items()},
                              (*formats(), LOKR, LOHA, FULL), table, interchange_tables)
        for name, file in files.items():
            fuse(file, given[name], alpha)
            if name:
                note = f"{file.name} {sha256_of(path) if path.is_file() else path} x {alpha}"
                self.store.note_change(name, note)
                added = self._loras.setdefault(name, Added())
                added.tensors |= {f"{layer}.weight" for layer in file.modules}
                added.tensors |= {f"{layer}.bias" for layer in file.biases}
                added.notes.append(note)
                added.files.append((path, alpha))
        return sum(len(file.modules) for file in files.values())

    def models_of_lora(self, path: Path) -> list[str]:
        """The models that a file of adapters is for, where the caller does not say it."""
        return models_in(path, self.lora_table)

    def clear_lora(self) -> None:
        """Give every weight that `load_lora` changed the value again that it had before, to the bit.

        Raises: ConfigError for a model that was not read from files, or is stored in 8 bits by now.
        """
        for name, added in self._loras.items():
            self.store.restore(name, added.tensors)
            for note in added.notes:
                self.store.weight_changes[name].remove(note)
        self._loras.clear()

    @contextlib.contextmanager
    def without_loras(self) -> Iterator[None]:
        """Inside the block, weights that `load_lora` changed have the values of before; behind it, to the bit, those of
        after. An adapter that is being trained stays where it is.

        Weights and LoRAs are read again from their files. Raises: as `clear_lora`.
        """
        for name, added in self._loras.items():
            self.store.restore(name, added.tensors)
        try:
            yield
        finally:
            for name, added in self._loras.items():
                model = self.models[name]
                for path, alpha in added.files:
                    file = load_adapters(path, {name: list(bare_layers(model))}, (*formats(), LOKR, LOHA, FULL),
                                         self.lora_table_of(name), interchange_tables)[name]
                    fuse(file, model, alpha)

    @property
    def lora_table(self) -> Table:
        """How the models' layers are called in files of adapters; the network is its first model."""
        table, columns = self.interchange, dict.fromkeys(self.interchange.columns if self.interchange else ())
        trained = [c.name for c in self.store.components if not c.is_tokenizer and c.name != self.network]
        own = {name: f"{self.lora_prefixes.get(name, name)}." for name in (self.network, *trained)}
        if table is None:
            return Table({name: Model({"diffusers": prefix}) for name, prefix in own.items()})
        models = {name: Model(dict.fromkeys(columns, prefix)) for name, prefix in own.items()}
        return replace(table, models={name: table.models.get(name, model) for name, model in models.items()})

    def lora_table_of(self, name: str) -> Table:
        """`lora_table` for a file that is of one model alone, which may be called as another one is."""
        return self.lora_table

    def load_weights(self, path: str | Path, is_lazy: bool = False) -> dict[str, int]:
        """Put weights that training saved (``step-N.safetensors``) into the models they are of.

        Names begin with ``pipe.<model>.``; others are of the network. A part of a model, trained alone, is enough. A
        model that is unloaded gets them again when it is loaded.

        Args:
            is_lazy: models that are not loaded get them when they are.

        Returns: model -> how many of its tensors are new. Raises: WeightError naming each tensor that is superfluous or
            of another shape; nothing is changed then. What ``is_lazy`` puts off is checked when it is done.
        """
        found: dict[str, dict[str, str]] = {}  # model -> its name of a tensor -> the file's
        for name in open_checkpoint(path).shapes:
            model, _, inner = name.removeprefix("pipe.").partition(".")
            is_named = name.startswith("pipe.") and model in self.model_names
            found.setdefault(model if is_named else self.network, {})[inner if is_named else name] = name
        own = {model: Trained(Path(path), names) for model, names in found.items()}
        for model, weights in own.items():
            if not is_lazy or model in self.models:
                weights.check(model, getattr(self, model))
        for model, weights in own.items():
            self.store.add_trained(model, weights)
        self.forget_compiled()
        return {model: len(names) for model, names in found.items()}

    @property
    def saved_class(self) -> str:
        """What diffusers calls a pipeline of these models."""
        return self.store.index.get("_class_name") or self.diffusers_class

    def save_pretrained(self, folder: str | Path, changed: Sequence[str] = (), replace: bool = False,
                        max_shard_bytes: int = SHARD, is_linked: bool = False) -> None:
        """Write a folder that `from_pretrained` and diffusers load: every model, tokenizers and the scheduler.

        Args:
            changed: models whose weights were changed in memory by other means than `load_lora` and `load_weights`.
            replace: put it in the place of what ``folder`` holds.
            max_shard_bytes: of a file.
            is_linked: files of models that are unchanged get a second name in ``folder`` (a hard link), which takes no
                space; they are copied where the file system cannot do that, or they have other names than diffusers'.

        Raises: OutputError, also for a folder that is not empty without ``replace``; WeightError for a model without
            files, with an adapter, or stored in 8 bits.
        """
        index = {"_class_name": self.saved_class,
                 "_diffusers_version": "0.35.2",
                 **{k: v for k, v in self.store.index.items() if k[0] != "_" and not isinstance(v, list)}}
        with stage_folder(folder, replace=replace) as stage:
            for component in self.store.components:
                if not component.part_of:
                    index[component.folder] = self.store.save(component.name, Path(stage) / component.folder,
                                                              component.name in changed, max_shard_bytes,
                                                              is_linked=is_linked)
            index |= self.store.save_unread(Path(stage), index)
            scheduler = self.scheduler_config() or self.published_scheduler_config()
            scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
            index["scheduler"] = ["diffusers", scheduler["_class_name"]]
            written = {"model_index.json": index, f"scheduler/{SCHEDULER_FILE}": scheduler}
            written |= {SAMPLING_FILE: self.store.sampling_config} if self.store.sampling_config else {}
            for name, content in written.items():
                stage.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def config(self, name: str) -> dict[str, Any]:
        """config.json of a component, without loading its weights."""
        return self.store.config(name)

    def scheduler_config(self) -> dict[str, Any] | None:
        """scheduler_config.json of the model; None where there is none."""
        return self.store.scheduler_config(self.network)

    def published_scheduler_config(self) -> dict[str, Any]:
        """The scheduler_config.json that is saved for a model which has none."""
        return self.published_scheduler().to_config()

    def weights_digest(self, name: str) -> str | None:
        """SHA-256 over a model's or tokenizer's files and what was done to its weights; None without files."""
        return self.store.weights_digest(name)

    @classmethod
    def from_pretrained(cls, model_configs: Sequence[ModelConfig] | ModelConfig | str, *,
                        mindspore_dtype: ms.Type | None = None, torch_dtype: Any = None, device: str | None = None,
                        **tokenizer_configs: ModelConfig | None) -> Pipeline:
        """A pipeline whose models are loaded at first use.

        Args:
            model_configs: a diffusers-format folder, or a ModelConfig for each component, and for a
                scheduler_config.json.
            mindspore_dtype, torch_dtype: compute dtype, by either name; None means bfloat16 on Ascend, float32 on the
                CPU.
            tokenizer_configs: ``<name>_config`` for each tokenizer of the family (``tokenizer_config``, or
                ``tokenizer_1_config`` and so on); None uses the model's own, or the one shipped with the package.
        """
        tokenizers = {f"{c.name}_config": c.name for c in cls.components if c.is_tokenizer}
        for name in tokenizer_configs:
            if name not in tokenizers:
                raise TypeError(f"{cls.__name__}.from_pretrained() got an unexpected keyword argument '{name}'")
        runtime.use_device(device)
        pipe = cls(dtype=runtime.compute_dtype(asked_dtype(mindspore_dtype, torch_dtype)))
        if isinstance(model_configs, (str, Path)):
            model_configs = [ModelConfig(str(model_configs))]
        elif isinstance(model_configs, ModelConfig):
            model_configs = [model_configs]
        for config in model_configs:
            pipe.store.add(config, pipe.network)
        pipe.use_sampling_config(pipe.store.sampling_config)
        for name, config in tokenizer_configs.items():
            if config is not None:
                paths = config.resolve(runtime.model_base_path())
                pipe.sources[tokenizers[name]] = Source(paths[0] if paths[0].is_dir() else paths[0].parent)
        return pipe

    def use_sampling_config(self, config: Mapping[str, Any]) -> None:
        """Sample, and pad prompts, as the model says, where it says something else than its family.

        Args:
            config: as of `models.sampling_config`.
        """
        if config:
            known = {item.name for item in fields(SamplingDefaults)}
            self.sampling = replace(self.sampling, **{name: config[name] for name in config if name in known})
        if "max_sequence_length" in config and hasattr(self, "max_sequence_length"):
            self.max_sequence_length = config["max_sequence_length"]

    @classmethod
    def check_sampler(cls, name: str | None) -> str:
        """A sampler's name; the family's default for None. Raises: ConfigError for one that the family has not."""
        if name is not None and name not in cls.samplers:
            raise ConfigError(f"sampler='{name}': expected one of {', '.join(cls.samplers)}."
                              f"{nearest(name, cls.samplers)}")
        return name or cls.samplers[0]

    # -- images ------------------------------------------------------------------------------------------------

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """An image as float32 [1, 3, H, W] in [-1, 1]."""
        return Tensor(to_pixels(image)[None])

    def check_resize_height_width(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels, rounded up to the family's division factor; logged when they change."""
        factor = self.division_factor
        rounded = tuple(-(-side // factor) * factor for side in (height, width))
        if rounded != (height, width):
            logger.warning("%d x %d pixels: sides must be multiples of %d, so %d x %d is used.", height, width, factor,
                           *rounded)
        return rounded


def with_further(units: Sequence[PipelineUnit | TensorUnit],
                 further: Sequence[PipelineUnit | TensorUnit]) -> list[PipelineUnit | TensorUnit]:
    """``units`` with those of a further input: in front, or in the place of the unit that is called the same."""
    names, instead = {unit.name for unit in units}, {unit.name: unit for unit in further}
    return [*(unit for unit in further if unit.name not in names), *(instead.get(unit.name, unit) for unit in units)]


def at_the_start(unit: PipelineUnit | TensorUnit) -> PipelineUnit | TensorUnit:
    """A unit as a program takes it: the ``noise`` and ``latents`` of a host's unit that writes ``latents``, as
    DiffSynth-Studio's image embedders do, are those that sampling starts from; a step has its own.
    """
    if not (unit.is_host and "latents" in unit.output_params):
        return unit
    reads = {"noise": "start_noise"} if "noise" in map(slot, unit.input_params) else {}
    return copy.copy(unit).with_slots(reads, {"latents": "start_latents"})


def _fresh_random(stream: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers when no seed was set: ``pipe.random`` is replaced by the training loop's counter-based draws."""
    generator = np.random.default_rng()
    if kind not in ("normal", "uniform"):
        raise ProgramError(f"draw '{stream}' is of unknown kind '{kind}': expected normal or uniform.")
    values = generator.standard_normal(shape) if kind == "normal" else generator.random(shape)
    return values.astype(np.float32)


def pad_prompts(pipe: Pipeline, slots: dict[str, np.ndarray],
                least: int = 0) -> tuple[dict[str, np.ndarray], int | None]:
    """Slots of one row, those of varying length padded with zeros to the next length there is, which is ``least`` or
    longer; and that length.

    Raises: DataError when a row is longer than the longest.
    """
    names = [name for name in pipe.padded_slots if name in slots]
    if not names:
        return slots, None
    length = padded_to(max(least, *(len(slots[name]) for name in names)), pipe)
    wide = {name: np.pad(slots[name], [(0, length - len(slots[name]))] + [(0, 0)] * (slots[name].ndim - 1))
            for name in names}
    return slots | wide, length


def padded_to(length: int, pipe: Pipeline) -> int:
    """The next of the pipeline's lengths of prompts. Raises: DataError for more tokens than the longest."""
    fitting = [n for n in sorted(pipe.prompt_lengths) if n >= length]
    if not fitting:
        raise DataError(f"a prompt of {length} tokens is longer than the longest of prompt_lengths="
                        f"{pipe.prompt_lengths}: shorten it, or add a length.")
    return fitting[0]
