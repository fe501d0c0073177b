"""AdamW, guarded against gradients that are not finite, for compiled and eager steps; learning rates.

An optimizer here is called with the gradients, one coefficient and a flag: the coefficient joins unscaling and
clipping, and where the flag is False nothing changes. There is no branch in the graph: the coefficient, the learning
rate and the decay become 0 and both betas 1, which leaves weights, moments and step count as they were. (A weight of
-0.0 may become 0.0.) `guarded` gives any ``mindspore.nn.Optimizer`` the same call.

Values a compiled step reads are set with ``ops.assign``. ``Parameter.set_data`` replaces the memory, which on the CPU a
function compiled by ``ms.jit`` before goes on reading: the new value is silently ignored (MindSpore 2.10, 2026-11-21,
tests/train/test_optim.py shows it; on an Ascend it is seen).
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, nn, ops
from mindspore.ops import operations as P

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, TrainingError, listing, nearest
from ms_diffsynth.nn.names import load_state
from ms_diffsynth.ops.update import adamw, put

SCHEDULES = ("constant", "linear", "cosine")

_each = ops.HyperMap()
_scale = P.MulNoNan()  # x * y, and 0 where y is 0 even if x is NaN or infinite; as fast as a product


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of every optimizer step, computed on the host.

    Rises linearly from 0 over ``warmup_steps``, then stays (``constant``), falls linearly to 0 (``linear``) or as half
    a cosine (``cosine``) until ``total_steps``; 0 after that.

    Raises: ConfigError for an unknown schedule or impossible numbers of steps.
    Source: diffusers 0.39, optimization.py, get_scheduler; step k of there is step k here, counted from 0. With a
    warm-up the first update therefore has learning rate 0.
    """

    schedule: str = "constant"
    base: float = 1e-4
    warmup_steps: int = 0
    total_steps: int = 0

    def __post_init__(self):
        wrong = []
        if self.schedule not in SCHEDULES:
            wrong.append(f"lr_scheduler='{self.schedule}': expected one of {', '.join(SCHEDULES)}."
                         f"{nearest(self.schedule, SCHEDULES)}")
        if not (self.base >= 0 and math.isfinite(self.base)):
            wrong.append(f"learning_rate={self.base}: expected a finite number, at least 0. Try 1e-4.")
        if self.warmup_steps < 0:
            wrong.append(f"lr_warmup_steps={self.warmup_steps}: expected at least 0.")
        elif self.schedule in SCHEDULES[1:] and self.total_steps <= self.warmup_steps:
            wrong.append(f"total steps={self.total_steps}: expected more than lr_warmup_steps={self.warmup_steps} for "
                         f"lr_scheduler={self.schedule}. Train longer or warm up for fewer steps.")
        if wrong:
            raise ConfigError("\n".join(wrong))

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        if self.schedule == "constant":
            return self.base
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.base * (1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


class AdamW(nn.Cell):
    """AdamW with float32 weights and moments, called as ``optimizer(gradients, coefficient, is_finite)``.

        m += (1 - b1) (g - m),  v += (1 - b2) (g^2 - v),  p -= lr wd p,  p -= lr / c1 * m / (sqrt(v / c2) + eps)

    with c1 = 1 - b1^t, c2 = 1 - b2^t. The fused kernel knows no c2 inside the root, so it is given lr sqrt(c2) / c1 and
    eps sqrt(c2), which is the same.

    Args:
        parameters: what is trained; float32, with distinct names.
        learning_rate: the first learning rate; change it with `set_learning_rate`.
    Raises: TrainingError when there is nothing to train; ConfigError for values outside their range or weights that are
        not float32.
    Source: Loshchilov and Hutter 2019 (1711.05101), algorithm 2; torch.optim.AdamW 2.13, which it follows to 1e-6
        in weights of size 1 over 100 steps.
    """

    def __init__(self, parameters: Sequence[Parameter], learning_rate: float = 1e-4,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2):
        super().__init__(auto_prefix=False)
        parameters = list(parameters)
        _check(parameters, learning_rate, betas, eps, weight_decay)
        self.parameters = ParameterTuple(parameters)
        self.moment1 = self.parameters.clone("moment1", "zeros")
        self.moment2 = self.parameters.clone("moment2", "zeros")
        self.step = Parameter(Tensor(0, ms.int32), name="adamw.step", requires_grad=False)
        self.learning_rate = Parameter(Tensor(learning_rate, ms.float32), name="adamw.learning_rate",
                                       requires_grad=False)
        self.beta1, self.beta2 = Tensor(betas[0], ms.float32), Tensor(betas[1], ms.float32)
        self.eps, self.weight_decay = eps, weight_decay
        rates, roots = _corrections(*betas)
        self.rates, self.roots = Tensor(rates), Tensor(roots)
        self.last = len(rates) - 1
        self.one, self.zero, self.true = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32), Tensor(True)

    def construct(self, gradients, coefficient=None, is_finite=None):
        """Update the weights with ``gradients`` times ``coefficient`` (None: 1), unless ``is_finite`` is False.

        Shapes: gradients tuple of float, in the order of ``parameters``; coefficient float32 scalar; is_finite bool.
        """
        is_finite = self.true if is_finite is None else is_finite
        coefficient = ops.select(is_finite, self.one if coefficient is None else coefficient, self.zero)
        step = self.step + 1
        index = ops.minimum(step, self.last).reshape((1,))
        learning_rate = ops.select(is_finite, self.learning_rate, self.zero)
        rate = learning_rate * mint.index_select(self.rates, 0, index).reshape(())
        eps = self.eps * mint.index_select(self.roots, 0, index).reshape(())
        beta1, beta2 = ops.select(is_finite, self.beta1, self.one), ops.select(is_finite, self.beta2, self.one)
        decay = learning_rate * self.weight_decay
        updated = _each(ops.partial(adamw, coefficient, rate, decay, beta1, beta2, eps, self.zero),
                        self.parameters, self.moment1, self.moment2, gradients)
        put(self.step, ops.select(is_finite, step, self.step))
        return updated

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the following updates; nothing is compiled again."""
        ops.assign(self.learning_rate, runtime.to_device(np.float32(value)))

    def state_tensors(self) -> dict[str, Parameter]:
        """What a checkpoint must hold besides the weights, by name: both moments and the step count."""
        return {p.name: p for p in (*self.moment1, *self.moment2, self.step)}

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore what `state_tensors` gave. Raises: WeightError for missing or superfluous names, or other shapes."""
        load_state(self.state_tensors(), state)


class Guarded(nn.Cell):
    """Any ``mindspore.nn.Optimizer``, called like `AdamW`: where ``is_finite`` is False, nothing changes.

    The optimizer knows no such flag, so everything it holds (weights, moments, counters) is copied before the update
    or put back after it: one more copy in memory, and time (nn.AdamWeightDecay with 10M weights on the CPU takes 400 ms
    instead of 60; `AdamW`, which needs no copy, 40).
    """

    def __init__(self, optimizer: nn.Optimizer):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.parameters = ParameterTuple(optimizer.parameters)
        self.everything = ParameterTuple(optimizer.get_parameters())
        self.learning_rate = optimizer.learning_rate
        self.one, self.zero, self.true = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32), Tensor(True)

    def construct(self, gradients, coefficient=None, is_finite=None):
        """As `AdamW.construct`; returns what the optimizer returns."""
        is_finite = self.true if is_finite is None else is_finite
        coefficient = ops.select(is_finite, self.one if coefficient is None else coefficient, self.zero)
        before = _each(ops.deepcopy, self.everything)  # a plain reference would show the updated values
        updated = self.optimizer(_each(ops.partial(_scaled, coefficient), gradients))
        _each(ops.partial(_keep, is_finite), before, self.everything)
        return updated

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate. Raises: ConfigError when the optimizer computes its own or has several."""
        if not isinstance(self.learning_rate, Parameter) or self.learning_rate.ndim != 0:
            raise ConfigError(f"{type(self.optimizer).__name__} has a learning rate of its own "
                              f"({type(self.learning_rate).__name__}): expected one number. Build it with a constant "
                              "learning_rate, or train with lr_scheduler=constant.")
        ops.assign(self.learning_rate, Tensor(value, self.learning_rate.dtype))

    def state_tensors(self) -> dict[str, Parameter]:
        """What a checkpoint must hold besides the weights, by name."""
        weights = {p.name for p in self.parameters}
        return {p.name: p for p in self.everything if p.name not in weights}

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore what `state_tensors` gave. Raises: WeightError for missing or superfluous names, or other shapes."""
        load_state(self.state_tensors(), state)


def guarded(optimizer: nn.Cell) -> nn.Cell:
    """The optimizer, with the call ``(gradients, coefficient, is_finite)``."""
    return Guarded(optimizer) if isinstance(optimizer, nn.Optimizer) else optimizer


def _check(parameters: list[Parameter], learning_rate: float, betas: tuple[float, float], eps: float,
           weight_decay: float) -> None:
    if not parameters:
        raise TrainingError("AdamW was given no parameters: expected at least one. Name what is to be trained "
                            "(lora_base_model or trainable_models).")
    wrong = []
    if not (learning_rate >= 0 and math.isfinite(learning_rate)):
        wrong.append(f"learning_rate={learning_rate}: expected a finite number, at least 0. Try 1e-4.")
    if not all(0 <= beta <= 0.99999 for beta in betas):
        wrong.append(f"betas={betas}: expected two numbers from 0 to 0.99999. Try (0.9, 0.999).")
    if not (eps >= 1e-30 and math.isfinite(eps)):  # float32 could not divide by less where a gradient is 0
        wrong.append(f"eps={eps}: expected at least 1e-30. Try 1e-8.")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        wrong.append(f"weight_decay={weight_decay}: expected a finite number, at least 0. Try 1e-2.")
    others = [f"{p.name} ({p.dtype})" for p in parameters if p.dtype != ms.float32]
    if others:
        wrong.append(f"weights that are not float32: {listing(others)}. Keep what is trained in float32; the forward "
                     "pass may cast it.")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _corrections(beta1: float, beta2: float) -> tuple[np.ndarray, np.ndarray]:
    """Tables of sqrt(c2) / c1 and sqrt(c2) for t = 0, 1, ... until both are 1 in float32; entry 0 is not used.

    A table, because in float32 neither a power nor a product keeps 1 - b^t (0.001 at t = 1) to better than 1e-5. It is
    made of the betas as float32 holds them: the kernel computes 1 - b from those (1.3e-5 off for b = 0.999), and with
    the same betas in the correction that error cancels.
    """
    powers = [float(np.float32(beta)) for beta in (beta1, beta2)]
    steps = 2 + max(int(math.log(2.0**-26) / math.log(beta)) if beta > 0 else 0 for beta in powers)
    t = np.arange(1, steps + 1, dtype=np.float64)
    c1, c2 = (1 - beta**t for beta in powers)
    rates, roots = np.sqrt(c2) / c1, np.sqrt(c2)
    return np.append(1, rates).astype(np.float32), np.append(1, roots).astype(np.float32)


def _scaled(coefficient, gradient):
    return _scale(gradient.astype(ms.float32), coefficient)


def _keep(is_finite, before, parameter):
    return put(parameter, ops.select(is_finite, parameter, before))
