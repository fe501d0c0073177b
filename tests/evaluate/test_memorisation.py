"""Nearest neighbours, the limit, and copies."""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.evaluate import memorisation
from ms_diffsynth.evaluate.memorisation import neighbours


def points(seed, count, size=20):
    return np.random.default_rng(seed).normal(size=(count, size))


@pytest.mark.parametrize("rows", [3, 1000])
def test_neighbours_and_limit_are_those_of_every_pair_written_out(monkeypatch, rows):
    monkeypatch.setattr(memorisation, "_ROWS", rows)
    x, y = points(0, 11), points(1, 40)
    table = np.array([[np.linalg.norm(a - b) for b in y] for a in x])
    found = neighbours(x, y)
    assert np.array_equal(found.index, table.argmin(1)) and np.allclose(found.distance, table.min(1))
    own = [min(np.linalg.norm(a - b) for j, b in enumerate(y) if i != j) for i, a in enumerate(y)]
    assert found.limit == pytest.approx(np.quantile(own, 0.05)) and found.twins == 0
    assert np.allclose(found.closeness, found.distance / found.limit)


def test_copies_are_found_and_others_are_not():
    y = points(2, 200)
    x = np.concatenate([y[[5, 17, 17]], y[[30]] + 0.01, points(3, 50) + 3])
    found = neighbours(x, y)
    assert found.index[:4].tolist() == [5, 17, 17, 30]
    assert found.is_near.tolist() == [True] * 4 + [False] * 50


def test_a_set_nobody_learned_from_is_rarely_near():
    shares = [neighbours(points(2 * k, 200), points(2 * k + 1, 200)).is_near.mean() for k in range(20)]
    assert 0.02 < np.mean(shares) < 0.1


def test_twins_in_the_reference_do_not_hide_copies():
    y = points(4, 30)
    doubled = np.concatenate([y, y[:10]])
    found = neighbours(y[:3], doubled)
    assert found.twins == 20 and found.is_near.all()
    once = neighbours(y[:3], y)
    assert 0.5 * once.limit < found.limit < 2 * once.limit


def test_a_reference_of_one_picture_many_times_has_a_limit_above_zero():
    found = neighbours(np.ones((2, 5)), np.ones((6, 5)))
    assert found.twins == 6 and found.limit > 0 and found.is_near.all() and np.all(np.isfinite(found.closeness))
