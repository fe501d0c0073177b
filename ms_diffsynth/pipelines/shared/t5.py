"""What mindone's T5 and UMT5 text encoders need to compute what transformers' do, on every device."""
from __future__ import annotations

import functools

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


@functools.cache
def bucket(distance: int, buckets: int, max_distance: int) -> int:
    """The bucket of a distance from query to key, in tokens, where attention looks both ways. Integers only.

    A half of the buckets is for keys behind the query. Of each half, one half holds one distance each, n of them, and
    the other the distances up to m = ``max_distance`` in logarithmic steps: d is in step floor(n log(d/n) / log(m/n)).
    A logarithm that is one bit too small puts d = 16, 32 and 64 into the step below, as MindSpore 2.10's does on the
    CPU, so the steps are compared as powers: d^n n^k >= m^k n^n is the same as n log(d / n) >= k log(m / n).

    Source: Raffel et al. 2020 (1910.10683), section 2.1; transformers 4.57.1, T5Attention._relative_position_bucket.
    """
    half = buckets // 2
    n, d = half // 2, abs(distance)
    steps = half - n
    inner = d
    if d >= n:
        step = 0
        while step < steps - 1 and d**steps * n ** (step + 1) >= max_distance ** (step + 1) * n**steps:
            step += 1
        inner = n + step
    return inner + (half if distance > 0 else 0)


@ops.constexpr
def bucket_table(queries: int, keys: int, buckets: int, max_distance: int) -> Tensor:
    """The bucket of every pair of positions, a constant: int32 [queries, keys]."""
    of_distance = np.array([bucket(d, buckets, max_distance) for d in range(1 - queries, keys)], np.int32)
    return Tensor(of_distance[np.arange(keys)[None, :] - np.arange(queries)[:, None] + queries - 1])


class _ExactBuckets:
    """Mixed into an attention of T5 or UMT5 that has a relative bias: its buckets come from the host."""

    def compute_bias(self, query_length, key_length, cache_position=None):
        # an encoder has as many queries as keys; in compiled code query_length is a Tensor
        table = bucket_table(key_length, key_length, self.relative_attention_num_buckets,
                             self.relative_attention_max_distance)
        return self.relative_attention_bias(table).permute((2, 0, 1)).expand_dims(0)


def with_exact_buckets(encoder: nn.Cell) -> nn.Cell:
    """``encoder``, a T5 or UMT5 encoder, with `bucket_table` in every layer that has relative positions."""
    for _, cell in encoder.cells_and_names():
        has_positions = getattr(cell, "has_relative_attention_bias", False) and not cell.is_decoder
        if has_positions and not isinstance(cell, _ExactBuckets):
            cell.__class__ = type(f"Exact{type(cell).__name__}", (_ExactBuckets, type(cell)), {})
    return encoder


def weight_dtype(name: str, dtype: ms.Type) -> ms.Type:
    """The dtype of a weight in a network that computes in ``dtype``: in float16 the products with ``wo`` overflow.

    Source: transformers 4.57.1, T5PreTrainedModel._keep_in_fp32_modules, which holds for float16 alone.
    """
    return ms.float32 if dtype == ms.float16 and ".wo." in name else dtype
