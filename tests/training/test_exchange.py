"""Buckets: every element of every parameter in exactly one rank's part, in order."""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.training.zero import plan_buckets


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(20))
def test_each_element_is_in_one_part(ranks, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, rng.integers(1, 30)).tolist()
    most = int(rng.integers(1, 200))
    buckets = plan_buckets(sizes, ranks, most)
    assert [b.first for b in buckets] == [0, *(b.last for b in buckets[:-1])] and buckets[-1].last == len(sizes)
    for b in buckets:
        total = b.offsets[-1]
        assert total == sum(sizes[b.first:b.last]) and (total <= most or b.last - b.first == 1)
        assert b.length % ranks == 0 and 0 <= b.length - total < ranks
    seen = [(index, k) for b in buckets for rank in range(ranks) for index, begin, end in b.pieces(rank, ranks)
            for k in range(begin, end)]
    assert seen == [(index, k) for index, size in enumerate(sizes) for k in range(size)]
    for b in buckets:
        for rank in range(ranks):
            assert sum(end - begin for _, begin, end in b.pieces(rank, ranks)) <= b.length // ranks


def test_small_parameters_share_a_bucket_and_a_large_one_has_its_own():
    buckets = plan_buckets([3, 3, 100, 3, 3], 2, 10)
    assert [(b.first, b.last, b.length) for b in buckets] == [(0, 2, 6), (2, 3, 100), (3, 5, 6)]
