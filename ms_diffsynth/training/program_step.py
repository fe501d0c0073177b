"""The training step of a program's cut, and of a module that computes its loss itself."""
from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ms_diffsynth.pipeline import UnitSequence
from ms_diffsynth.program import Cut
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.step import StepResult, TrainStep


def _trained(module: DiffusionTrainingModule) -> nn.CellList:
    """The models that learn, as one cell. In evaluation mode: T5's dropout would be a draw inside the step."""
    roots = dict.fromkeys(name.split(".")[0] for name in module.trainable)
    return nn.CellList([getattr(module.pipe, root) for root in roots], auto_prefix=False)


class ProgramTrainStep(TrainStep):
    """Train on the compiled half of a cut. Inputs: the cut's cache slots, then its draws, in the cut's order.

    Args:
        module: its pipeline, and which of its models learn.
        cut: from ``module.training_cut()``; writes ``loss`` and ``sample_losses``.
        optimizer, options: see `TrainStep`.
    """

    def __init__(self, module: DiffusionTrainingModule, cut: Cut, optimizer: nn.Cell, **options: Any):
        super().__init__(_trained(module), optimizer, **options)
        self.model.set_train(False)
        self.sequence = UnitSequence(cut, module.pipe)

    def forward(self, *inputs):
        return self.sequence(inputs)


class ModuleTrainStep(TrainStep):
    """Train on ``module.forward(row)``, differentiated eagerly: the documents' scripts, which see Python objects.

    ``step_rows(rows, begin)`` averages the loss over a batch of rows; ``begin(k)`` is called before row ``k``. With
    prior preservation the second half of the rows are class images, and their mean is weighted.
    """

    def __init__(self, module: DiffusionTrainingModule, optimizer: nn.Cell, **options: Any):
        super().__init__(_trained(module), optimizer, mode="pynative", **options)
        self.model.set_train(False)
        self.module = module

    def step_rows(self, rows: list[dict[str, Any]], begin: Any) -> StepResult:
        """One micro-step or update on a batch of raw rows."""
        self._rows, self._begin = rows, begin
        return self.step(Tensor(np.float32(len(rows))))

    def forward(self, count):
        losses = []
        for k, row in enumerate(self._rows):
            self._begin(k)
            losses.append(self.module.forward(row).astype(ms.float32))
        weight = self.module.pipe.objective.prior_loss_weight
        if weight is None:
            return sum(losses[1:], losses[0]) / count
        half = len(losses) // 2
        instances, images = losses[:half], losses[half:]
        return (sum(instances[1:], instances[0]) + weight * sum(images[1:], images[0])) / (count / 2)
