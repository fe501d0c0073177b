"""Sums over axes, and matrix products."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ms_diffsynth.standin.compute.table import Array, aclnn

for _name in ("Matmul", "Mm", "BatchMatMul"):
    aclnn(_name, "t t -> t j", lambda x, y, precision: np.matmul(x, y))


@aclnn("Addmm", "t t t s s -> t j")
def addmm(x: Array, a: Array, b: Array, beta: float, alpha: float, precision: int) -> Array:
    return beta * x + alpha * (a @ b)


@aclnn("Baddbmm", "t t t s s -> t j")
def baddbmm(x: Array, a: Array, b: Array, beta: float, alpha: float, precision: int) -> Array:
    return beta * x + alpha * (a @ b)


def _axes(axes: Sequence[int] | None) -> tuple[int, ...] | None:
    return tuple(axes or ()) or None  # no axes are all of them


aclnn("ReduceSum", "t I b j -> t", lambda x, axes, keep, dtype: np.sum(x, _axes(axes), keepdims=keep))
aclnn("Mean", "t I b j -> t", lambda x, axes, keep, dtype: np.mean(x, _axes(axes), keepdims=keep))
aclnn("Amax", "t I b -> t", lambda x, axes, keep: np.max(x, _axes(axes), keepdims=keep))
aclnn("Amin", "t I b -> t", lambda x, axes, keep: np.min(x, _axes(axes), keepdims=keep))
aclnn("Any", "r I b -> t", lambda x, axes, keep: np.any(x, _axes(axes), keepdims=keep))
aclnn("All", "r I b -> t", lambda x, axes, keep: np.all(x, _axes(axes), keepdims=keep))
aclnn("Max", "r -> t", np.max)
aclnn("Min", "r -> t", np.min)
aclnn("ArgMax", "t i b -> t", lambda x, axis, keep: np.argmax(x, axis, keepdims=keep))
aclnn("Cumsum", "t i j -> t", lambda x, axis, dtype: np.cumsum(x, axis))


@aclnn("LinalgVectorNorm", "t s I b j -> t")
def vector_norm(x: Array, order: float, axes: Sequence[int] | None, keep: bool, dtype: int) -> Array:
    if order == 2:
        return np.sqrt(np.sum(x * x, _axes(axes), keepdims=keep))
    if np.isinf(order):
        return (np.max if order > 0 else np.min)(np.abs(x), _axes(axes), keepdims=keep)
    return np.sum(np.abs(x) ** order, _axes(axes), keepdims=keep) ** (1 / order)


@aclnn("Softmax", "t i -> t")
def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@aclnn("SoftmaxBackward", "t t i -> t")
def softmax_gradient(gradient: Array, y: Array, axis: int) -> Array:
    return y * (gradient - (gradient * y).sum(axis, keepdims=True))
