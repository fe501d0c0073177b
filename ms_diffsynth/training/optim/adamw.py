"""AdamW, guarded against gradients that are not finite, for compiled and eager steps."""
from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, ops

from ms_diffsynth.ops import update
from ms_diffsynth.ops.update import put
from ms_diffsynth.training.optim.contract import OptimizerCell, check, corrections, moment_problems


class AdamW(OptimizerCell):
    """AdamW with float32 weights and moments, called as ``optimizer(gradients, coefficient, is_finite)``.

        m += (1 - b1) (g - m),  v += (1 - b2) (g^2 - v),  p -= lr wd p,  p -= lr / c1 * m / (sqrt(v / c2) + eps)

    with c1 = 1 - b1^t, c2 = 1 - b2^t. The fused kernel knows no c2 inside the root, so it is given lr sqrt(c2) / c1 and
    eps sqrt(c2), which is the same. Where a gradient is not finite, the coefficient, the learning rate and the decay
    become 0 and both betas 1.

    Args:
        parameters: what is trained; float32, with distinct names.
        learning_rate: the first learning rate; change it with `set_learning_rate`.
    Raises: TrainingError when there is nothing to train; ConfigError for values outside their range or weights that are
        not float32.
    Source: Loshchilov and Hutter 2019 (1711.05101), algorithm 2; torch.optim.AdamW 2.13, which it follows to 1e-6
        in weights of size 1 over 100 steps.
    """

    is_elementwise = True

    def __init__(self, parameters: Sequence[Parameter], learning_rate: float = 1e-4,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2):
        parameters = list(parameters)
        check("AdamW", parameters, learning_rate, weight_decay, moment_problems(betas, eps))
        super().__init__("adamw", parameters, learning_rate)
        self.moment1 = self.parameters.clone("moment1", "zeros")
        self.moment2 = self.parameters.clone("moment2", "zeros")
        self.beta1, self.beta2 = Tensor(betas[0], ms.float32), Tensor(betas[1], ms.float32)
        self.eps, self.weight_decay, self.update = eps, weight_decay, update.AdamW(len(parameters))
        # of the betas as float32 holds them: the kernel computes 1 - b from those (1.3e-5 off for b = 0.999), and with
        # the same betas in the correction that error cancels
        rates, roots = corrections(*(float(np.float32(beta)) for beta in betas))
        self.rates, self.roots = Tensor(rates), Tensor(roots)
        self.last = len(rates) - 1

    @classmethod
    def from_settings(cls, parameters: Sequence[Parameter], learning_rate: float, weight_decay: float, *,
                      beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> AdamW:
        """For `build_optimizer`."""
        return cls(parameters, learning_rate, (beta1, beta2), epsilon, weight_decay)

    def construct(self, gradients, coefficient=None, is_finite=None):
        """See `contract.Optimizer`."""
        is_finite = self.true if is_finite is None else is_finite
        coefficient = ops.select(is_finite, self.one if coefficient is None else coefficient, self.zero)
        step = self.step + 1
        index = ops.minimum(step, self.last).reshape((1,))
        learning_rate = ops.select(is_finite, self.learning_rate, self.zero)
        rate = learning_rate * mint.index_select(self.rates, 0, index).reshape(())
        eps = self.eps * mint.index_select(self.roots, 0, index).reshape(())
        beta1, beta2 = ops.select(is_finite, self.beta1, self.one), ops.select(is_finite, self.beta2, self.one)
        decay = learning_rate * self.weight_decay
        updated = self.update(coefficient, rate, decay, beta1, beta2, eps, self.zero, self.parameters, self.moment1,
                              self.moment2, gradients)
        put(self.step, ops.select(is_finite, step, self.step))
        return updated

    def state_tensors(self) -> dict[str, Parameter]:
        """Both moments and the step count, by name."""
        return {p.name: p for p in (*self.moment1, *self.moment2, self.step)}
