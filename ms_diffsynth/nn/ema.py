"""An exponential moving average of trained weights: less noise in them, better samples."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ms_diffsynth.errors import ConfigError
from ms_diffsynth.nn.names import load_state, to_numpy
from ms_diffsynth.ops.update import put

_each = ops.HyperMap()


class EMA(nn.Cell):
    """The average a of weights p after t = 0, 1, ... updates, called in the step right after the optimizer.

        a += max(1 - decay, w(t)) (p - a),  w(0) = 1,  w(t) = 9 / (10 + t)

    The second term is the warm-up: the decay (1 + t) / (10 + t), and none at the first update, so that the weights
    before training are forgotten at once.

    What is averaged of a network trained in a shorter dtype are its float32 values, where an optimizer holds them: the
    rounded ones stand still while these move.

    Args:
        parameters: what is averaged, distinct names. decay: after the warm-up; 0 <= decay < 1.

    Raises: ConfigError for another decay.
    Source: diffusers 0.42, training_utils.EMAModel with its default warm-up.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float = 0.9999):
        super().__init__(auto_prefix=False)
        if not 0 <= decay < 1:
            raise ConfigError(f"ema_decay={decay}: expected 0 <= ema_decay < 1. Typical values are 0.999 and 0.9999.")
        self.parameters = ParameterTuple(parameters)
        # not clone(..., "same"): of weights that were loaded it takes what they were initialised with (MindSpore 2.10)
        self.average = ParameterTuple([Parameter(Tensor(to_numpy(p).astype(np.float32)), name=f"ema.{p.name}",
                                                 requires_grad=False) for p in self.parameters])
        self.step = Parameter(Tensor(0, ms.int32), name="ema.step", requires_grad=False)
        self.least, self.zero, self.one = (Tensor(value, ms.float32) for value in (1 - decay, 0.0, 1.0))

    def construct(self, is_finite, weights=None):
        """Follow ``weights`` (None: the parameters themselves), unless ``is_finite`` (a bool scalar) is False."""
        step = self.step.astype(ms.float32)
        warm_up = ops.select(self.step == 0, self.one, 9.0 / (10.0 + step))
        rate = ops.select(is_finite, ops.maximum(self.least, warm_up), self.zero)
        followed = _each(ops.partial(_follow, rate), self.average, self.parameters if weights is None else weights)
        put(self.step, ops.select(is_finite, self.step + 1, self.step + 0))
        return followed

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are the averaged ones inside the block, and afterwards what they were, bit for bit."""
        kept = [to_numpy(p) for p in self.parameters]
        for parameter, average in zip(self.parameters, self.average):
            ops.assign(parameter, average.astype(parameter.dtype))
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, kept):
                ops.assign(parameter, Tensor(value, parameter.dtype))

    def state_tensors(self) -> dict[str, Parameter]:
        """What a checkpoint must hold, by name: the averages and the count of updates."""
        return {p.name: p for p in (*self.average, self.step)}

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore what `state_tensors` gave. Raises: WeightError for missing or superfluous names, or other shapes."""
        load_state(self.state_tensors(), state)


def _follow(rate, average, parameter):
    return put(average, average + rate * (parameter.astype(average.dtype) - average))
