"""Layers as functions of their weights, so that equal blocks of a network are one cell, compiled once.

A block of a network is compiled anew for every cell it stands in, though all its copies compute the same. Here a block
is a cell without weights that takes them as arguments: what depends on the layer (its kind, its constants) is in the
function, what differs between copies is in the tuple. It is also the only form in which MindSpore 2.10 differentiates
a cell with a ``bprop`` by weights: those that are inside give an error in compiled code and zeros in PyNative.

Nothing here has an ``if`` in a function that is compiled; see `ops.network` for the reason.
"""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from mindspore import mint, nn

from ms_diffsynth.nn.lora import LoRALinear, LoRAMatrices, NoMatrices
from ms_diffsynth.nn.quant import StoredLinear, StoredProduct
from ms_diffsynth.ops import network

Weights = tuple  # Parameters, or tuples of them


@dataclass(frozen=True)
class Layer:
    """What a layer computes: ``function(x, weights, lora)``; two layers of one ``kind`` compute the same.

    ``lora`` are the LoRA matrices of the layer's block, as `nn.lora.LoRAMatrices` gives them. With ``lora`` (the cell
    of a LoRA) ``function`` leaves it out: `LowRank` adds it.
    """

    kind: Hashable
    function: nn.Cell
    weights: Weights
    lora: LoRALinear | None = None


class Linear(nn.Cell):
    def construct(self, x, weights, lora):
        return network.linear(x, weights[0], weights[1])


class LinearWithoutBias(nn.Cell):
    def construct(self, x, weights, lora):
        return network.linear_without_bias(x, weights[0])


class LowRank(nn.Cell):
    """A linear layer with a LoRA of scale 1, whose matrices are ``lora[place]`` [in, r] and ``lora[place + 1]``
    [r, out]."""

    def __init__(self, base: nn.Cell, place: int):
        super().__init__(auto_prefix=False)
        self.base, self.place = base, place

    def construct(self, x, weights, lora):
        x, same = network.shared(x, 2)
        return self.base(x, weights, lora) + network.low_rank(same, lora[self.place], lora[self.place + 1])


class ScaledLowRank(LowRank):
    """The same with another scale."""

    def __init__(self, base: nn.Cell, place: int, scale: float):
        super().__init__(base, place)
        self.scale = scale

    def construct(self, x, weights, lora):
        x, same = network.shared(x, 2)
        return self.base(x, weights, lora) + network.low_rank(same, lora[self.place], lora[self.place + 1] * self.scale)


class Stored(nn.Cell):
    """A linear layer whose weight is stored in 8 bits: weights are q, its scale and the bias."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.product = StoredProduct()

    def construct(self, x, weights, lora):
        return self.product(x, weights[0], weights[1]) + weights[2]


class StoredWithoutBias(Stored):
    def construct(self, x, weights, lora):
        return self.product(x, weights[0], weights[1])


class RMSNorm(nn.Cell):
    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps

    def construct(self, x, weights, lora):
        return network.rms_norm(x, weights[0], self.eps)


def layer_of(cell: nn.Cell) -> Layer:
    """What a cell computes: a linear layer, its LoRA and its storage in 8 bits included, or mindone's RMSNorm.

    Raises: TypeError for any other cell.
    """
    if isinstance(cell, LoRALinear):
        base = layer_of(cell.base)
        return replace(base, kind=("lora", base.kind, cell.scale, cell.shapes), lora=cell)
    if type(cell).__name__ == "RMSNorm":  # mindone's, which this layer of the package may not import
        return Layer(("rms_norm", cell.eps), RMSNorm(cell.eps), (cell.weight,))
    bias = () if getattr(cell, "bias", None) is None else (cell.bias,)
    if type(cell) is StoredLinear:
        return Layer(("stored", len(bias)), Stored() if bias else StoredWithoutBias(),
                     (cell.weight, cell.weight_scale, *bias))
    if type(cell) is mint.nn.Linear:
        return Layer(("linear", len(bias)), Linear() if bias else LinearWithoutBias(), (cell.weight, *bias))
    raise TypeError(f"{type(cell).__name__} is not a layer whose weights are known: expected mindone's RMSNorm or "
                    "mindspore.mint.nn.Linear, with a LoRA or stored in 8 bits or not.")


def functions(layers: Sequence[Layer]) -> list[nn.Cell]:
    """The functions of a block's layers with their LoRAs, and the cell that gives the matrices of these."""
    found, loras = [], []
    for layer in layers:
        function, place = layer.function, 2 * len(loras)
        if layer.lora is not None:
            loras.append(layer.lora)
            scale = layer.lora.scale
            function = LowRank(function, place) if scale == 1 else ScaledLowRank(function, place, scale)
        found.append(function)
    return [*found, LoRAMatrices(loras) if loras else NoMatrices()]
