"""Tuples of gradients inside the compiled step: their norm, whether they are finite, clipping, accumulation.

Functions of Tensors, equal in PyNative and compiled. Nothing here multiplies a gradient: unscaling, clipping and the
finite guard are one coefficient, applied once by the optimizer (`optim`).
"""
from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, ops
from mindspore.ops import constexpr, operations as P

from ms_diffsynth.ops.update import HAS_NATIVE, is_cpu, native, put

_each = ops.HyperMap()
_dot = P.MatMul(transpose_b=True)


@constexpr
def _diagonal(ones: int) -> Tensor:
    """16 x 16 zeros with this many ones on the diagonal."""
    return Tensor(np.diag(np.arange(16) < ones).astype(np.float32))


def sum_of_squares(grads: tuple[Tensor, ...]) -> Tensor:
    """The sum of the squares of all elements, of which the root is the norm: float32 scalar.

    Not finite when any element is not finite, and also when the sum of squares overflows: norms above 1.8e19.
    Source: torch.nn.utils.clip_grad_norm_, with the sum of squares taken at once.
    """
    if HAS_NATIVE and is_cpu():
        return native.sum_of_squares(_each(_as_float32, grads))
    if is_cpu():
        return ops.sum(ops.addn(_each(_gram, grads)) * _diagonal(16))
    squares = _each(_squares_by_sum, grads)
    if len(squares) == 1:
        return squares[0]
    return mint.sum(mint.stack(squares))


def is_finite(value: Tensor) -> Tensor:
    """Whether a scalar, such as the norm or the loss, is neither NaN nor infinite: bool scalar."""
    return ops.isfinite(value)


def clip_coefficient(norm: Tensor, max_grad_norm: float | None) -> Tensor:
    """What to multiply the gradients by so that their norm is at most ``max_grad_norm``; None leaves them.

    Shapes: norm float32 scalar -> float32 scalar, at most 1; NaN for a norm of NaN.
    Source: torch.nn.utils.clip_grad_norm_.
    """
    if max_grad_norm is None:
        return ops.ones_like(norm)
    coefficient = max_grad_norm * ops.reciprocal(norm + 1e-6)
    return ops.select(coefficient > 1.0, ops.ones_like(coefficient), coefficient)  # a minimum may lose NaN


def accumulators_for(parameters: Sequence[Parameter]) -> ParameterTuple:
    """A float32 zero for each element: small gradients would be lost in a sum of a shorter dtype."""
    return ParameterTuple([Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"accumulated.{p.name}",
                                     requires_grad=False) for p in parameters])


def accumulate(accumulators: tuple[Parameter, ...], grads: tuple[Tensor, ...]) -> tuple[bool, ...]:
    """Add the gradients to their accumulators, in place."""
    return _each(_accumulate, accumulators, grads)


def added(accumulators: tuple[Parameter, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sums of accumulators and gradients; the accumulators stay as they are."""
    return _each(_add, accumulators, grads)


def reset(accumulators: tuple[Parameter, ...]) -> tuple[bool, ...]:
    """Set the accumulators to zero, in place, whatever they held."""
    return _each(_reset, accumulators)


def _as_float32(grad):
    return grad.astype(ms.float32)


def _gram(grad):
    # The diagonal of the Gram matrix of 16 rows sums to the same as one long row's product with itself, and for 590k
    # elements takes 0.7 ms instead of 2.2; a product and its ReduceSum take 2.3 and P.L2Loss is 2 % off at 10M elements
    # (MindSpore 2.10 on 2 cores, 2026-11-21). |G_ij| <= max G_ii: nothing overflows before the diagonal does.
    grad = grad.astype(ms.float32)
    if grad.size % 16 == 0:
        rows = grad.reshape((16, -1))
        return _dot(rows, rows)
    row = grad.reshape((1, -1))
    return _dot(row, row) * _diagonal(1)


def _squares_by_sum(grad):
    # elsewhere a float32 matrix product may be computed in less than float32
    grad = grad.astype(ms.float32)
    return ops.sum(grad * grad)


def _accumulate(accumulator, grad):
    return put(accumulator, accumulator + grad.astype(accumulator.dtype))


def _add(accumulator, grad):
    return accumulator + grad


def _reset(accumulator):
    return put(accumulator, ops.zeros_like(accumulator))
