"""What is trained: a pipeline, an objective, and which of its weights learn."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, DataError, TrainingError, listing, nearest
from ms_diffsynth.io.lora_files import load_lora, save_lora
from ms_diffsynth.io.weights import save_state_dict
from ms_diffsynth.nn.lora import Uniform, inject_lora, lora_modules, lora_pairs, lora_parameters, set_lora
from ms_diffsynth.nn.names import to_numpy, torch_parameters
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.program import Cut
from ms_diffsynth.train.losses import FlowMatchSFTLoss


class DiffusionTrainingModule:
    """Base of training modules: set ``self.pipe`` and call `switch_pipe_to_training_mode`.

    A subclass that leaves ``forward`` alone trains through the compiled step, with the half of the pipeline that does
    not change prepared once. A subclass with a ``forward(data) -> loss`` of its own (the documents' way) is
    differentiated as it stands, eagerly.

    Attributes:
        fuse: units pulled into the compiled step although they could be prepared (``("encode_image",)`` puts the VAE
            there).
    """

    pipe: Pipeline
    fuse: Sequence[str] = ()

    def __init__(self):
        self.trainable: tuple[str, ...] = ()
        self.task = "sft"

    # -- set up --------------------------------------------------------------------------------------------------

    def switch_pipe_to_training_mode(self, pipe: Pipeline, trainable_models: str | None = None,
                                     lora_base_model: str | None = None, lora_target_modules: str | Sequence[str] = "",
                                     lora_rank: int = 32, lora_alpha: float | None = None,
                                     lora_checkpoint: str | Path | None = None, task: str = "sft",
                                     objective: Objective | None = None, lora_uniform: Uniform | None = None) -> None:
        """Freeze everything, then make trainable what is named.

        Args:
            trainable_models: comma-separated models or dotted sub-modules to train whole (``"dit"``).
            lora_base_model: the model that gets a LoRA; its own weights stay frozen.
            lora_target_modules: names, or ends of names, of its linear layers; empty takes the family's choice.
            lora_checkpoint: a LoRA file to go on from.
            objective: what is minimised; None means DiffSynth-Studio's supervised objective.

        Raises: ConfigError for names that are not there, for nothing to train, or for a model to be trained both ways.
        """
        self.task, kind = task, task.split(":")[0]
        names = [n.strip() for n in (trainable_models or "").split(",") if n.strip()]
        if not names and not lora_base_model:
            raise ConfigError("nothing would be trained: set lora_base_model or trainable_models, e.g. to dit.")
        for name in [*names, *([lora_base_model] if lora_base_model else [])]:
            root = name.split(".")[0]
            if root not in pipe.model_names or root.startswith("tokenizer"):
                raise ConfigError(f"'{name}' cannot be trained: {type(pipe).__name__} has the models "
                                  f"{listing(n for n in pipe.model_names if not n.startswith('tokenizer'))}."
                                  f"{nearest(root, pipe.model_names)}")
        if lora_base_model in names:
            raise ConfigError(f"'{lora_base_model}' is in trainable_models and is lora_base_model: expected one of the "
                              "two. Train it whole, or train a LoRA on it.")
        for model in pipe.models.values():
            if isinstance(model, nn.Cell):
                for parameter in model.get_parameters():
                    parameter.requires_grad = False
        pipe.forget_compiled()  # what was compiled before has no LoRA in it
        pipe.objective = objective or Objective(weighting_scheme="diffsynth")
        pipe.sigmas = pipe.training_schedule(kind).sigmas
        if lora_base_model:
            targets = lora_target_modules.split(",") if isinstance(lora_target_modules, str) else lora_target_modules
            targets = [t for t in targets if t] or pipe.lora_target_modules
            model = getattr(pipe, lora_base_model)
            inject_lora(model, targets, lora_rank, lora_alpha, lora_uniform)
            if lora_checkpoint:
                self._resume_lora(model, lora_checkpoint)
        for name in names:
            for parameter in self._parameters_under(pipe, name):
                parameter.requires_grad = True
        self.lora_base_model = lora_base_model
        self.trainable = (*names, *([lora_base_model] if lora_base_model else []))

    def _resume_lora(self, model: Any, path: str | Path) -> None:
        cells = lora_modules(model)
        loaded = load_lora(path, modules=list(cells))
        # a file's scale is folded into B; ours is alpha / rank, applied at run time
        set_lora(model, {n: (a, b * (scale / cells[n].scale) if n in cells else b)
                         for n, (a, b, scale) in loaded.items()})

    @staticmethod
    def _parameters_under(pipe: Pipeline, name: str) -> list[Parameter]:
        root, _, inner = name.partition(".")
        found = {n: p for n, p in torch_parameters(getattr(pipe, root)).items()
                 if not inner or n == inner or n.startswith(inner + ".")}
        if not found:
            tops = sorted({n.split(".")[0] for n in torch_parameters(getattr(pipe, root))})
            raise ConfigError(f"trainable_models='{name}' names no weights: '{root}' has {listing(tops)}."
                              f"{nearest(inner, tops)}")
        return list(found.values())

    # -- what is trained -----------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[Parameter]:
        """Every parameter that learns, once, in a fixed order."""
        found: dict[int, Parameter] = {}
        for name in self.trainable:
            if name == self.lora_base_model:
                parameters = lora_parameters(getattr(self.pipe, name))
            else:
                parameters = self._parameters_under(self.pipe, name)
            found.update((id(p), p) for p in parameters if p.requires_grad)
        if not found:
            raise TrainingError("no parameter is trainable: call switch_pipe_to_training_mode first.")
        return list(found.values())

    def training_cut(self) -> Cut:
        """The training program of the pipeline, cut for what is trained."""
        program = self.pipe.training_program(self.pipe.objective, self.pipe.sigmas)
        return program.cut(("loss", "sample_losses"), self.trainable, ("sample_latents", *self.fuse))

    def export_trainable_state_dict(self, remove_prefix: str | None = None) -> dict[str, np.ndarray]:
        """Trained weights by name, ``pipe.<model>.<weight>`` with ``remove_prefix`` taken off."""
        ids = {id(p) for p in self.trainable_parameters()}
        state = {}
        for root in dict.fromkeys(name.split(".")[0] for name in self.trainable):
            for name, parameter in torch_parameters(getattr(self.pipe, root)).items():
                if id(parameter) in ids:
                    state[f"pipe.{root}.{name}".removeprefix(remove_prefix or "")] = to_numpy(parameter)
        return state

    def save(self, path: Path, remove_prefix: str | None = None, metadata: dict[str, str] | None = None) -> None:
        """Write what was trained: a LoRA in diffusers naming, or weights by name. Never half a file."""
        if self.lora_base_model and set(self.trainable) == {self.lora_base_model}:
            model = getattr(self.pipe, self.lora_base_model)
            alpha = next(cell.scale * cell.lora_A.shape[0] for cell in lora_modules(model).values())
            prefix = self.pipe.lora_prefixes.get(self.lora_base_model, self.lora_base_model)
            save_lora(path, lora_pairs(model), alpha=alpha, prefix=prefix, metadata=metadata or {})
        else:
            save_state_dict(path, self.export_trainable_state_dict(remove_prefix), metadata)

    # -- from data to loss ---------------------------------------------------------------------------------------

    def get_pipeline_inputs(self, data: dict[str, Any]) -> tuple[dict, dict, dict]:
        """A row of the data set as the documents' three dictionaries.

        Raises: DataError for a row without a picture or a prompt.
        """
        lost = [name for name in ("image", "prompt") if data.get(name) is None]
        if lost:
            raise DataError(f"a row has no {' and no '.join(map(repr, lost))}: it has {listing(sorted(data))}. "
                            "Expected the columns 'image' and 'prompt'; rename yours, or override get_pipeline_inputs.")
        shared = {"input_image": data["image"], "height": data["image"].size[1], "width": data["image"].size[0],
                  "cfg_scale": 1}
        return shared, {"prompt": data["prompt"]}, {"negative_prompt": ""}

    def prepare(self, data: dict[str, Any], cut: Cut) -> dict[str, np.ndarray]:
        """Run the prepared half on one row: the slots that cross the cut, each without its batch axis."""
        shared, posi, _ = self.get_pipeline_inputs(data)
        slots = self.pipe.run(cut.prepare, {k: v for k, v in (shared | posi).items() if k in cut.inputs})
        return {name: to_numpy(slots[name])[0] for name in cut.cache}

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
