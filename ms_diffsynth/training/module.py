"""What is trained: a pipeline, an objective, and which of its weights learn."""
from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mindspore import Parameter, Tensor, nn

from ms_diffsynth.diffusion.tasks import Task
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, DataError, TrainingError, WeightError, listing, naming, nearest
from ms_diffsynth.formats.lora import AdapterFile, load_adapter, save_adapters
from ms_diffsynth.formats.weights import save_sharded, save_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.models import STORED_IN_8_BITS
from ms_diffsynth.nn.adapters import Adapter, adapter as adapter_called, adapter_of, formats
from ms_diffsynth.nn.adapters.contract import Uniform
from ms_diffsynth.nn.adapters.layer import adapted_layers, linear_modules, selected
from ms_diffsynth.nn.names import state_dict, to_numpy, torch_parameters, trainable_parameters
from ms_diffsynth.nn.quant import store_models_8bit
from ms_diffsynth.nn.recompute import use_recompute
from ms_diffsynth.pipeline import SHARD, Pipeline
from ms_diffsynth.program import Cut
from ms_diffsynth.registry import interchange_tables
from ms_diffsynth.storage.cache import Entry, digest_of
from ms_diffsynth.template.units import attach_template
from ms_diffsynth.training.losses import FlowMatchSFTLoss

logger = logging.getLogger(__name__)


class Texts(Protocol):
    """Prepared slots of texts by key; those who prepare rows provide it."""

    def get(self, key: str) -> Entry | None: ...

    def put(self, key: str, slots: dict[str, np.ndarray]) -> None: ...


class PreparedSlots(dict):
    """Prepared slots of one row by name. ``text``: the key under which `Texts` holds some of them, and their names."""

    text: tuple[str, tuple[str, ...]] = ("", ())


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def targets_of(models: Mapping[str, nn.Cell], targets: Sequence[str], pipe: Pipeline) -> dict[str, Sequence[str]]:
    """Which of ``targets`` each model gets: those that select a layer of it; without any, the family's choice.

    Of the only model all. Raises: ConfigError for one that selects nothing in any model, or models without any.
    """
    if not targets:
        return {name: pipe.encoder_lora_target_modules.get(name, pipe.lora_target_modules) for name in models}
    if len(models) == 1:
        return dict.fromkeys(models, targets)
    layers = {name: list(linear_modules(model)) for name, model in models.items()}
    found = {name: [t for t in targets if selected(t, own)] for name, own in layers.items()}
    lost = [t for t in targets if not any(t in own for own in found.values())]
    bare = [name for name, own in found.items() if not own]
    if lost or bare:
        what = f"{listing(map(repr, lost))} selects no layer" if lost else f"nothing is selected in {listing(bare)}"
        raise ConfigError(f"lora_target_modules: {what} of lora_base_model={','.join(models)}. Expected ends of names "
                          "of layers, some of each model, such as to_q,q_proj; or leave lora_target_modules out.")
    return found


def text_key(names: tuple[str, ...], texts: dict[str, str]) -> str:
    """The key under which `Texts` holds these slots of texts."""
    return digest_of([names, texts])


class DiffusionTrainingModule:
    """Base of training modules: set ``self.pipe`` and call `switch_pipe_to_training_mode`.

    A subclass that leaves ``forward`` alone trains through the compiled step, with the half of the pipeline that does
    not change prepared once. A subclass with a ``forward(data) -> loss`` of its own (the documents' way) is
    differentiated as it stands, eagerly.

    Attributes:
        fuse: units pulled into the compiled step although they could be prepared (``("encode_image",)`` puts the VAE
            there).
        adapter: what ``lora_base_models`` get.
        texts: where what is prepared of a text is kept for other rows of the same text; None: nowhere.
    """

    pipe: Pipeline
    fuse: Sequence[str] = ()
    texts: Texts | None = None

    def __init__(self):
        self.trainable: tuple[str, ...] = ()
        self.lora_base_models: tuple[str, ...] = ()
        self.task = "sft"
        self.adapter: Adapter = adapter_called("lora")
        self.use_gradient_checkpointing = self.use_gradient_checkpointing_offload = False
        self._has_whole_model = False  # in the run's folder, by this process

    # -- set up --------------------------------------------------------------------------------------------------

    def switch_pipe_to_training_mode(self, pipe: Pipeline, trainable_models: str | None = None,
                                     lora_base_model: str | None = None, lora_target_modules: str | Sequence[str] = "",
                                     lora_rank: int = 32, lora_alpha: float | None = None,
                                     lora_checkpoint: str | Path | None = None, task: str = "sft",
                                     objective: Objective | None = None, lora_uniform: Uniform | None = None,
                                     use_gradient_checkpointing: bool = False,
                                     use_gradient_checkpointing_offload: bool = False,
                                     fp8_models: str | None = None, extra_inputs: str | None = None,
                                     adapter: str = "lora", preset_lora_path: str | Path | None = None,
                                     preset_lora_model: str | None = None) -> None:
        """Freeze everything, then make trainable what is named.

        Args:
            trainable_models: comma-separated models or dotted sub-modules to train whole (``"dit"``).
            lora_base_model: the model that gets a LoRA, or another ``adapter``, or several with commas; their own
                weights stay frozen.
            lora_target_modules: names, or ends of names, of their linear layers; empty takes the family's choice.
            lora_checkpoint: a file of the same adapter to continue from.
            task: ``sft`` or ``dreambooth``; with ``:data_process`` or ``:train`` one stage of split training.
            objective: what is minimised; None is the family's own, for most that of the task (`registry.TASKS`).
            use_gradient_checkpointing, use_gradient_checkpointing_offload: recompute the blocks of what gradients pass
                through; offload keeps their inputs on the host (eager only). See `nn.recompute`.
            fp8_models: frozen models stored in 8 bits, by name or as ``owner/name:pattern``. See `nn.quant`.
            extra_inputs: columns of the data set that are inputs too, with commas, such as
                ``edit_image,template_inputs``.
            adapter: a name of `nn.adapters.ADAPTERS`.
            preset_lora_path: a LoRA file that is added to the weights of ``preset_lora_model`` (by default
                the first ``lora_base_model``, or the network) before anything is trained, so that what is trained is
                the difference to it.

        Raises: ConfigError for names that are not there, for nothing to train, or for a model to be trained both ways.
        """
        self.task, (kind, _, stage) = task, task.partition(":")
        self.adapter = adapter_called(adapter)
        names, bases = _names(trainable_models), _names(lora_base_model)
        if not names and not bases:
            raise ConfigError("nothing would be trained: set lora_base_model or trainable_models, e.g. to dit.")
        known = [c.name for c in pipe.store.components if not c.is_tokenizer]
        for name in [*names, *bases]:
            root, setting = name.split(".")[0], "trainable_models" if name in names else "lora_base_model"
            if root not in known:
                raise ConfigError(f"{setting}: '{name}' cannot be trained: {type(pipe).__name__} has the models "
                                  f"{listing(known)}.{nearest(root, pipe.model_names)}")
        for name in set(names) & set(bases):
            raise ConfigError(f"'{name}' is in trainable_models and is lora_base_model: expected one of the "
                              "two. Train it whole, or train a LoRA on it.")
        for model in pipe.models.values():
            if isinstance(model, nn.Cell):
                for parameter in model.get_parameters():
                    parameter.requires_grad = False
        for name in (n.strip() for n in (extra_inputs or "").split(",") if n.strip()):
            pipe.use_input(name)
        pipe.prepare_training((*names, *bases))
        pipe.forget_compiled()  # what was compiled before has no LoRA in it
        pipe.objective = pipe.objective_for(objective, kind)
        pipe.sigmas, pipe.sampled_sigmas = pipe.training_schedule(kind).sigmas, None
        self.lora_base_models = tuple(bases)
        self.trainable = (*names, *bases)
        if stage == "data_process":  # nothing is trained, so what would be is not loaded
            self._store_frozen(fp8_models, ("prepare",))
            return
        if preset_lora_path:
            name = preset_lora_model or (bases or [pipe.network])[0]
            if name not in self.training_cut().models("step"):
                raise ConfigError(f"preset_lora_model={name}: expected a model of the training step: "
                                  f"{listing(self.training_cut().models('step'))}.")
            with naming(f"preset_lora_path={preset_lora_path}"):
                pipe.load_lora(getattr(pipe, name), preset_lora_path)
        if bases:
            targets = lora_target_modules.split(",") if isinstance(lora_target_modules, str) else lora_target_modules
            self._inject(pipe, [t.strip() for t in targets if t.strip()], lora_rank, lora_alpha, lora_uniform)
            for name in bases if lora_checkpoint else []:
                self._load_lora(pipe, name, lora_checkpoint)
        for name in names:
            for parameter in self._parameters_under(pipe, name):
                parameter.requires_grad = True
        self._store_frozen(fp8_models, ("step",) if stage == "train" or not pipe.keeps_models else ("prepare", "step"))
        self.use_gradient_checkpointing = use_gradient_checkpointing
        self.use_gradient_checkpointing_offload = use_gradient_checkpointing_offload
        if use_gradient_checkpointing or use_gradient_checkpointing_offload:
            for name in dict.fromkeys((pipe.network, *(n.split(".")[0] for n in self.trainable))):
                if name in self.training_cut().models("step") and not pipe.store.component(name).recomputes_itself:
                    use_recompute(getattr(pipe, name), offload=use_gradient_checkpointing_offload)

    def _inject(self, pipe: Pipeline, targets: Sequence[str], rank: int, alpha: float | None,
                uniform: Uniform | None) -> None:
        """Put the adapter on the layers of all ``lora_base_models``. Raises: ConfigError as `Adapter.inject`."""
        bases = self.lora_base_models
        for name, own in targets_of({name: getattr(pipe, name) for name in bases}, targets, pipe).items():
            model = getattr(pipe, name)
            if name == bases[0]:
                self.adapter.inject(model, own, rank, alpha, uniform)
                continue
            # layers of two encoders have the same names: of the second, everything begins with that of the model
            further = uniform and (lambda layer, shape, name=name: uniform(f"{name}.{layer}", shape))
            self.adapter.inject(model, own, rank, alpha, further)
            for parameter in self.adapter.parameters(model):
                parameter.name = f"{name}.{parameter.name}"

    def load_training_template_model(self, pipe: Pipeline, path_or_model_id: str | ModelConfig | None,
                                     use_gradient_checkpointing: bool = False,
                                     use_gradient_checkpointing_offload: bool = False,
                                     trust_template_code: bool = False,
                                     trust_template_sha256: str | None = None) -> None:
        """Give ``pipe`` the model ``template_model``; nothing for None. Call it before `switch_pipe_to_training_mode`.

        See `template.units.attach_template`. ``extra_inputs`` must name ``template_inputs``.
        """
        if path_or_model_id:
            attach_template(pipe, path_or_model_id, trust_template_code=trust_template_code,
                            trust_template_sha256=trust_template_sha256,
                            use_gradient_checkpointing=use_gradient_checkpointing,
                            use_gradient_checkpointing_offload=use_gradient_checkpointing_offload)

    def _load_lora(self, pipe: Pipeline, name: str, path: str | Path) -> None:
        """Continue from a file of the same adapter, for the model called ``name``."""
        model = getattr(pipe, name)
        cells = adapted_layers(model)
        with naming(f"lora_checkpoint={path}"):
            file = load_adapter(path, list(cells), formats(), pipe.lora_table, name, interchange_tables)
            if file.format is None:
                raise ConfigError(f"lora_checkpoint={path} holds a {file.name}: expected one kind of adapter.")
            if (found := adapter_of(file.format).name) != self.adapter.name:
                raise ConfigError(f"lora_checkpoint={path} holds the adapter {found}: expected {self.adapter.name}, as "
                                  f"the setting adapter says. Set adapter={found}, or give another file.")
            # a file's scale is folded into B; ours is alpha / rank, applied at run time
            modules = file.with_scale({name: cell.scale for name, cell in cells.items()})
            self.adapter.load(model, {f"{module}.{part}": array for module, parts in modules.items()
                                      for part, array in parts.items()})

    def _store_frozen(self, fp8_models: str | None, stages: tuple[str, ...]) -> None:
        """Put the named models that these stages use into 8 bits; what is prepared by them depends on it."""
        given = [self.pipe.given_as.get(n.strip(), n.strip()) for n in (fp8_models or "").split(",") if n.strip()]
        if not given:
            return
        cut = self.training_cut()
        store_models_8bit(self.pipe, ",".join(given), {m for stage in stages for m in cut.models(stage)})
        for name in given:
            self.pipe.store.note_change(name, STORED_IN_8_BITS, is_once=True)

    @staticmethod
    def _parameters_under(pipe: Pipeline, name: str) -> list[Parameter]:
        root, _, inner = name.partition(".")
        weights = trainable_parameters(getattr(pipe, root))
        found = {n: p for n, p in weights.items()
                 if not inner or n == inner or n.startswith(inner + ".")}
        if not found:
            tops = sorted({n.split(".")[0] for n in weights})
            if not tops:
                raise ConfigError(f"trainable_models='{name}': '{root}' has no weights at all, so nothing of it can "
                                  "learn. Expected a model with layers, or with a mindspore.Parameter.")
            raise ConfigError(f"trainable_models='{name}' names no weights: '{root}' has {listing(tops)}."
                              f"{nearest(inner, tops)}")
        return list(found.values())

    # -- what is trained -----------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[Parameter]:
        """Every parameter that learns, once, in a fixed order."""
        found: dict[int, Parameter] = {}
        for name in self.trainable:
            if name in self.lora_base_models:
                parameters = self.adapter.parameters(getattr(self.pipe, name))
            else:
                parameters = self._parameters_under(self.pipe, name)
            found.update((id(p), p) for p in parameters if p.requires_grad)
        if not found:
            raise TrainingError("no parameter is trainable: call switch_pipe_to_training_mode first.")
        return list(found.values())

    def training_cut(self, task: Task | None = None, outputs: Sequence[str] = ("loss", "sample_losses")) -> Cut:
        """The training program of the pipeline, or that of another ``task``, cut for what is trained."""
        program = self.pipe.training_program(self.pipe.objective if task is None else task, self.pipe.sigmas)
        return program.cut(outputs, self.trainable, (*self.pipe.always_fused, *self.fuse))

    def export_trainable_state_dict(self, remove_prefix: str | None = None) -> dict[str, np.ndarray]:
        """Trained weights by name, ``pipe.<model>.<weight>`` with ``remove_prefix`` taken off."""
        ids = {id(p) for p in self.trainable_parameters()}
        state = {}
        for root in dict.fromkeys(name.split(".")[0] for name in self.trainable):
            for name, parameter in torch_parameters(getattr(self.pipe, root)).items():
                if id(parameter) in ids:
                    state[f"pipe.{root}.{name}".removeprefix(remove_prefix or "")] = to_numpy(parameter)
        return state

    @property
    def is_whole_pipeline(self) -> bool:
        """Whether all of the network is trained, and the pipeline can be saved as one."""
        return (list(self.trainable) == [self.pipe.network] and not self.lora_base_models
                and hasattr(self.pipe, "update_pretrained"))

    def save(self, path: Path, remove_prefix: str | None = None, metadata: dict[str, str] | None = None) -> None:
        """Write what was trained: an adapter in the family's default naming, or weights by name. Never half a file."""
        if self.lora_base_models and set(self.trainable) == set(self.lora_base_models):
            files, table = {}, self.pipe.lora_table
            for model in self.lora_base_models:
                cells = adapted_layers(getattr(self.pipe, model))
                files[model] = AdapterFile({name: cell.tensors() for name, cell in cells.items()},
                                           {name: cell.scale for name, cell in cells.items()},
                                           dict.fromkeys(cells, self.adapter.format))
            save_adapters(path, files, table, table.default, metadata)
        else:
            save_state_dict(path, self.export_trainable_state_dict(remove_prefix), metadata)

    def save_models(self, folder: Path) -> None:
        """Write what diffusers loads of models that are trained themselves.

        ``folder`` is that where the network is the whole pipeline (unconditional images). Otherwise it is
        ``<folder>/model``, the whole pipeline in shards; models that are not trained are written at the first save
        alone, as hard links where that is possible. Of a VAE, where the task saves that, it is ``<folder>/vae``.

        Raises: OutputError.
        """
        if self.is_whole_pipeline:
            self.pipe.update_pretrained(folder)
        roots = {name.split(".")[0] for name in self.trainable if name not in self.lora_base_models}
        for name in (name for name in self.pipe.objective.saved_models if name in roots):
            component = self.pipe.store.component(name)
            config = {k: v for k, v in self.pipe.config(name).items() if k[0] != "_"}
            save_sharded(folder / component.folder, state_dict(getattr(self.pipe, name)), replace=True,
                         config={"_class_name": component.class_name, **config})
        rest = roots.difference(self.pipe.objective.saved_models)
        is_known = self.pipe.diffusers_class and all(c.folder for c in self.pipe.store.components)  # no template
        if rest and is_known and not self.is_whole_pipeline and not self.lora_base_models:
            self._save_whole(folder / "model", sorted(roots))

    def _save_whole(self, folder: Path, trained: Sequence[str]) -> None:
        """The pipeline with its trained models as diffusers has it; only these where the others' files are not here."""
        store = self.pipe.store
        lost = [c.folder for c in store.components if c.name not in (*store.sources, *store.absent, *store.loaded)
                and c.default_folder is None]
        try:
            if not self._has_whole_model and not lost:
                self.pipe.save_pretrained(folder, trained, replace=True, is_linked=True)
            else:
                for name in trained:
                    store.save(name, folder / store.component(name).folder, True, SHARD, replace=True)
            if not self._has_whole_model and lost:
                logger.warning("%s has %s alone: no files of %s were given to this run.", folder,
                               listing(store.component(name).folder for name in trained), listing(lost))
            self._has_whole_model = True
        except WeightError as error:
            logger.warning("%s is not written: %s The weights are in the files of the run.", folder, error)

    # -- from data to loss ---------------------------------------------------------------------------------------

    def get_pipeline_inputs(self, data: dict[str, Any]) -> tuple[dict, dict, dict]:
        """A row of the data set as the documents' three dictionaries.

        Raises: DataError for a row without an image or video, or without a prompt where the family takes one.
        """
        lost = [name for name in self._columns if data.get(name) is None and name not in self.pipe.absent_inputs]
        if lost:
            raise DataError(f"a row has no {' and no '.join(map(repr, lost))}: it has {listing(sorted(data))}. "
                            f"Expected the columns {' and '.join(map(repr, self._columns))}; name yours by "
                            "image_column and caption_column, or override get_pipeline_inputs in a script.")
        shared = {**self._visual(data), "cfg_scale": 1, **{name: data.get(name) for name in (
            *self._extra_inputs, *self.pipe.objective.inputs)}}
        if "prompt" not in self._columns:
            return shared, {}, {}
        return shared, {"prompt": data["prompt"]}, {"negative_prompt": ""}

    def _visual(self, data: dict[str, Any]) -> dict[str, Any]:
        """The image or video of a row, and its size."""
        if self.pipe.medium == "video":
            frames, height, width = data["video"].shape[:3]
            return {"video": data["video"], "num_frames": frames, "height": height, "width": width}
        return {"input_image": data["image"], "height": data["image"].size[1], "width": data["image"].size[0]}

    @property
    def _columns(self) -> list[str]:
        """The columns `get_pipeline_inputs` reads: those the pipeline has an input for."""
        return [self.pipe.medium, *(["prompt"] if "prompt" in self.pipe.inputs else []), *self._extra_inputs,
                *self.pipe.objective.inputs]

    @property
    def _extra_inputs(self) -> list[str]:
        return [name for name in self.pipe.inputs if name in self.pipe.optional_units]

    @property
    def row_fields(self) -> list[str] | None:
        """The fields of a row that shape what is prepared of it; None for all, when `get_pipeline_inputs` is yours."""
        is_own = type(self).get_pipeline_inputs is not DiffusionTrainingModule.get_pipeline_inputs
        return None if is_own else self._columns

    def prepare(self, data: dict[str, Any], cut: Cut) -> PreparedSlots:
        """Run the prepared half on one row: the slots that cross the cut, each without its batch axis.

        What depends on nothing but texts, such as the embeddings of a prompt, is computed once for equal ones.
        """
        shared, posi, _ = self.get_pipeline_inputs(data)
        known = {*cut.inputs, *self.pipe.input_defaults}
        given = {k: v for k, v in (shared | posi).items() if k in known}
        texts = {k: v for k, v in given.items() if isinstance(v, str)}
        apart, others = cut.split(texts) if self.texts is not None else ((), cut.prepare)
        names = tuple(name for unit in apart for name in unit.output_params if name in cut.cache)
        found = PreparedSlots()
        if names:
            found.update(self._of_texts(apart, texts, names))
            found.text = text_key(names, texts), names
        found.update(self._computed(others, given, [name for name in cut.cache if name not in names]))
        return found

    def _of_texts(self, units: Sequence[Any], texts: dict[str, str], names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Slots that depend on nothing but texts: those of `texts`, or computed and put there."""
        key = text_key(names, texts)
        entry = self.texts.get(key)
        if entry is not None:
            return entry.slots
        slots = self._computed(units, texts, names)
        self.texts.put(key, slots)
        return slots

    def prepare_to_sample(self, prompt: str) -> None:
        """Put into `texts` what sampling takes of a prompt, as far as no training changes it: embeddings, or token ids
        where a text encoder is trained.
        """
        apart, names = self._of_sampled_prompt()
        self._of_texts(apart, {"prompt": prompt}, names)

    def sample_key(self, prompt: str) -> str:
        """Under which key `prepare_to_sample` puts that."""
        return text_key(self._of_sampled_prompt()[1], {"prompt": prompt})

    def _of_sampled_prompt(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """The units that read nothing but the prompt of a sample image, and those of their slots that are kept."""
        program = self.pipe.sampling_program()
        whole = program.cut(self.pipe.denoise.output_params)
        models = {*whole.models("prepare"), *whole.models("step")}
        cut = program.cut(self.pipe.denoise.output_params,
                          [name for name in self.trainable if name.split(".")[0] in models])
        apart, _ = cut.split(["prompt"])
        return apart, tuple(name for unit in apart for name in unit.output_params if name in cut.cache)

    def _computed(self, units: Sequence[Any], given: dict[str, Any], names: Iterable[str]) -> dict[str, np.ndarray]:
        """These slots of one row, by these units."""
        slots = self.pipe.run(units, given)
        self.pipe.check_widths(slots)
        return {name: to_numpy(slots[name])[0, ...] for name in names}  # an array, of a number too

    def prepare_prompt(self, prompt: str, cut: Cut) -> dict[str, np.ndarray]:
        """The slots that cross the cut and depend on the prompt alone, each without its batch axis; none where a
        family's encoder reads prompt and image together.
        """
        apart, _ = cut.split(["prompt"])
        names = [name for unit in apart for name in unit.output_params if name in cut.cache]
        there = (self.pipe.prepared_prompts or {}).get(prompt, {})
        if there.keys() >= set(names):
            return {name: there[name] for name in names}
        return self._computed(apart, {"prompt": prompt}, names)

    def padded_length(self, prompt: str, cut: Cut) -> int | None:
        """How long the slots of a prompt are that are padded, by its tokens; None where only a network could say."""
        apart, _ = cut.split(["prompt"])
        tokens = self.pipe.run([unit for unit in apart if unit.is_host], {"prompt": prompt})
        lengths = [tokens[name].shape[1] for name in self.pipe.padded_slots if name in tokens]
        return max(lengths, default=None)

    def forward(self, data: dict[str, Any]) -> Tensor:
        """Loss of one row, eagerly, by the pipeline's units and FlowMatchSFTLoss."""
        shared, posi, nega = self.get_pipeline_inputs(data)
        for unit in self.pipe.units:
            shared, posi, nega = self.pipe.unit_runner(unit, self.pipe, shared, posi, nega)
        return FlowMatchSFTLoss(self.pipe, **shared, **posi)

    @property
    def has_own_forward(self) -> bool:
        """Whether the subclass computes its loss itself, so that only eager differentiation fits."""
        return type(self).forward is not DiffusionTrainingModule.forward
