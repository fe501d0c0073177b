"""PyTorch's names and shapes for MindSpore's layers; weights in and out."""
from __future__ import annotations

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Tensor, mint, nn

from ms_diffsynth.nn.names import (
    assign,
    state_dict,
    to_numpy,
    torch_parameters,
    torch_shapes,
    trainable_parameters,
)


class Mixed(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((4,))
        self.group = mint.nn.GroupNorm(2, 4)
        self.conv = nn.Conv1d(4, 3, 2, has_bias=True)
        self.linear = mint.nn.Linear(4, 2)


def test_names_and_shapes_are_pytorchs():
    assert torch_shapes(Mixed()) == {
        "embed.weight": (5, 4), "norm.weight": (4,), "norm.bias": (4,), "group.weight": (4,), "group.bias": (4,),
        "conv.weight": (3, 4, 2), "conv.bias": (3,), "linear.weight": (2, 4), "linear.bias": (2,)}


def test_buffers_do_not_learn():
    cell = nn.SequentialCell(mint.nn.Linear(4, 2), nn.BatchNorm2d(2), nn.SequentialCell(Mixed()))
    cell[2][0].buffer_names = ("conv.bias", "linear.weight")
    lost = set(torch_parameters(cell)) - set(trainable_parameters(cell))
    assert lost == {"1.running_mean", "1.running_var", "2.0.conv.bias", "2.0.linear.weight"}


def test_what_is_assigned_comes_back_and_dtype_is_set():
    rng, cell = np.random.default_rng(0), Mixed()
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in torch_shapes(cell).items()}
    assign(cell, weights.items())
    for name, value in state_dict(cell).items():
        np.testing.assert_array_equal(value, weights[name])
    assign(cell, weights.items(), ms.float16)
    assert {p.dtype for p in torch_parameters(cell).values()} == {ms.float16}


def test_a_copy_is_a_copy_and_bfloat16_is_kept():
    tensor = ms.Parameter(Tensor([1.0, 2.0]), name="x")
    copy = to_numpy(tensor)
    tensor.set_data(Tensor([3.0, 4.0]))
    assert copy.tolist() == [1, 2]
    half = to_numpy(Tensor([1.0, 2.5], ms.bfloat16))
    assert half.dtype == ml_dtypes.bfloat16 and half.astype(np.float32).tolist() == [1, 2.5]
