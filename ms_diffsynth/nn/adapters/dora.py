"""Weight-decomposed low-rank adaptation: W' = m V / |V|, V = W + (alpha / rank) B A, |V| the norms of its rows.

The norms are constants to the gradient (section 4.3), and m, one number an output feature, starts as the norms of W, so
that W' = W. A row of V that is zero gives zero; peft gives NaN.

|V|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B, summed over the rank: |W|^2 is frozen, so that a step makes nothing
as large as W, and W may be stored in 8 bits. All in float32 but W A^T, which is the layer itself on the rows of A.

Source: Liu et al. 2024 (arXiv:2402.09353), equations 5 and 11; peft 0.21, ``use_dora=True``.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import operations as P

from ms_diffsynth.errors import ConfigError
from ms_diffsynth.formats.adapters import DORA, MAGNITUDE, SMALLEST
from ms_diffsynth.nn.adapters.contract import Uniform
from ms_diffsynth.nn.adapters.layer import AdaptedLinear
from ms_diffsynth.nn.adapters.linear import LinearAdapter
from ms_diffsynth.nn.adapters.lora import matrices
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.nn.quant import StoredProduct
from ms_diffsynth.ops import network

if TYPE_CHECKING:
    from ms_diffsynth.nn.functional import Layer

_matmul, _transpose, _sum, _maximum, _sqrt = P.MatMul(), P.Transpose(), P.ReduceSum(), P.Maximum(), P.Sqrt()


class DoRA(LinearAdapter):
    name, format = "dora", DORA

    def layer(self, base: nn.Cell, name: str, rank: int, scale: float, uniform: Uniform) -> AdaptedLinear:
        if getattr(base, "activation_flag", False):
            raise ConfigError(f"adapter=dora: the layer {name} has an activation inside, which stands between its "
                              "weight and its output. Leave it out of lora_target_modules, or take adapter=lora.")
        norms = np.sqrt(to_numpy(squared_norms(base)))
        return DoRALinear(base, matrices(base, name, rank, uniform) | {MAGNITUDE: norms}, scale, name)

    def size(self, outs: int, ins: int, rank: int) -> int:
        return super().size(outs, ins, rank) + outs


def squared_norms(base: nn.Cell) -> Tensor:
    """|W|^2 of each row, float32 [out], as the weight of a linear layer is stored."""
    squares = _sum(base.weight.astype(ms.float32) ** 2, 1)
    return squares * base.weight_scale ** 2 if hasattr(base, "weight_scale") else squares


class DoRALinear(AdaptedLinear):
    """A linear layer with lora_A [rank, in], lora_B [out, rank] and lora_magnitude_vector [out].

    Attributes:
        squares: float32 [out], the squared norms of the rows of the frozen weight.
    """

    keeps_float32 = True  # a magnitude in bfloat16 would be off by up to 0.4 %, more than most of a training

    def __init__(self, base: nn.Cell, tensors: Mapping[str, np.ndarray], scale: float, name: str):
        super().__init__(base, tensors, scale, name)
        self.squares = Parameter(squared_norms(base), name=f"{name}.lora_squares", requires_grad=False)
        self.has_bias = getattr(base, "bias", None) is not None
        self.weight_changed()

    def weight_changed(self) -> None:
        ops.assign(self.squares, squared_norms(self.base))  # not set_data, see `linear.LinearAdapter.load`
        is_stored = hasattr(self.base, "weight_scale")
        self.compute = Direction(StoredProductOf() if is_stored else ProductOf(), 0, self.scale, 1 + is_stored)
        self.__class__ = StoredDoRALinear if is_stored else DoRALinear

    def construct(self, x):
        y = self.compute(x, self.weights(), (_transpose(self.lora_A, (1, 0)), _transpose(self.lora_B, (1, 0)),
                                             self.lora_magnitude_vector))
        if self.has_bias:
            y = y + self.base.bias
        return y

    def weights(self):
        return self.base.weight, self.squares

    @property
    def frozen(self) -> tuple[Parameter, ...]:
        return (self.squares,)

    def function(self, base: Layer, place: int) -> nn.Cell:
        squares = len(base.weights)
        direction = Direction(self.compute.product, place, self.scale, squares)
        return Shifted(direction, squares - 1) if self.has_bias else direction


class StoredDoRALinear(DoRALinear):
    """The same on a weight in 8 bits."""

    def weights(self):
        return self.base.weight, self.base.weight_scale, self.squares


class ProductOf(nn.Cell):
    """x W^T with weights (W, ...)."""

    def construct(self, x, weights):
        return network.linear_without_bias(x, weights[0])


class StoredProductOf(nn.Cell):
    """The same with weights (q, its scale, ...), see `nn.quant`."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.product = StoredProduct()

    def construct(self, x, weights):
        return self.product(x, weights[0], weights[1])


class Direction(nn.Cell):
    """m / |V| (W x + s B A x). Tensors, all float32: ``tensors[place]`` A^T [in, r], then B^T [r, out] and m [out].

    Args:
        product: x W^T. scale: s. squares: which of the weights |W|^2 is.
    """

    def __init__(self, product: nn.Cell, place: int, scale: float, squares: int):
        super().__init__(auto_prefix=False)
        self.product, self.place, self.scale, self.squares = product, place, scale, squares

    def construct(self, x, weights, tensors):
        x, same = network.shared(x, 2)
        down, up = tensors[self.place], tensors[self.place + 1] * self.scale
        # depends on x: else what is unpacked of 8 bits would be made for all layers when a step begins
        rows = ops.depend(_transpose(down, (1, 0)), same)
        both = self.product(rows.astype(x.dtype), weights).astype(ms.float32) * 2 + _matmul(_matmul(rows, down), up)
        squares = _maximum(weights[self.squares] + _sum(both * up, 0), SMALLEST)
        factor = tensors[self.place + 2] / ops.stop_gradient(_sqrt(squares))
        y = network.add_low_rank(self.product(x, weights), same, down.astype(x.dtype), up.astype(x.dtype))
        y, again = network.shared(y, 2)
        return y + again * (factor - 1).astype(x.dtype)  # a factor near 1 would lose its digits in bfloat16


class Shifted(nn.Cell):
    """A layer and its bias, ``weights[place]``."""

    def __init__(self, layer: nn.Cell, place: int):
        super().__init__(auto_prefix=False)
        self.layer, self.place = layer, place

    def construct(self, x, weights, tensors):
        return self.layer(x, weights, tensors) + weights[self.place]
