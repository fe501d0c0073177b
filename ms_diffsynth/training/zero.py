"""What the ranks of a job exchange inside a step: gradients, summed once per optimizer step, and a loss.

Gradients travel in buckets: the gradients of parameters that follow each other, in one vector, so that hundreds of LoRA
matrices take one collective and a network of twelve billion weights never a copy of itself. The collectives are
MindSpore's own: HCCL on Ascend, MCCL on the CPU, which has AllReduce (sums only), AllGather and Broadcast, and nothing
else (MindSpore 2.10).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn, ops
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SplitWithSize

from ms_diffsynth import runtime

MOST_ELEMENTS = 16 << 20  # of a bucket: 64 MiB of float32, MindSpore's own limit for joining AllReduces (comm_fusion)

GROUP = 32  # tensors that one operator takes out of a bucket
_cut = SplitWithSize()


@dataclass(frozen=True)
class Bucket:
    """Parameters ``first`` to ``last - 1`` as one vector, with zeros at its end that make it divisible by the ranks."""

    first: int
    last: int
    offsets: tuple[int, ...]  # where each parameter begins, and where the last one ends
    length: int

    def pieces(self, rank: int, ranks: int) -> list[tuple[int, int, int]]:
        """What of the vector is a rank's own part, without zeros: (parameter, begin, end) in its elements, in order."""
        part = self.length // ranks
        begin, end = rank * part, (rank + 1) * part
        found = [(self.first + k, max(begin, a) - a, min(end, b) - a)
                 for k, (a, b) in enumerate(zip(self.offsets, self.offsets[1:]))]
        return [piece for piece in found if piece[1] < piece[2]]


def plan_buckets(sizes: Sequence[int], ranks: int, most: int = MOST_ELEMENTS) -> list[Bucket]:
    """Buckets for parameters of ``sizes`` elements, at most ``most`` elements each; a larger parameter has its own."""
    buckets, first, total = [], 0, 0
    for k, size in enumerate([*sizes, most]):  # the last one only closes the last bucket
        if total and total + size > most:
            offsets = tuple(accumulate(sizes[first:k], initial=0))
            buckets.append(Bucket(first, k, offsets, -(-total // ranks) * ranks))
            first, total = k, 0
        total += size
    return buckets


class Exchange(nn.Cell):
    """Sums gradients over all ranks.

    ``exchange(gradients)`` gives the sums in float32: whole, in their own shapes, or with ``is_sharded`` a vector for
    each bucket, of which a rank has its own part. Compiled and eager. In a process of its own it sends nothing.

    Args:
        parameters: what the gradients are of.
    """

    def __init__(self, parameters: Sequence[Parameter], is_sharded: bool = False):
        super().__init__(auto_prefix=False)
        current = runtime.current()
        self.rank, self.ranks, self.is_sharded = current.rank, current.world_size, is_sharded
        self.can_scatter = current.device != "CPU"
        self.sizes = [int(np.prod(p.shape)) for p in parameters]
        self.buckets = plan_buckets(self.sizes, self.ranks)
        self.shapes = tuple(p.shape for p in parameters)
        # compiled code reads plain tuples
        self.spans = tuple((b.first, b.last, b.offsets, b.length - b.offsets[-1]) for b in self.buckets)
        sizes = [[b - a for a, b in pairwise(bucket.offsets)] for bucket in self.buckets]
        self.pieces = tuple(tuple(tuple(s[i:i + GROUP]) for i in range(0, len(s), GROUP)) for s in sizes)
        self.group_sizes = tuple(tuple(sum(piece) for piece in pieces) + ((span[3],) if span[3] else ())
                                 for pieces, span in zip(self.pieces, self.spans))
        self.own = tuple(tuple(b.pieces(self.rank, self.ranks)) for b in self.buckets)
        self.parts = tuple(b.length // self.ranks for b in self.buckets)
        if self.ranks > 1:
            self.all_reduce, self.all_gather = P.AllReduce(), P.AllGather()
            self.reduce_scatter = P.ReduceScatter() if self.can_scatter else None

    def construct(self, gradients):
        """The sums over all ranks; see the class."""
        summed = ()
        for k in range(len(self.spans)):
            flat = self._flat(gradients, self.spans[k])
            if self.ranks == 1:
                summed = summed + (flat,)
            elif not self.is_sharded:
                summed = summed + self._tensors(self.all_reduce(flat), k)
            elif self.can_scatter:
                summed = summed + (self.reduce_scatter(flat),)
            else:
                part = self.parts[k]
                summed = summed + (self.all_reduce(flat)[self.rank * part:(self.rank + 1) * part],)
        return summed

    def mean(self, loss):
        """The mean over all ranks: float32 scalar."""
        if self.ranks == 1:
            return loss
        return self.all_reduce(loss.reshape((1,))).reshape(()) / self.ranks

    def totals(self, loss, squares):
        """The mean of ``loss`` over all ranks, and the sum of squares of the whole gradients: float32 scalars.

        Args:
            squares: of what this exchange gave.
        """
        if self.ranks == 1 or not self.is_sharded:
            return self.mean(loss), squares
        both = self.all_reduce(ops.stack((loss, squares)))
        return both[0] / self.ranks, both[1]

    def gathered(self, parts):
        """The whole tensors of which every rank has its parts of the buckets, in the order of the parameters."""
        found = ()
        for k in range(len(self.spans)):
            whole = parts[k] if self.ranks == 1 else self.all_gather(parts[k])
            found = found + self._tensors(whole, k)
        return found

    def _flat(self, tensors, span):
        first, last, _, zeros = span
        parts = ()
        for k in range(first, last):
            parts = parts + (tensors[k].astype(ms.float32).reshape((-1,)),)
        if zeros:
            parts = parts + (ops.zeros((zeros,), ms.float32),)
        return ops.cat(parts)

    def _tensors(self, flat, bucket):
        """A bucket's vector as tensors, by two levels of splits: slices would be kernels of the old aclop path on an
        Ascend, and MindSpore 2.10 cannot compile hundreds of results of one operator."""
        k, parts = self.spans[bucket][0], ()
        groups = self._pieces(flat, self.group_sizes[bucket])
        for g in range(len(self.pieces[bucket])):
            found = self._pieces(groups[g], self.pieces[bucket][g])
            for i in range(len(self.pieces[bucket][g])):
                parts = parts + (found[i].reshape(self.shapes[k + i]),)
            k = k + len(self.pieces[bucket][g])
        return parts

    def _pieces(self, vector, sizes):
        return (vector,) if len(sizes) == 1 else _cut(vector, sizes, 0)  # MindSpore 2.10 loses the tuple of one


def exchange_for(parameters: Sequence[Parameter]) -> Exchange | None:
    """What sums gradients over the ranks of this job; None in a process of its own."""
    return Exchange(parameters) if runtime.current().world_size > 1 else None


def broadcast(parameters: Sequence[Parameter]) -> None:
    """Give every rank the values that rank 0 has, in place."""
    if runtime.current().world_size > 1:
        send = P.Broadcast(0)
        for parameter in parameters:
            ops.assign(parameter, send((parameter.value(),))[0].astype(parameter.dtype))
