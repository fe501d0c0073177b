"""A module's own ``forward``, compiled: the units it runs prepare one row, and what `FlowMatchSFTLoss` is called with
crosses to a compiled step. The documents' script is of this kind: units one by one, then the loss.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ms_diffsynth.data.loader import collate
from ms_diffsynth.diffusion.units import SampleLatents
from ms_diffsynth.errors import TrainingError, UserError
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.pipeline import pad_prompts
from ms_diffsynth.program import Cut, Program
from ms_diffsynth.training.losses import RecordedLoss
from ms_diffsynth.training.module import DiffusionTrainingModule

PRICE = ("every step calls its operations one by one, which takes many times as long. To have it compiled, return what "
         "FlowMatchSFTLoss returns as it is, or leave forward out and override get_pipeline_inputs")


class OwnForward:
    """The step of a module with its own ``forward``: the units of the loss, on the slots that the forward gave it.

    Args:
        module: its ``forward`` is called with one row at a time, and no gradient.
        data: the first row.

    Attributes:
        cut: what is compiled; its cache are the slots that it reads.

    Raises: `NotCompilable` with the reason why it must be differentiated as it stands.
    """

    def __init__(self, module: DiffusionTrainingModule, data: dict[str, Any]):
        self.module, pipe = module, module.pipe
        in_units = {name for unit in pipe.units for name in unit.onload_model_names}
        if trained := [name for name in module.trainable if name.split(".")[0] in in_units]:
            raise NotCompilable(f"{', '.join(trained)} learns in the units that it runs")
        try:
            loss = self._record(data)
        except UserError:
            raise
        except Exception as error:  # of code that is not ours: it computes with the loss, which has no value yet
            raise NotCompilable(f"it needs the value of the loss ({type(error).__name__}: {error})") from error
        if not isinstance(loss, RecordedLoss):
            raise NotCompilable("its loss is not that of FlowMatchSFTLoss alone")
        objective, names = pipe.objective, set(loss.slots)
        units = objective.units(pipe, pipe.sigmas)
        if objective.posterior == "sample":
            names -= {"input_latents"}
            units = [SampleLatents("sample"), *units]
        program = Program(units, tuple(sorted(names - set(objective.draws))), objective.draws)
        outputs = ("loss", "sample_losses")
        beforehand = [unit.name for unit in program.cut(outputs, module.trainable).prepare]
        self.cut: Cut = program.cut(outputs, module.trainable, beforehand)

    def slots(self, rows: Sequence[dict[str, Any]], randoms: Sequence[Any]) -> dict[str, np.ndarray]:
        """What the cut reads of a batch of rows, each with random numbers of its own."""
        pipe, found = self.module.pipe, []
        for data, random in zip(rows, randoms):
            kept, pipe.random = pipe.random, random
            try:
                loss = self._record(data)
            finally:
                pipe.random = kept
            if not isinstance(loss, RecordedLoss):
                raise TrainingError(f"{type(self.module).__name__}.forward returned the loss of FlowMatchSFTLoss for "
                                    "the first row, and something else for another one. Expected the same for every "
                                    "row: use mode pynative, which differentiates forward as it stands.")
            found.append({name: to_numpy(loss.slots[name])[0, ...] for name in self.cut.cache})
        longest = max((pad_prompts(pipe, slots)[1] or 0) for slots in found)
        return collate([pad_prompts(pipe, slots, longest)[0] for slots in found])

    def latent_shape(self, slots: dict[str, np.ndarray]) -> tuple[int, ...]:
        """Shape of one sample's latents, which the draws have."""
        if "input_latents" in slots:
            return slots["input_latents"].shape[1:]
        channels, *sides = slots["moments"].shape[1:]
        return (channels // 2, *sides)

    def _record(self, data: dict[str, Any]) -> Any:
        pipe = self.module.pipe
        pipe.records_loss = True
        try:
            return self.module.forward(data)
        finally:
            pipe.records_loss = False


class NotCompilable(Exception):
    """Why a forward must be differentiated as it stands."""
