"""Low-rank adaptation: y = W x + (alpha / rank) B A x, with A and B in float32 whatever W is stored in.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; initialisation of peft 0.15 (A uniform in +-1/sqrt(in), B zero).
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from mindspore import mint, nn

from ms_diffsynth.errors import ConfigError
from ms_diffsynth.formats.adapters import LORA
from ms_diffsynth.nn.adapters.contract import Uniform
from ms_diffsynth.nn.adapters.layer import AdaptedLinear
from ms_diffsynth.nn.adapters.linear import LinearAdapter
from ms_diffsynth.ops import network

if TYPE_CHECKING:
    from ms_diffsynth.nn.functional import Layer


class LoRA(LinearAdapter):
    name, format = "lora", LORA

    def layer(self, base: nn.Cell, name: str, rank: int, scale: float, uniform: Uniform) -> AdaptedLinear:
        return LoRALinear(base, matrices(base, name, rank, uniform), scale, name)


def matrices(base: nn.Cell, name: str, rank: int, uniform: Uniform) -> dict[str, np.ndarray]:
    """A float32 [rank, in] and B float32 [out, rank] at their start. Raises: ConfigError: a rank beyond both."""
    outs, ins = base.weight.shape
    if rank > max(outs, ins):
        raise ConfigError(f"lora_rank={rank} is larger than the layer {name} [{outs}, {ins}]: expected at most its "
                          "larger side; with the smaller one a LoRA can be any matrix. Typical ranks are 4 to 64.")
    bound = 1 / np.sqrt(ins)
    return {"lora_A.weight": ((2 * uniform(name, (rank, ins)) - 1) * bound).astype(np.float32),
            "lora_B.weight": np.zeros((outs, rank), np.float32)}


class LoRALinear(AdaptedLinear):
    """A linear layer with lora_A [rank, in] and lora_B [out, rank]; the output has the dtype of the input."""

    def construct(self, x):
        low = mint.nn.functional.linear(x, self.lora_A.astype(x.dtype))
        return self.base(x) + mint.nn.functional.linear(low, self.lora_B.astype(x.dtype)) * self.scale

    def function(self, base: Layer, place: int) -> nn.Cell:
        return LowRank(base.function, place) if self.scale == 1 else ScaledLowRank(base.function, place, self.scale)


class LowRank(nn.Cell):
    """A linear layer with a LoRA of scale 1, whose matrices are ``tensors[place]`` [in, r] and ``tensors[place + 1]``
    [r, out]."""

    def __init__(self, base: nn.Cell, place: int):
        super().__init__(auto_prefix=False)
        self.base, self.place = base, place

    def construct(self, x, weights, tensors):
        x, same = network.shared(x, 2)
        return network.add_low_rank(self.base(x, weights, tensors), same, tensors[self.place],
                                    tensors[self.place + 1])


class ScaledLowRank(LowRank):
    """The same with another scale."""

    def __init__(self, base: nn.Cell, place: int, scale: float):
        super().__init__(base, place)
        self.scale = scale

    def construct(self, x, weights, tensors):
        x, same = network.shared(x, 2)
        return network.add_low_rank(self.base(x, weights, tensors), same, tensors[self.place],
                                    tensors[self.place + 1] * self.scale)
