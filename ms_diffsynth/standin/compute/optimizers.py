"""Updates of an optimizer, one tensor at a time."""
from __future__ import annotations

import numpy as np

from ms_diffsynth.standin.compute.table import Array, aclnn, aclop


@aclop("ApplyAdamD")
def adam(attributes: dict, parameter: Array, m: Array, v: Array, beta1_power: Array, beta2_power: Array, rate: Array,
         beta1: Array, beta2: Array, epsilon: Array, gradient: Array) -> tuple:
    """Adam's update; the powers are those of the betas after the step, from which it corrects the moments' bias."""
    rate = rate * np.sqrt(1 - beta2_power) / (1 - beta1_power)
    m = m + (gradient - m) * (1 - beta1)
    v = v + (gradient * gradient - v) * (1 - beta2)
    return parameter - rate * m / (epsilon + np.sqrt(v)), m, v


@aclnn("ApplyAdamWV2", "&t &t &t &t t t f f f f f b b")
def adamw(parameter: Array, m: Array, v: Array, most: Array | None, gradient: Array, step: Array, rate: float,
          beta1: float, beta2: float, decay: float, epsilon: float, amsgrad: bool, maximize: bool) -> tuple:
    """AdamW's update with decoupled weight decay.

    ``step`` is 0 at the first, as `mindspore.mint.optim.AdamW` gives it: the documented formula's t is one more.
    """
    if amsgrad:
        raise NotImplementedError("with amsgrad it is not computed by the stand-in: write it in compute/optimizers.py")
    gradient = -gradient if maximize else gradient
    rate, beta1, beta2, decay, epsilon = map(np.float32, (rate, beta1, beta2, decay, epsilon))
    t = np.float32(step.item() + 1)
    parameter = parameter * (1 - rate * decay)
    m = m + (gradient - m) * (1 - beta1)
    v = v + (gradient * gradient - v) * (1 - beta2)
    root = np.sqrt(v / (1 - beta2 ** t)) + epsilon
    return parameter - rate * (m / (1 - beta1 ** t)) / root, m, v, None


@aclop("AdamApplyOneWithDecayAssign")
def adamw_assign(attributes: dict, gradient: Array, v: Array, m: Array, parameter: Array, rate: Array, beta1: Array,
                 rest1: Array, beta2: Array, rest2: Array, decay: Array, epsilon: Array) -> tuple:
    """AdamW without correction of bias. Returns v, m and the parameter."""
    m, v = m * beta1 + gradient * rest1, v * beta2 + gradient * gradient * rest2
    return v, m, parameter - rate * (m / (np.sqrt(v) + epsilon) + decay * parameter)


@aclop("ApplyMomentum")
def momentum(attributes: dict, parameter: Array, sum_of_gradients: Array, rate: Array, gradient: Array,
             share: Array) -> Array:
    """The sum is written in place, which float32 is; only the parameter is an output."""
    sum_of_gradients[...] = sum_of_gradients * share + gradient
    if attributes.get("use_nesterov"):
        return parameter - rate * (gradient + share * sum_of_gradients)
    return parameter - rate * sum_of_gradients


aclop("ApplyGradientDescent", lambda attributes, x, rate, gradient: x - rate * gradient)
aclop("SGD", lambda attributes, x, gradient, rate, *rest: x - rate * gradient)
