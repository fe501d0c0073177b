"""`mindspore.mint.optim.AdamW` on the CPU, whose fused kernel only Ascend has."""
from __future__ import annotations

from mindspore import Tensor, ops
from mindspore.common import dtype as mstype
from mindspore.ops.primitive import _primexpr

from ms_diffsynth.errors import DeviceError

_EACH = ops.HyperMap()


def _update(beta1, beta2, lr, eps, weight_decay, correction1, correction2, parameter, gradient, mean, square):
    gradient = gradient.astype(mstype.float32)
    new_mean = mean * beta1 + gradient * (1 - beta1)
    new_square = square * beta2 + ops.square(gradient) * (1 - beta2)
    step = (new_mean / correction1) / (ops.sqrt(new_square) / ops.sqrt(correction2) + eps)
    new_parameter = parameter * (1 - lr * weight_decay) - lr * step
    ops.assign(mean, new_mean)
    ops.assign(square, new_square)
    ops.assign(parameter, new_parameter.astype(parameter.dtype))
    return True


@_primexpr
def _check_options(amsgrad, maximize):
    if amsgrad or maximize:
        raise DeviceError(f"mint.optim.AdamW with amsgrad={amsgrad}, maximize={maximize} on the CPU: expected both "
                          "False. For maximize, negate the gradients.")


def adamw_construct(self, gradients):
    """One step of AdamW.

    Source: Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW orders it.
    """
    ops.assign_add(self.state_step, self.increase_tensor)
    count = self.state_step + 1.0  # state_step starts at -1
    for i, group in enumerate(self.param_groups):
        _check_options(bool(group.get("amsgrad")), bool(group.get("maximize")))
        beta1, beta2 = group["betas"]
        start, end = self.group_start_id[i], self.group_start_id[i + 1]
        correction1 = 1.0 - ops.pow(Tensor(beta1, mstype.float32), count)
        correction2 = 1.0 - ops.pow(Tensor(beta2, mstype.float32), count)
        _EACH(ops.partial(_update, beta1, beta2, group.get("lr"), group.get("eps"), group.get("weight_decay"),
                          correction1, correction2),
              self.parameters[start:end], tuple(gradients[start:end]), self.exp_avg[start:end],
              self.exp_avg_sq[start:end])
    return True
