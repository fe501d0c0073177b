"""Calls kernels of a library with NumPy arrays, through ctypes, as MindSpore's custom operators would.

    python selftest.py LIBDNNL LIBRARY      # exit code 0 when a few kernels compute what NumPy does

Imports neither MindSpore nor this package, so that a library that ends the process ends this one.
"""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np


class Library:
    """Kernels by name: ``library.call(name, inputs, shapes of the outputs)`` -> outputs, all float32.

    Raises: RuntimeError when the kernel reports an error.
    """

    def __init__(self, onednn: str, library: str):
        ctypes.CDLL(onednn, ctypes.RTLD_GLOBAL)
        self.functions = ctypes.CDLL(library)

    def call(self, name: str, inputs: Sequence[Any], shapes: Sequence[tuple[int, ...]],
             dtype: bytes = b"float32") -> list[np.ndarray]:
        outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
        arrays = [np.ascontiguousarray(x, np.float32) for x in inputs] + outputs
        if status := self.run(name, arrays, dtype):
            raise RuntimeError(f"{name} returned {status}")
        return outputs

    def run(self, name: str, arrays: list[np.ndarray], dtype: bytes) -> int:
        """The kernel's status. It writes into the arrays: outputs, and for the optimizer inputs too."""
        count = len(arrays)
        sizes = [(ctypes.c_int64 * max(1, array.ndim))(*array.shape) for array in arrays]
        return getattr(self.functions, name)(
            count, (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
            (ctypes.c_int * count)(*[array.ndim for array in arrays]),
            (ctypes.c_void_p * count)(*[ctypes.addressof(size) for size in sizes]),
            (ctypes.c_char_p * count)(*[dtype] * count), None, None)


def check(library: Library) -> None:
    """Raise AssertionError unless a product, an attention and a norm are right."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    x, weight, bias = normal(67, 33), normal(45, 33), normal(45)
    _near(library.call("linear_forward", [x, weight, bias], [(67, 45)])[0], x.astype(np.float64) @ weight.T + bias)
    q, k, v = normal(2, 37, 3, 20), normal(2, 29, 3, 20), normal(2, 29, 3, 20)
    scores = np.einsum("bshd,bthd->bhst", q.astype(np.float64), k) / np.sqrt(20)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)
    _near(library.call("attention_forward", [q, k, v], [(2, 37, 60), (2, 3, 37)])[0], expected.reshape(2, 37, 60))
    weight = normal(20)
    expected = q / np.sqrt((q.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * weight
    _near(library.call("rms_norm_forward", [q, weight, [1e-6]], [q.shape])[0], expected)


def _near(actual: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < 1e-5, f"an error of {error:.1e}, expected less than 1e-5"  # also of NaN


if __name__ == "__main__":
    check(Library(sys.argv[1], sys.argv[2]))
