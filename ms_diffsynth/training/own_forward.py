"""A module's own ``forward``, compiled: the units it runs prepare one row, and what `FlowMatchSFTLoss` is called with
crosses to a compiled step. The documents' script is of this kind: units one by one, then the loss. What the units make
of equal inputs is remembered, so that an image and a prompt are encoded once.
"""
from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth.data.loader import collate
from ms_diffsynth.diffusion.units import SampleLatents
from ms_diffsynth.errors import TrainingError, UserError
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.pipeline import UnitRunner, pad_prompts
from ms_diffsynth.program import Cut, Program, slot
from ms_diffsynth.training.losses import RecordedLoss
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.units import run_unit

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
        self.remembered = Remembered()
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
        runner, pipe.records_loss = pipe.unit_runner, True
        if type(runner) is UnitRunner:
            pipe.unit_runner = UnitRunner(self.remembered)
        try:
            return self.module.forward(data)
        finally:
            pipe.unit_runner, pipe.records_loss = runner, False


class Remembered:
    """Runs units, those of this package once for the same inputs: they are functions of what they read. A unit of
    someone else's runs every time.

    Args:
        limit_bytes: of what is kept; what was not used for longest goes first.
    """

    def __init__(self, limit_bytes: int = 4 << 30):
        self.limit_bytes, self.kept_bytes = limit_bytes, 0
        self._kept: OrderedDict[tuple, dict[str, Any]] = OrderedDict()
        self._made: dict[int, tuple] = {}  # id of a Tensor that is kept -> what it was made of

    def __call__(self, unit: Any, pipe: Any, slots: dict[str, Any]) -> dict[str, Any]:
        """As `units.run_unit`."""
        if not type(unit).__module__.startswith("ms_diffsynth."):
            return run_unit(unit, pipe, slots)
        try:
            key = (id(unit), *[self._key(slots.get(slot(param))) for param in unit.input_params])
        except _Unknown:
            return run_unit(unit, pipe, slots)
        if key in self._kept:
            self._kept.move_to_end(key)
            return dict(self._kept[key])
        outputs = run_unit(unit, pipe, slots)
        self._kept[key] = dict(outputs)
        for name, tensor in outputs.items():
            if isinstance(tensor, Tensor):
                self._made.setdefault(id(tensor), (key, name))
                self.kept_bytes += tensor.nbytes
        while self.kept_bytes > self.limit_bytes and len(self._kept) > 1:
            for tensor in self._kept.popitem(last=False)[1].values():
                if isinstance(tensor, Tensor):
                    self._made.pop(id(tensor), None)
                    self.kept_bytes -= tensor.nbytes
        return outputs

    def _key(self, value: Any) -> Any:
        """What is equal for equal values, and hashable. Raises: _Unknown."""
        if value is None or isinstance(value, (str, int, float, bool)):
            return type(value).__name__, value
        if isinstance(value, Tensor):
            return self._made.get(id(value)) or self._key(to_numpy(value))
        if isinstance(value, Image.Image):
            return value.mode, value.size, hashlib.blake2b(value.tobytes()).digest()
        if isinstance(value, np.ndarray) and value.dtype != object:
            return str(value.dtype), value.shape, hashlib.blake2b(np.ascontiguousarray(value).tobytes()).digest()
        if isinstance(value, (list, tuple)):
            return tuple(self._key(item) for item in value)
        if isinstance(value, dict):
            return tuple((name, self._key(item)) for name, item in value.items())
        raise _Unknown


class _Unknown(Exception):
    """A value that may be equal to another one without showing it."""


class NotCompilable(Exception):
    """Why a forward must be differentiated as it stands."""
