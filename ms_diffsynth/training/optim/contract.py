"""What a training step, a checkpoint and a run ask of an optimizer: nothing else, and never its class.

An optimizer is called with the gradients, one coefficient and a flag: the coefficient joins unscaling and clipping, and
where the flag is False nothing changes. There is no branch in the graph: numbers become 0 or 1 so that what is computed
leaves everything as it was. (A weight of -0.0 may become 0.0.)

Values a compiled step reads are set with ``ops.assign``. ``Parameter.set_data`` replaces the memory, which on the CPU a
function compiled by ``ms.jit`` before goes on reading: the new value is silently ignored (MindSpore 2.10, 2026-11-21,
tests/training/test_optim.py shows it; on an Ascend it is seen).
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, TrainingError, listing
from ms_diffsynth.nn.names import load_state
from ms_diffsynth.training.zero import Exchange


class Optimizer(Protocol):
    """The contract. `OptimizerCell` has all of it but the update and the state.

    Attributes:
        parameters: what is trained. The gradients are of these, in this order.
        is_elementwise: whether each element's update depends on no other element, or only through sums over all: then
            the weights may be flattened, joined and divided among ranks. False where matrices are needed whole.
        exchange: what sums gradients over the ranks, when that is not to be the step's own; gradients then arrive as
            it gives them.
        sums_early: whether ``exchange`` is called at every micro-step, and not once per update.
        accumulated: what the accumulated gradients have the shapes of.
        is_divided: whether each rank keeps a part of the state. A checkpoint then takes `state_pieces` of all ranks
            instead of `state_tensors`, and `load_state_tensors` gets the whole arrays on every rank.
    """

    parameters: ParameterTuple
    is_elementwise: bool
    exchange: Exchange | None
    sums_early: bool
    accumulated: ParameterTuple
    is_divided: bool

    def __call__(self, gradients: tuple[Tensor, ...], coefficient: Tensor | None = None,
                 is_finite: Tensor | None = None) -> Any:
        """Update the weights with ``gradients`` times ``coefficient`` (None: 1), unless ``is_finite`` is False.

        Shapes: gradients tuple of float, as ``exchange`` gives them; coefficient float32 scalar; is_finite bool scalar.
        Compiled as part of the step: no branch on a value, no new Parameter.
        """

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the following updates; nothing is compiled again."""

    def take_weights(self) -> None:
        """Take the weights as they are now: something else than the optimizer has changed them."""

    def divide(self) -> None:
        """From now on the parameters are this rank's part of larger ones; called only where ``is_elementwise``."""

    def float32_weights(self) -> tuple[Tensor, ...] | None:
        """The weights before they are rounded to their dtype, of their shapes; None where they are not rounded."""

    def state_tensors(self) -> dict[str, Parameter]:
        """What a checkpoint must hold besides the weights, by name."""

    def state_pieces(self) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
        """With ``is_divided``: name -> this rank's elements of the flattened whole, and name -> shape of the whole."""

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore what `state_tensors` gave, in place, after the weights were restored.

        Args:
            state: gives arrays by name; the shapes are those of its ``shapes``, where it has them.

        Raises: WeightError for missing or superfluous names, or other shapes.
        """


class OptimizerCell(nn.Cell):
    """An optimizer of float32 weights, whole on every rank, with one learning rate. Subclasses implement ``construct``.

    `check` looks at what it is given. To be chosen by its name it has the class method ``from_settings(parameters,
    learning_rate, weight_decay, *, ...)``, whose further arguments are numbers, true or false, with defaults; and a
    line in `registry.OPTIMIZERS`.

    Args:
        name: of its own values in a checkpoint: ``NAME.step``.
        parameters: what is trained; float32, with distinct names.
        learning_rate: the first learning rate; change it with `set_learning_rate`.
    """

    is_elementwise, sums_early, is_divided = False, False, False
    exchange = None

    def __init__(self, name: str, parameters: Sequence[Parameter], learning_rate: float):
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.step = Parameter(Tensor(0, ms.int32), name=f"{name}.step", requires_grad=False)
        self.learning_rate = Parameter(Tensor(learning_rate, ms.float32), name=f"{name}.learning_rate",
                                       requires_grad=False)
        self.one, self.zero, self.true = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32), Tensor(True)

    @property
    def accumulated(self) -> ParameterTuple:
        """The parameters."""
        return self.parameters

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the following updates; nothing is compiled again."""
        ops.assign(self.learning_rate, runtime.to_device(np.float32(value)))

    def take_weights(self) -> None:
        """Nothing: no copy of the weights is kept."""

    def divide(self) -> None:
        """Nothing: no sum over all weights is needed."""

    def float32_weights(self) -> None:
        """None: the weights are not rounded."""
        return None

    def state_tensors(self) -> dict[str, Parameter]:
        """What a checkpoint must hold besides the weights, by name."""
        raise TypeError(f"{type(self).__name__} has no state_tensors(): implement it; return name -> Parameter.")

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore what `state_tensors` gave. Raises: WeightError for missing or superfluous names, or other shapes."""
        load_state(self.state_tensors(), state)


def check(name: str, parameters: Sequence[Parameter], learning_rate: float, weight_decay: float,
          others: Sequence[tuple[bool, str]] = ()) -> None:
    """What every optimizer needs of its parameters and of its numbers.

    Args:
        others: (is it wrong, what to say) for what only this one has.

    Raises: TrainingError when there is nothing to train; ConfigError listing all values outside their range, and
        weights that are not float32.
    """
    if not parameters:
        raise TrainingError(f"{name} was given no parameters: expected at least one. Name what is to be trained "
                            "(lora_base_model or trainable_models).")
    wrong = []
    if not (learning_rate >= 0 and math.isfinite(learning_rate)):
        wrong.append(f"learning_rate={learning_rate}: expected a finite number, at least 0. Try 1e-4.")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        wrong.append(f"weight_decay={weight_decay}: expected a finite number, at least 0. Try 1e-2.")
    wrong += [text for condition, text in others if condition]
    rounded = [f"{p.name} ({p.dtype})" for p in parameters if p.dtype != ms.float32]
    if rounded:
        wrong.append(f"weights that are not float32: {listing(rounded)}. Keep what is trained in float32; the forward "
                     "pass may cast it.")
    if wrong:
        raise ConfigError("\n".join(wrong))


def moment_problems(betas: tuple[float, ...], eps: float) -> list[tuple[bool, str]]:
    """For `check`: decays of moments, and what is added to a root."""
    return [(not all(0 <= beta <= 0.99999 for beta in betas),
             f"betas={betas}: expected numbers from 0 to 0.99999. Try (0.9, 0.999)."),
            # float32 could not divide by less where a gradient is 0
            (not (eps >= 1e-30 and math.isfinite(eps)), f"eps={eps}: expected at least 1e-30. Try 1e-8.")]


def corrections(beta1: float, beta2: float) -> tuple[np.ndarray, np.ndarray]:
    """Tables of sqrt(c2) / c1 and sqrt(c2) for t = 0, 1, ... until both are 1 in float32; entry 0 is not used.

    c = 1 - b^t. A table, because in float32 neither a power nor a product keeps 1 - b^t (0.001 at t = 1) to better than
    1e-5.
    """
    steps = 2 + max(int(math.log(2.0**-26) / math.log(beta)) if beta > 0 else 0 for beta in (beta1, beta2))
    t = np.arange(1, steps + 1, dtype=np.float64)
    c1, c2 = (1 - beta**t for beta in (beta1, beta2))
    rates, roots = np.sqrt(c2) / c1, np.sqrt(c2)
    return np.append(1, rates).astype(np.float32), np.append(1, roots).astype(np.float32)
