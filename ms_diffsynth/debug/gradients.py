"""Gradients of a program's step, without an optimizer."""
from __future__ import annotations

import mindspore as ms
from mindspore import nn

from ms_diffsynth.pipeline import UnitSequence


class Gradients(nn.Cell):
    """Outputs of a sequence followed by the gradients of the first one."""

    def __init__(self, sequence: UnitSequence, parameters: list):
        super().__init__(auto_prefix=False)
        self.value_and_grad = ms.value_and_grad(sequence, None, tuple(parameters), has_aux=True)

    def run(self, *inputs):
        values, gradients = self.value_and_grad(inputs)
        return values + gradients
