"""Adafactor: a second moment for each row and column of a matrix instead of each weight."""
from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, ops

from ms_diffsynth.ops.update import put, scaled
from ms_diffsynth.training.optim.contract import OptimizerCell, check

_each = ops.HyperMap()


class Adafactor(OptimizerCell):
    """Adafactor with float32 weights and a learning rate that is given.

        b = 1 - t^decay_rate,  row = b row + (1 - b) mean(g^2 + eps1, columns),  column: the same of rows
        u = g / sqrt(row column / mean(row)),  u /= max(1, rms(u) / clip_threshold)
        a = lr (with scale_parameter: times max(eps2, rms(p))),  p -= a wd p,  p -= a u

    A weight of one dimension has no rows and columns: its second moment is kept whole, v = b v + (1 - b) (g^2 + eps1)
    and u = g / sqrt(v). So has the one flat Parameter of a LoRA (`nn.adapters.flat`), in which no matrix can be seen;
    rms(u) and rms(p) are then those of the whole LoRA. Of more than two dimensions the last two are factored.

    With ``momentum`` above 0 the update is its moving average, which costs as much memory as a moment of AdamW.

    Args:
        parameters: what is trained; float32, with distinct names.
        learning_rate: the first learning rate; change it with `set_learning_rate`.

    Raises: TrainingError when there is nothing to train; ConfigError for values outside their range or weights that are
        not float32.
    Source: Shazeer and Stern 2018 (1804.04235), algorithms 4 and 5; transformers 4.57, optimization.Adafactor with
        relative_step=False, and its beta1 as ``momentum``.
    """

    def __init__(self, parameters: Sequence[Parameter], learning_rate: float = 1e-3,
                 eps: tuple[float, float] = (1e-30, 1e-3), clip_threshold: float = 1.0, decay_rate: float = -0.8,
                 momentum: float = 0.0, weight_decay: float = 0.0, scale_parameter: bool = False):
        parameters = list(parameters)
        check("Adafactor", parameters, learning_rate, weight_decay, [
            (not all(value >= 1e-30 and math.isfinite(value) for value in eps),
             f"eps={eps}: expected two numbers, at least 1e-30. Try (1e-30, 1e-3)."),
            (not clip_threshold > 0, f"clip_threshold={clip_threshold}: expected a number above 0. Try 1."),
            (not -1 <= decay_rate < 0, f"decay_rate={decay_rate}: expected -1 <= decay_rate < 0. Try -0.8."),
            (not 0 <= momentum < 1, f"momentum={momentum}: expected 0 <= momentum < 1. Try 0 for none, or 0.9."),
        ])
        super().__init__("adafactor", parameters, learning_rate)
        factored = [p for p in self.parameters if p.ndim >= 2]
        self.is_factored = tuple(p.ndim >= 2 for p in self.parameters)
        zeros = [("row", [(p, p.shape[:-1]) for p in factored]),
                 ("column", [(p, p.shape[:-2] + p.shape[-1:]) for p in factored]),
                 ("moment2", [(p, p.shape) for p in self.parameters if p.ndim < 2]),
                 ("moment1", [(p, p.shape) for p in self.parameters if momentum])]
        self.kept = {p.name: p for kind, shapes in zeros for p in (
            Parameter(Tensor(np.zeros(shape, np.float32)), name=f"{kind}.{q.name}", requires_grad=False)
            for q, shape in shapes)}
        # of each weight what it has, in one order: (row, column) or (moment2,), and moment1
        kinds = [("row", "column") if is_factored else ("moment2",) for is_factored in self.is_factored]
        self.moments = ParameterTuple([self.kept[f"{kind}.{p.name}"] for p, own in zip(self.parameters, kinds)
                                       for kind in own])
        self.moment1 = ParameterTuple([self.kept[f"moment1.{p.name}"] for p in self.parameters if momentum])
        self.decay_rate, self.clip_threshold, self.momentum = decay_rate, clip_threshold, momentum
        self.eps, self.weight_decay, self.is_scaled = eps, weight_decay, scale_parameter

    @classmethod
    def from_settings(cls, parameters: Sequence[Parameter], learning_rate: float, weight_decay: float, *,
                      eps1: float = 1e-30, eps2: float = 1e-3, clip_threshold: float = 1.0, decay_rate: float = -0.8,
                      momentum: float = 0.0, scale_parameter: bool = False) -> Adafactor:
        """For `build_optimizer`."""
        return cls(parameters, learning_rate, (eps1, eps2), clip_threshold, decay_rate, momentum, weight_decay,
                   scale_parameter)

    def construct(self, gradients, coefficient=None, is_finite=None):
        """See `contract.Optimizer`. Where a gradient is not finite, b becomes 1 and the learning rate 0."""
        is_finite = self.true if is_finite is None else is_finite
        coefficient = ops.select(is_finite, self.one if coefficient is None else coefficient, self.zero)
        step = self.step + 1
        new = ops.select(is_finite, ops.pow(step.astype(ms.float32), self.decay_rate), self.zero)  # 1 - b
        learning_rate = ops.select(is_finite, self.learning_rate, self.zero)
        updated, at = (), 0
        for k in range(len(self.is_factored)):
            parameter = self.parameters[k]
            gradient = scaled(gradients[k], coefficient, self.zero)
            square = gradient * gradient + self.eps[0]
            if self.is_factored[k]:
                row = self._mean(self.moments[at], mint.mean(square, -1), new)
                column = self._mean(self.moments[at + 1], mint.mean(square, -2), new)
                # before the first update both are 0
                root = mint.rsqrt(ops.select(is_finite, row / mint.mean(row, -1, keepdim=True), ops.ones_like(row)))
                other = mint.rsqrt(ops.select(is_finite, column, ops.ones_like(column)))
                update = mint.unsqueeze(root, -1) * mint.unsqueeze(other, -2) * gradient
                at = at + 2
            else:
                whole = self._mean(self.moments[at], square, new)
                update = mint.rsqrt(ops.select(is_finite, whole, ops.ones_like(whole))) * gradient
                at = at + 1
            rate = learning_rate
            if self.is_scaled:
                rate = rate * mint.clamp(_rms(parameter), min=self.eps[1])
            update = update / mint.clamp(_rms(update) / self.clip_threshold, min=1.0) * rate
            if self.momentum > 0:
                averaged = self.moment1[k] * self.momentum + update * (1 - self.momentum)
                put(self.moment1[k], ops.select(is_finite, averaged, self.moment1[k]))
                update = ops.select(is_finite, averaged, update)
            updated = updated + (put(parameter, parameter * (1 - rate * self.weight_decay) - update),)
        put(self.step, ops.select(is_finite, step, self.step))
        return updated

    def state_tensors(self) -> dict[str, Parameter]:
        """Rows and columns, whole second moments, first moments where there are any, and the step count, by name."""
        return self.kept | {self.step.name: self.step}

    def _mean(self, kept, value, new):
        value = kept * (1 - new) + value * new
        return ops.depend(value, put(kept, value))


def _rms(value):
    return mint.sqrt(mint.mean(value * value))
