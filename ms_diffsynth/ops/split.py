"""Tensors in parts of given sizes, with a gradient that PyNative computes right."""
from __future__ import annotations

from mindspore import nn
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SplitWithSize

_split = SplitWithSize()


class Split(nn.Cell):
    """``split(x, sizes)``: the parts of x along ``axis``, views of it in PyNative.

    The gradient of MindSpore 2.10's own primitive joins its parts in PyNative as if each began its memory and were
    contiguous: of one that is a view, such as what `Concat` sends back, it takes other numbers.
    """

    def __init__(self, axis: int):
        super().__init__(auto_prefix=False)
        self.axis, self.join = axis, P.Concat(axis)

    def construct(self, x, sizes):
        return _split(x, sizes, self.axis)

    def bprop(self, x, sizes, out, dout):
        return self.join(dout), 0
