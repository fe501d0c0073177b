"""The blocks of image networks by joined kernels give what mindone's own methods give: values and gradients, compiled
and not. Whole networks are compared with PyTorch by tests/pipelines.

Tolerance: float32, 1e-5 of a tensor's largest element, or of the largest gradient of all where exact arithmetic gives
zero (the bias of a key).
"""
from __future__ import annotations

import inspect

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ms_diffsynth.ops import native_kernels

pytestmark = pytest.mark.skipif(not native_kernels(), reason="without native kernels mindone's own methods run")


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def resnet(**changed):
    from mindone.diffusers.models.resnet import ResnetBlock2D
    return ResnetBlock2D(**{"in_channels": 8, "out_channels": 12, "temb_channels": 6, "groups": 4} | changed)


def attention(**changed):
    from mindone.diffusers.models.attention_processor import Attention
    return Attention(**{"query_dim": 8, "heads": 2, "dim_head": 4, "bias": True, "eps": 1e-5} | changed)


PIXELS, TIME, TOKENS, TEXT = draw(2, 8, 4, 6), draw(2, 6), draw(2, 5, 8), draw(2, 3, 10)
CASES = {
    "time": (resnet, {}, (PIXELS, TIME)),
    "same channels": (resnet, {"out_channels": None, "output_scale_factor": 1.4}, (PIXELS, TIME)),
    "time not activated": (resnet, {"skip_time_act": True}, (PIXELS, TIME)),
    "no time": (resnet, {"temb_channels": None}, (PIXELS, None)),
    "up": (resnet, {"up": True}, (PIXELS, TIME)),
    "down": (resnet, {"down": True}, (PIXELS, TIME)),
    "attention of pixels": (attention, {"norm_num_groups": 2, "residual_connection": True,
                                        "rescale_output_factor": 1.3}, (PIXELS,)),
    "attention of tokens": (attention, {"norm_num_groups": 2}, (TOKENS,)),
    "attention to text": (attention, {"cross_attention_dim": 10}, (TOKENS, TEXT)),
}
WITHOUT = {  # what the joined kernels leave to mindone
    "scale and shift": (resnet, {"time_embedding_norm": "scale_shift"}, (PIXELS, TIME)),
    "mish": (resnet, {"non_linearity": "mish"}, (PIXELS, TIME)),
    "keys normalised": (attention, {"qk_norm": "layer_norm"}, (TOKENS,)),
}


class Given(nn.Cell):
    """A block with its inputs; ``method`` is what computes it."""

    def __init__(self, block, inputs, method):
        super().__init__()
        self.block, self.method = block, method
        self.rest = tuple(None if x is None else Tensor(x) for x in inputs[1:])

    def construct(self, x):
        return (self.method(self.block, x, *self.rest) ** 2).sum()


def built(make, changed):
    block = make(**changed)
    for k, p in enumerate(block.trainable_params()):
        p.set_data(Tensor(draw(*p.shape) * 0.3 + (0.5 if "norm" in p.name and p.name.endswith("weight") else 0)))
        p.name = f"{k}.{p.name}"
    return block


def methods(block):
    """Ours and mindone's, as functions of the block and its inputs."""
    if not hasattr(block, "processor"):
        ours = type(block).construct
        return ours, inspect.getclosurevars(ours).nonlocals["original"]
    processor = block.processor
    ours = type(processor).__call__
    original = inspect.getclosurevars(ours).nonlocals["original"]

    def by_mindone(block, *inputs):
        return original(processor, block, *inputs)

    def by_us(block, *inputs):
        return ours(processor, block, *inputs)

    return by_us, by_mindone


@pytest.mark.few(2)  # in graph mode; the others are slow
@pytest.mark.parametrize("case", [*CASES, *WITHOUT])
@pytest.mark.parametrize("compiled", [True, False], ids=["graph", "pynative"])
def test_a_block_is_what_mindone_computes(case, compiled):
    make, changed, inputs = {**CASES, **WITHOUT}[case]
    block = built(make, changed)
    weights = ms.ParameterTuple(block.trainable_params())
    found = []
    for method in methods(block):
        gradient = ms.value_and_grad(Given(block, inputs, method), 0, weights)
        value, (dx, dweights) = (ms.jit(gradient) if compiled else gradient)(Tensor(inputs[0]))
        found.append([value.asnumpy(), dx.asnumpy(), *(g.asnumpy() for g in dweights)])
    largest = max(abs(g).max() for g in found[1][1:])
    assert largest > 0
    for ours, theirs in zip(*found, strict=True):
        assert abs(ours - theirs).max() <= 1e-5 * max(abs(theirs).max(), 0.1 * largest)


MASK = {"mask": (attention, {}, (TOKENS, None, np.float32([[0, 0, -1e4, 0, 0]] * 2)))}  # mindone's own way fails


@pytest.mark.parametrize("case", [*CASES, *WITHOUT, *MASK])
def test_mindone_computes_what_no_kernel_covers_and_only_that(case):
    from ms_diffsynth.ops.cpu.native import blocks
    make, changed, inputs = {**CASES, **WITHOUT, **MASK}[case]
    block, asked = built(make, changed), []

    def original(*given):
        asked.append(given)
        return None

    given = [None if x is None else Tensor(x) for x in inputs]
    if make is resnet:
        blocks.resnet_block(original)(block, *given)
    else:
        blocks.attention(original)(block.processor, block, *given)
    assert bool(asked) == (case not in CASES)
