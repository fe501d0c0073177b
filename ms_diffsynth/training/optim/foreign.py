"""Any optimizer of MindSpore or of mindone, under the contract."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ms_diffsynth.errors import ConfigError, TrainingError
from ms_diffsynth.nn.names import load_state
from ms_diffsynth.ops.update import put, scaled
from ms_diffsynth.training.optim.contract import Optimizer

_each = ops.HyperMap()


class Guarded(nn.Cell):
    """An optimizer that takes gradients alone, under the contract: where ``is_finite`` is False, nothing changes.

    That is ``mindspore.nn.Optimizer``, ``mindspore.experimental.optim`` and ``mindspore.mint.optim``, with any learning
    rate they take: one number, a list, a schedule, parameter groups. A schedule counts the updates that were made.

    The optimizer knows no such flag, so everything it holds (weights, moments, counters) is copied before the update
    or put back after it: one more copy in memory, and time (nn.AdamWeightDecay with 10M weights on the CPU takes 400 ms
    instead of 60; `AdamW`, which needs no copy, 40).
    """

    is_elementwise, sums_early, is_divided = False, False, False  # what its update needs is not known
    exchange = None

    def __init__(self, optimizer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.parameters = ParameterTuple(optimizer.parameters)
        self.everything = ParameterTuple(optimizer.get_parameters())
        self.one, self.zero, self.true = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32), Tensor(True)

    @property
    def accumulated(self) -> ParameterTuple:
        """The parameters."""
        return self.parameters

    def construct(self, gradients, coefficient=None, is_finite=None):
        """See `contract.Optimizer`; returns what the optimizer returns."""
        is_finite = self.true if is_finite is None else is_finite
        coefficient = ops.select(is_finite, self.one if coefficient is None else coefficient, self.zero)
        before = _each(ops.deepcopy, self.everything)  # a plain reference would show the updated values
        updated = self.optimizer(_each(ops.partial(_scaled, coefficient, self.zero), gradients))
        _each(ops.partial(_keep, is_finite), before, self.everything)
        return updated

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate. Raises: ConfigError when the optimizer computes its own or has several."""
        own = getattr(self.optimizer, "learning_rate", None)
        rates = getattr(self.optimizer, "lrs", [own])  # experimental.optim: one of each group
        if len(rates) != 1 or not isinstance(rates[0], Parameter) or rates[0].ndim != 0:
            kind = f"{len(rates)} groups" if own is None else type(own).__name__
            raise ConfigError(f"{type(self.optimizer).__name__} has a learning rate of its own ({kind}): expected one "
                              "number. Build it with a constant learning_rate, or train with lr_scheduler=constant.")
        ops.assign(rates[0], Tensor(value, rates[0].dtype))

    def take_weights(self) -> None:
        """Nothing: MindSpore's optimizers keep no copy of the weights."""

    def divide(self) -> None:
        """Never called: it is not known to be element-wise."""

    def float32_weights(self) -> None:
        """None: what is rounded is not known."""
        return None

    def state_tensors(self) -> dict[str, Parameter]:
        """What a checkpoint must hold besides the weights, by name."""
        weights = {p.name for p in self.parameters}
        return {p.name: p for p in self.everything if p.name not in weights}

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore what `state_tensors` gave. Raises: WeightError for missing or superfluous names, or other shapes."""
        load_state(self.state_tensors(), state)


MEMBERS = ("set_learning_rate", "take_weights", "divide", "float32_weights", "state_tensors", "load_state_tensors",
           "exchange", "is_elementwise", "sums_early", "accumulated", "is_divided")


def guarded(optimizer: Any) -> Optimizer:
    """The optimizer itself when it fulfils the contract; one that takes gradients alone, wrapped.

    Raises: TrainingError for what fulfils a part of the contract.
    """
    missing = [name for name in MEMBERS if not hasattr(optimizer, name)]
    if not missing:
        return optimizer
    if hasattr(optimizer, "state_tensors"):
        raise TrainingError(f"{type(optimizer).__name__} has no {', '.join(missing)}: expected all of "
                            "contract.Optimizer. Derive it from OptimizerCell, which has them.")
    return Guarded(optimizer)


def _scaled(coefficient, zero, gradient):
    return scaled(gradient, coefficient, zero)


def _keep(is_finite, before, parameter):
    return put(parameter, ops.select(is_finite, parameter, before))
