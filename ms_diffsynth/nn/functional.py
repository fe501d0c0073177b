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

from mindspore import Parameter, mint, nn

from ms_diffsynth.nn.adapters.flat import BlockTensors, NoTensors
from ms_diffsynth.nn.adapters.layer import AdaptedLinear
from ms_diffsynth.nn.quant import StoredLinear, StoredProduct
from ms_diffsynth.ops import network

Weights = tuple  # Parameters, or tuples of them


@dataclass(frozen=True)
class Layer:
    """What a layer computes: ``function(x, weights, lora)``; two layers of one ``kind`` compute the same.

    ``lora`` are the tensors of the adapters of the layer's block, as `nn.adapters.flat.BlockTensors` gives them. With
    ``adapter`` (the cell of an adapter) ``function`` leaves it out: `functions` puts it in.
    """

    kind: Hashable
    function: nn.Cell
    weights: Weights
    adapter: AdaptedLinear | None = None


class Linear(nn.Cell):
    def construct(self, x, weights, lora):
        return network.linear(x, weights[0], weights[1])


class LinearWithoutBias(nn.Cell):
    def construct(self, x, weights, lora):
        return network.linear_without_bias(x, weights[0])


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


class LayerNorm(nn.Cell):
    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps

    def construct(self, x, weights, lora):
        return network.layer_norm(x, weights[0], weights[1], self.eps)


class RMSNorm(nn.Cell):
    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps

    def construct(self, x, weights, lora):
        return network.rms_norm(x, weights[0], self.eps)


class Value(nn.Cell):
    """A Parameter that a block has beside its layers."""

    def construct(self, x, weights, lora):
        return weights[0]


def layer_of(cell: nn.Cell | Parameter) -> Layer:
    """What a cell computes: a linear layer, its adapter and its storage in 8 bits included, a LayerNorm with weight and
    bias, or mindone's RMSNorm; or a Parameter as it is.

    Raises: TypeError for any other cell.
    """
    if isinstance(cell, Parameter):
        return Layer(("value", tuple(cell.shape)), Value(), (cell,))
    if isinstance(cell, AdaptedLinear):
        base = layer_of(cell.base)
        return replace(base, kind=cell.kind(base.kind), weights=(*base.weights, *cell.frozen), adapter=cell)
    if type(cell).__name__ == "RMSNorm":  # mindone's, which this layer of the package may not import
        return Layer(("rms_norm", cell.eps), RMSNorm(cell.eps), (cell.weight,))
    if type(cell) is mint.nn.LayerNorm:
        return Layer(("layer_norm", cell.eps), LayerNorm(cell.eps), (cell.weight, cell.bias))
    bias = () if getattr(cell, "bias", None) is None else (cell.bias,)
    if type(cell) is StoredLinear:
        return Layer(("stored", len(bias)), Stored() if bias else StoredWithoutBias(),
                     (cell.weight, cell.weight_scale, *bias))
    if type(cell) is mint.nn.Linear:
        return Layer(("linear", len(bias)), Linear() if bias else LinearWithoutBias(), (cell.weight, *bias))
    raise TypeError(f"{type(cell).__name__} is not a layer whose weights are known: expected mindone's RMSNorm, "
                    "mindspore.mint.nn.LayerNorm, or mindspore.mint.nn.Linear, with an adapter or stored in 8 bits "
                    "or not.")


def functions(layers: Sequence[Layer]) -> list[nn.Cell]:
    """The functions of a block's layers with their adapters, and the cell that gives the tensors of these."""
    found, adapted, place = [], [], 0
    for layer in layers:
        cell, function = layer.adapter, layer.function
        if cell is not None:
            function = cell.function(layer_of(cell.base), place)
            adapted.append(cell)
            place += len(cell.parts)
        found.append(function)
    return [*found, BlockTensors(adapted) if adapted else NoTensors()]
