"""Compares a CPU kernel with NumPy in value and gradient, in PyNative and compiled."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import Tensor

STRICT = {"fullgraph": True} if "fullgraph" in inspect.signature(ms.jit).parameters else {}
EPSILON = 1e-6  # of the central differences, in float64: good to 1e-9


@dataclass(frozen=True, kw_only=True)
class Case:
    """``function(*inputs, **settings)`` must be ``reference(*inputs)``.

    ``inputs`` are shapes, drawn from N(0, 1), or arrays. Errors are relative to the largest element, or absolute
    below 1; float32 rounding through a few operations gives 1e-6.
    """

    name: str
    function: Callable
    reference: Callable
    inputs: Sequence[tuple | np.ndarray]
    settings: dict = field(default_factory=dict)
    gradient: bool = True
    tolerance: float = 1e-5

    def arrays(self) -> list[np.ndarray]:
        random = np.random.default_rng(7)
        return [i if isinstance(i, np.ndarray) else random.standard_normal(i).astype(np.float32) for i in self.inputs]


def assert_near(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    error = np.abs(actual.astype(np.float64) - expected).max() / max(1.0, np.abs(expected).max())
    assert error <= tolerance, f"{what}: error {error:.1e}, at most {tolerance:.0e} was expected"


def check(case: Case, compiled: bool) -> None:
    arrays = case.arrays()
    wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
    expected = np.asarray(case.reference(*wide))
    tensors = [Tensor(a) for a in arrays]
    function, settings = case.function, case.settings
    if not case.gradient:
        def value(*inputs):
            return function(*inputs, **settings)
        out = (ms.jit(value, **STRICT) if compiled else value)(*tensors)
        assert_near(out.asnumpy(), expected, case.tolerance, f"{case.name} value")
        return
    weights = np.random.default_rng(8).standard_normal(expected.shape).astype(np.float32)
    weight_tensor = Tensor(weights)

    def weighted(*inputs):
        out = function(*inputs, **settings)
        return (out * weight_tensor).sum(), out

    positions = tuple(i for i, a in enumerate(arrays) if a.dtype == np.float32)
    both = ms.value_and_grad(weighted, positions, None, has_aux=True)

    def step(*inputs):
        return both(*inputs)

    (_, out), gradients = (ms.jit(step, **STRICT) if compiled else step)(*tensors)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert_near(out.asnumpy(), expected, case.tolerance, f"{case.name} value")
    for position, gradient in zip(positions, gradients):
        slope = differences(lambda *x: float((case.reference(*x) * weights).sum()), wide, position)
        assert_near(gradient.asnumpy(), slope, case.tolerance, f"{case.name} gradient of input {position}")


def differences(function: Callable, arrays: list[np.ndarray], position: int) -> np.ndarray:
    """Central differences of a scalar function with respect to one of its arrays."""
    slope = np.zeros(arrays[position].shape)
    for index in np.ndindex(slope.shape):
        ends = []
        for step in (EPSILON, -EPSILON):
            moved = [a.copy() for a in arrays]
            moved[position][index] += step
            ends.append(function(*moved))
        slope[index] = (ends[0] - ends[1]) / (2 * EPSILON)
    return slope
