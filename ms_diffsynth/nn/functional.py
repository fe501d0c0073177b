"""Layers as functions of their weights, so that equal blocks of a network are one cell, compiled once.

A block of a network is compiled anew for every cell it stands in, though all its copies compute the same. Here a block
is a cell without weights that takes them as arguments: what depends on the layer (its kind, its constants) is in the
function, what differs between copies is in the tuple. It is also the only form in which MindSpore 2.10 differentiates
a cell with a ``bprop`` by weights: those that are inside give an error in compiled code and zeros in PyNative.

Nothing here has an ``if`` in a function that is compiled; see `ops.network` for the reason.
"""
from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import mindspore as ms
from mindspore import mint, nn, ops
from mindspore.ops import operations as P

from ms_diffsynth.nn.lora import LoRALinear
from ms_diffsynth.nn.quant import StoredLinear
from ms_diffsynth.ops import network

Weights = tuple  # Parameters, or tuples of them


@dataclass(frozen=True)
class Layer:
    """What a layer computes: ``function(x, weights)``; two layers of one ``kind`` compute the same."""

    kind: Hashable
    function: nn.Cell
    weights: Weights


class Linear(nn.Cell):
    def construct(self, x, weights):
        return network.linear(x, weights[0], weights[1])


class LinearWithoutBias(nn.Cell):
    def construct(self, x, weights):
        return network.linear_without_bias(x, weights[0])


class LowRank(nn.Cell):
    """A linear layer with a LoRA: weights are those of the layer, A and B."""

    def __init__(self, base: nn.Cell, scale: float):
        super().__init__(auto_prefix=False)
        self.base, self.scale = base, scale

    def construct(self, x, weights):
        low = network.linear_without_bias(x, weights[1].astype(x.dtype))
        return self.base(x, weights[0]) + network.linear_without_bias(low, weights[2].astype(x.dtype)) * self.scale


class _StoredMatmul(nn.Cell):
    """x (scale q)^T, as `nn.quant` computes it."""

    def construct(self, x, q, scale):
        return network.linear_without_bias(x, _unpack(q, scale, x.dtype))

    def bprop(self, x, q, scale, out, dout):
        weight = _unpack(ops.depend(q, dout), scale, x.dtype)
        return _matmul(dout.reshape(-1, dout.shape[-1]), weight).reshape(x.shape), _zeros_like(q), _zeros_like(scale)


class Stored(nn.Cell):
    """A linear layer whose weight is stored in 8 bits: weights are q, its scale and the bias."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.matmul = _StoredMatmul()

    def construct(self, x, weights):
        return self.matmul(x, weights[0], weights[1]) + weights[2]


class StoredWithoutBias(Stored):
    def construct(self, x, weights):
        return self.matmul(x, weights[0], weights[1])


class RMSNorm(nn.Cell):
    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = eps

    def construct(self, x, weights):
        return network.rms_norm(x, weights[0], self.eps)


_matmul, _zeros_like = P.MatMul(), P.ZerosLike()


def _unpack(q, scale, dtype):
    return (q.astype(ms.float32) * scale.expand_dims(1)).astype(dtype)


def linear(layer: nn.Cell) -> Layer:
    """A linear layer, its LoRA and its storage in 8 bits included.

    Raises: TypeError for any other cell.
    """
    if isinstance(layer, LoRALinear):
        base = linear(layer.base)
        return Layer(("lora", base.kind, layer.scale), LowRank(base.function, layer.scale),
                     (base.weights, layer.lora_A, layer.lora_B))
    bias = () if getattr(layer, "bias", None) is None else (layer.bias,)
    if type(layer) is StoredLinear:
        return Layer(("stored", len(bias)), Stored() if bias else StoredWithoutBias(),
                     (layer.weight, layer.weight_scale, *bias))
    if type(layer) is mint.nn.Linear:
        return Layer(("linear", len(bias)), Linear() if bias else LinearWithoutBias(), (layer.weight, *bias))
    raise TypeError(f"{type(layer).__name__} is no linear layer whose weights are known: expected "
                    "mindspore.mint.nn.Linear, with a LoRA or stored in 8 bits or not.")


def rms_norm(layer: nn.Cell) -> Layer:
    """A norm over the last axis with a weight, such as mindone's RMSNorm."""
    return Layer(("rms_norm", layer.eps), RMSNorm(layer.eps), (layer.weight,))

