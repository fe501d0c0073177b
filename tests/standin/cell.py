"""A small cell's loss and gradients: ``python cell.py DEVICE FILE.npz``. Started by `test_device.py`."""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_diffsynth.standin import mark


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


class Cell(nn.Cell):
    """One head of attention, a layer of GELU, and a mean of squares."""

    def __init__(self, dtype: ms.Type):
        super().__init__()
        self.query, self.key, self.value, self.out = (
            Parameter(Tensor(normal(16, 16) * (0.2 + i / 20), dtype), name=n) for i, n in enumerate("qkvo"))
        self.scale = 16 ** -0.5

    def construct(self, x: Tensor) -> Tensor:
        scores = ops.matmul(ops.matmul(x, self.query), ops.matmul(x, self.key).swapaxes(0, 1)) * self.scale
        mixed = ops.matmul(ops.softmax(scores, axis=-1), ops.matmul(x, self.value))
        y = ops.matmul(ops.gelu(mixed + x, approximate="none"), self.out).astype(ms.float32)
        return (y * y).mean()


def marked(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function between two marks, with the device idle at both."""
    ms.runtime.synchronize()
    mark(f"{name} begins")
    result = function(*arguments)
    ms.runtime.synchronize()
    mark(f"{name} ends")
    return result


def main(device: str, path: str) -> None:
    ms.set_device(device)
    found = {}
    marked("nothing", lambda: None)
    for dtype in (ms.float32, ms.bfloat16) if device == "Ascend" else (ms.float32,):
        cell = Cell(dtype)
        x = Tensor(normal(8, 16), dtype)
        for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
            ms.set_context(mode=mode)
            name = f"{dtype}/{'graph' if mode == ms.GRAPH_MODE else 'pynative'}"
            function = ms.value_and_grad(cell, None, cell.trainable_params())
            function(x)  # compiles
            loss, gradients = marked(name, function, x)
            found[f"{name}/loss"] = loss.asnumpy()
            for parameter, gradient in zip(cell.trainable_params(), gradients):
                found[f"{name}/{parameter.name}"] = gradient.astype(ms.float32).asnumpy()
    np.savez(path, **found)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.runtime.launch_blocking()
    function = ms.value_and_grad(cell, None, cell.trainable_params())
    function(x)
    marked("blocking", function, x)


if __name__ == "__main__":
    main(*sys.argv[1:])
