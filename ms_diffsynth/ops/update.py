"""Parameters changed in place, by what each device has kernels for.

On the CPU a native kernel, or MindSpore's fused primitives where there is none. On an Ascend those would go the old
aclop way, one compilation a shape, so there it is composed of element-wise kernels. The device is that of the moment of
the call, or of compilation.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.ops import constexpr, operations as P
from mindspore.ops.auto_generate import InplaceAddExt, InplaceCopy, InplaceMul, InplaceSubExt

from ms_diffsynth.ops import native_kernels

native = native_kernels()  # on the CPU, where there are some
HAS_NATIVE = native is not None
_each = ops.HyperMap()
_assign, _copy = P.Assign(), InplaceCopy()
_add, _subtract, _multiply = InplaceAddExt(), InplaceSubExt(), InplaceMul()  # in place
_descend = P.ApplyGradientDescent()  # p -= a * g in one pass; a product and Assign take up to twice as long
_adam = P.Adam()  # CPU, 10M elements: 10 ms compiled, P.AdamWeightDecay 31, composed of operations 108 (2026-11-21)
_scale = P.MulNoNan()  # x * y, and 0 where y is 0 even if x is NaN or infinite; as fast as a product


@constexpr
def is_cpu() -> bool:
    """Whether this process computes on the CPU."""
    return ms.get_context("device_target") == "CPU"


def put(parameter: Parameter, value: Tensor) -> bool:
    """``parameter`` := ``value``, of its shape and dtype."""
    if is_cpu():
        return ops.depend(True, _assign(parameter, value))
    return ops.depend(True, _copy(parameter, value))


def scaled(gradient: Tensor, coefficient: Tensor, zero: Tensor) -> Tensor:
    """``coefficient * gradient``, and 0 where the coefficient is 0, whatever the gradient: float32.

    Shapes: coefficient and zero float32 scalars.
    """
    gradient = gradient.astype(ms.float32)
    if is_cpu():
        return _scale(gradient, coefficient)
    return mint.where(coefficient == 0, zero, gradient) * coefficient


class AdamW(nn.Cell):
    """One update of ``number`` parameters by AdamW, with everything that depends on the step worked out:

        g = coefficient * gradient, and 0 where the coefficient is 0
        m := b1 m + (1 - b1) g,  v := b2 v + (1 - b2) g^2,  p := p - decay p - rate m / (sqrt(v) + eps)

    Called as ``update(coefficient, rate, decay, beta1, beta2, eps, zero, parameters, moments1, moments2, gradients)``:
    float32 scalars and tuples of as many Tensors, of one shape each. On the CPU's native kernel it is one operator for
    all of them: 684 tensors, an operator each, take MindSpore longer to compile than the network.
    """

    def __init__(self, number: int):
        super().__init__(auto_prefix=False)
        self.native = native.AdamW(number) if HAS_NATIVE else None

    def construct(self, coefficient, rate, decay, beta1, beta2, eps, zero, parameters, moments1, moments2, gradients):
        if self.native is not None and is_cpu():
            return ops.depend(True, self.native(coefficient, rate, decay, beta1, beta2, eps, *parameters, *moments1,
                                                *moments2, *_each(_as_float32, gradients)))
        return _each(ops.partial(_adamw, coefficient, rate, decay, beta1, beta2, eps, zero), parameters, moments1,
                     moments2, gradients)


def _as_float32(gradient):
    return gradient.astype(ms.float32)


def _adamw(coefficient, rate, decay, beta1, beta2, eps, zero, parameter, moment1, moment2, gradient):
    gradient = scaled(gradient, coefficient, zero)
    if is_cpu():
        decayed = _descend(parameter, decay, parameter)
        # the two zeros stand for powers of the betas: the kernel's own correction is switched off
        return ops.depend(True, _adam(ops.depend(parameter, decayed), moment1, moment2, zero, zero, rate, beta1, beta2,
                                      eps, gradient))
    # In place: two copies of each Tensor less at the peak. (Where the parameter is read in forward MindSpore 2.10 makes
    # of it products and an Assign; of InplaceCopy it made copies of the parameter before either reading.)
    mean = _add(_multiply(moment1, beta1), gradient * (1 - beta1))
    square = _add(_multiply(moment2, beta2), gradient * gradient * (1 - beta2))
    changed = _subtract(_multiply(parameter, 1 - decay), mean / (mint.sqrt(square) + eps) * rate)
    return ops.depend(True, changed)
