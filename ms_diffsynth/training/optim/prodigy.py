"""Prodigy: Adam that finds its step size itself."""
from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, ops
from mindspore.ops import operations as P

from ms_diffsynth import runtime
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.ops import update
from ms_diffsynth.ops.update import put, scaled
from ms_diffsynth.training.optim.contract import OptimizerCell, check, corrections, moment_problems

logger = logging.getLogger(__name__)

_each = ops.HyperMap()


class Prodigy(OptimizerCell):
    """Prodigy with float32 weights: Adam whose step size d is an estimate of how far the weights have to go.

        a = d lr (with bias correction: times sqrt(1 - b2^t) / (1 - b1^t))
        r = b3 r + a d / d0 <g, p0 - p>,  s = b3 s + a d / d0 g,  d' = d_coef r / |s|_1
        m = b1 m + (1 - b1) d g,  v = b2 v + (1 - b2) (d g)^2
        d = max(d, d') (at most ``growth_rate`` times the last),  p -= a wd p,  p -= a m / (sqrt(v) + d eps)

    with one d for all weights, and p0 the weights before the first step. A step does nothing where a gradient is not
    finite or where lr = 0, so a warm-up that begins at 0 is harmless.

    It keeps four numbers for each weight, 16 bytes, where AdamW keeps two.

    Args:
        parameters: what is trained; float32, with distinct names.
        learning_rate: a factor on the step size; its authors advise 1, and a schedule that falls to 0, if any.
        beta3: decay of r and s; None is the root of beta2.
        d0: the first d. d_coef: a factor on the estimate; the way to tune the method.
        safeguard_warmup: leave lr out of s, for a warm-up of the learning rate.

    Raises: TrainingError when there is nothing to train; ConfigError for values outside their range or weights that are
        not float32.
    Source: Mishchenko and Defazio 2023 (2306.06101), algorithm 4; the package prodigyopt 1.1, in whose order it
        computes: the new d is in eps, but in the step only from the next update on.
    """

    is_elementwise = True  # but for sums over all

    def __init__(self, parameters: Sequence[Parameter], learning_rate: float = 1.0,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, *,
                 beta3: float | None = None, d0: float = 1e-6, d_coef: float = 1.0, growth_rate: float = math.inf,
                 use_bias_correction: bool = False, safeguard_warmup: bool = False):
        parameters = list(parameters)
        beta3 = math.sqrt(betas[1]) if beta3 is None else beta3
        check("Prodigy", parameters, learning_rate, weight_decay, [
            *moment_problems((*betas, beta3), eps),
            (not (d0 >= 1e-12 and d0 <= 1), f"d0={d0}: expected a number from 1e-12 to 1. Try 1e-6."),
            (not (d_coef > 0 and math.isfinite(d_coef)), f"d_coef={d_coef}: expected a number above 0. Try 1."),
            (not growth_rate > 1, f"growth_rate={growth_rate}: expected more than 1. Try 1.02, or inf for no limit."),
        ])
        super().__init__("prodigy", parameters, learning_rate)
        self.moment1 = self.parameters.clone("moment1", "zeros")
        self.moment2 = self.parameters.clone("moment2", "zeros")
        self.sums = self.parameters.clone("sum", "zeros")
        # not clone(..., "same"): of weights that were loaded it takes what they were initialised with (MindSpore 2.10)
        self.start = ParameterTuple([Parameter(Tensor(to_numpy(p)), name=f"start.{p.name}", requires_grad=False)
                                     for p in self.parameters])
        self.d, self.d_max, self.numerator = (
            Parameter(Tensor(value, ms.float32), name=f"prodigy.{name}", requires_grad=False)
            for name, value in (("d", d0), ("d_max", d0), ("numerator", 0.0)))
        self.beta1, self.beta2, self.beta3 = (Tensor(beta, ms.float32) for beta in (*betas, beta3))
        self.d0, self.growth_rate = Tensor(d0, ms.float32), Tensor(growth_rate, ms.float32)
        self.d_coef, self.weight_decay, self.update = d_coef, weight_decay, update.AdamW(len(parameters))
        self.has_correction, self.has_safeguard = use_bias_correction, safeguard_warmup
        self.rates = Tensor(corrections(*betas)[0])
        self.last = len(self.rates) - 1
        # the kernel computes 1 - b from b in float32, which for 0.999 is 1.3e-5 off; so m and v are too large by these
        too_large = [(1 - float(np.float32(beta))) / (1 - beta) for beta in betas]
        root = math.sqrt(too_large[1])
        self.rate_factor, self.eps = root / too_large[0], eps * root
        self.is_part = False  # whether the parameters are this rank's part of larger ones
        self.all_reduce = P.AllReduce() if runtime.current().world_size > 1 else None

    @classmethod
    def from_settings(cls, parameters: Sequence[Parameter], learning_rate: float, weight_decay: float, *,
                      beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, d0: float = 1e-6,
                      d_coef: float = 1.0, growth_rate: float = math.inf, use_bias_correction: bool = False,
                      safeguard_warmup: bool = False) -> Prodigy:
        """For `build_optimizer`."""
        if learning_rate < 0.1:
            logger.warning("learning_rate=%g with optimizer=prodigy is a factor on the step size that it finds itself: "
                           "training will be as much slower. Its authors advise 1.", learning_rate)
        return cls(parameters, learning_rate, (beta1, beta2), epsilon, weight_decay, d0=d0, d_coef=d_coef,
                   growth_rate=growth_rate, use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup)

    def divide(self) -> None:
        """From now on the parameters are this rank's part of larger ones: sums go over all ranks."""
        self.is_part = self.all_reduce is not None

    def construct(self, gradients, coefficient=None, is_finite=None):
        """See `contract.Optimizer`."""
        is_moving = self.learning_rate > 0
        if is_finite is not None:
            is_moving = ops.logical_and(is_moving, is_finite)
        coefficient = ops.select(is_moving, self.one if coefficient is None else coefficient, self.zero)
        step, d = self.step + 1, self.d + 0.0  # what self.d holds now; it is changed below
        rate = d * self.learning_rate
        if self.has_correction:
            index = ops.minimum(step, self.last).reshape((1,))
            rate = rate * mint.index_select(self.rates, 0, index).reshape(())
        rate = ops.select(is_moving, rate, self.zero)
        beta1, beta2, beta3 = (ops.select(is_moving, self.beta1, self.one), ops.select(is_moving, self.beta2, self.one),
                               ops.select(is_moving, self.beta3, self.one))
        ratio = d / self.d0
        weight = ratio * (d if self.has_safeguard else rate)
        found = _each(ops.partial(_distances, coefficient, beta3, weight, self.zero), self.parameters, self.start,
                      self.sums, gradients)
        totals = mint.sum(mint.stack(found), dim=0)
        if self.is_part:
            totals = self.all_reduce(totals)
        numerator, denominator = beta3 * self.numerator + ratio * rate * totals[0], totals[1]
        has_moved = ops.logical_and(is_moving, denominator > 0)  # without, every gradient so far was 0
        estimate = self.d_coef * numerator / ops.select(has_moved, denominator, self.one)
        first = ops.select(d == self.d0, ops.maximum(d, estimate), d)
        d_max = ops.select(has_moved, ops.maximum(self.d_max, estimate), self.d_max)
        new_d = ops.select(has_moved, ops.minimum(d_max, first * self.growth_rate), d)
        rate = ops.select(has_moved, rate, self.zero)
        updated = self.update(coefficient * d, rate * self.rate_factor, rate * self.weight_decay, beta1, beta2,
                              new_d * self.eps, self.zero, self.parameters, self.moment1, self.moment2, gradients)
        put(self.numerator, ops.select(has_moved, numerator, self.numerator))
        put(self.d_max, d_max)
        put(self.d, new_d)
        put(self.step, ops.select(has_moved, step, self.step))
        return updated

    def take_weights(self) -> None:
        """The weights as they are now are those before the first step."""
        for start, parameter in zip(self.start, self.parameters):
            ops.assign(start, parameter)

    def state_tensors(self) -> dict[str, Parameter]:
        """Both moments, s, p0, and d, d_max, r and the step count, by name."""
        return {p.name: p for p in (*self.moment1, *self.moment2, *self.sums, *self.start, self.d, self.d_max,
                                    self.numerator, self.step)}


def _distances(coefficient, beta3, weight, zero, parameter, start, sums, gradient):
    """s := b3 s + weight g. Returns <g, p0 - p> and |s|_1: float32 [2]."""
    gradient = scaled(gradient, coefficient, zero)
    new = sums * beta3 + gradient * weight
    inner = mint.sum(gradient * (start - parameter))
    return ops.depend(mint.stack((inner, mint.sum(mint.abs(new)))), put(sums, new))
