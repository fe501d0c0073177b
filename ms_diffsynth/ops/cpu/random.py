"""`mindspore.mint`: random numbers, for the initial weights some networks draw and for dropout.

Every Gaussian comes from ``ops.randn`` and every uniform from ``ops.rand``: under ``ms.set_seed`` MindSpore 2.10 counts
seeds per *function*, so that the first ``randn`` and the first ``randn_like`` are the same numbers (2026-11-21).
Training draws its noise on the host and never calls these.
"""
from __future__ import annotations

from mindspore import Tensor, ops
from mindspore.common import dtype as mstype
from mindspore.ops.primitive import _primexpr

from ms_diffsynth.errors import DeviceError

__all__ = ["normal", "rand", "rand_like", "randint", "randn", "randn_like"]


@_primexpr
def _shape(size):
    if len(size) == 1 and isinstance(size[0], (tuple, list)):
        return tuple(size[0])
    return tuple(size)


@_primexpr
def _check_generator(is_absent):
    if not is_absent:
        raise DeviceError("a random function with generator= on the CPU: MindSpore's CPU streams cannot be rewound. "
                          "Draw with NumPy on the host and pass the tensor in.")


def _below_one(x):
    """``ops.rand`` of the CPU gives 1.0 once in some ten million numbers (MindSpore 2.10)."""
    return ops.minimum(x, 1 - 2.0**-24) if x.dtype == mstype.float32 else x


def rand(*size, generator=None, dtype=None):
    _check_generator(generator is None)
    return _below_one(ops.rand(*_shape(size), dtype=mstype.float32 if dtype is None else dtype))


def rand_like(input, *, dtype=None):
    return _below_one(ops.rand(*input.shape, dtype=input.dtype if dtype is None else dtype))


def randn(*size, generator=None, dtype=None):
    _check_generator(generator is None)
    return ops.randn(*_shape(size), dtype=mstype.float32 if dtype is None else dtype)


def randn_like(input, *, dtype=None):
    return ops.randn(*input.shape, dtype=input.dtype if dtype is None else dtype)


def normal(mean=0.0, std=1.0, size=None, generator=None):
    _check_generator(generator is None)
    if size is None:
        size = mean.shape if isinstance(mean, Tensor) else std.shape
    return ops.randn(*size) * std + mean


def randint(*args, size=None, generator=None, dtype=None):
    """``randint(high, size)`` or ``randint(low, high, size)``."""
    _check_generator(generator is None)
    bounds = args if size is not None else args[:-1]
    size = args[-1] if size is None else size
    low, high = (0, bounds[0]) if len(bounds) == 1 else (bounds[0], bounds[1])
    return ops.randint(low, high, size, dtype=mstype.int64 if dtype is None else dtype)
