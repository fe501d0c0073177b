"""Draws depend on what they are for and on nothing else, and never change between versions."""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError

KINDS = ("normal", "uniform")
NORMAL = [[0.671653986, -0.775167048, 0.440511882], [-0.269591779, 1.47672737, -1.71567321]]
UNIFORM = [[0.63714534, 0.808410883, 0.144364595]]
PERMUTATION = [3, 6, 2, 7, 5, 4, 1, 0]


def draw(kind, seed=5, stream="noise", indices=(0,), shape=(4,)):
    return getattr(Draws(seed), kind)(stream, np.array(indices, np.int64), shape)


def test_the_numbers_of_this_version():
    """If this fails, every resumed run and every published seed changes: raise the major version, and say so."""
    found = draw("normal", 0, "noise", [0, 2**40], (3,))
    wanted = np.array(NORMAL, np.float32)
    assert np.array_equal(found, wanted)
    found = draw("uniform", 2**64 - 1, "density_draw", [7], (3,))
    wanted = np.array(UNIFORM, np.float32)
    assert np.array_equal(found, wanted)
    assert Draws(3).permutation("order", 1, 8).tolist() == PERMUTATION


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (2, 3, 5)])
def test_a_row_depends_on_its_sample_alone(kind, shape):
    together = draw(kind, indices=[3, 9, 4], shape=shape)
    assert together.shape == (3, *shape)
    assert together.dtype == np.float32
    for row, index in zip(together, (3, 9, 4)):
        assert np.array_equal(row, draw(kind, indices=[index], shape=shape)[0])
    assert np.array_equal(together[::-1], draw(kind, indices=[4, 9, 3], shape=shape))


def test_what_was_drawn_before_does_not_matter():
    draws = Draws(5)
    draws.normal("noise", np.array([1, 2]), (100,))
    draws.permutation("noise", 0, 10)
    assert np.array_equal(draws.normal("noise", np.array([0]), (4,)), draw("normal"))


@pytest.mark.parametrize("kind", KINDS)
def test_streams_seeds_and_samples_share_no_numbers(kind):
    shape = (500,)
    rows = [draw(kind, 5, "noise", [0, 1, 2**40], shape), draw(kind, 5, "posterior_noise", [0], shape),
            draw(kind, 6, "noise", [0], shape)]
    rows = np.concatenate(rows)
    for i in range(len(rows)):
        for j in range(i):
            # 500 numbers in some 2^24: a pair of rows may meet by chance in 0.015 places on average, not in two
            assert len(np.intersect1d(rows[i], rows[j])) < 2
            assert abs(np.corrcoef(rows[i], rows[j])[0, 1]) < 0.2  # 4.5 standard deviations


def test_permutations_are_not_the_numbers_of_samples_and_change_with_the_epoch():
    orders = [Draws(5).permutation("order", epoch, 50) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(o) for o in orders}) == 3
    assert np.array_equal(orders[1], Draws(5).permutation("order", 1, 50))
    generator = Draws(5)._generator("order", 0, 0)
    assert not np.array_equal(orders[0], generator.permutation(50))


def test_distributions():
    normal, uniform = draw("normal", shape=(100_000,))[0], draw("uniform", shape=(100_000,))[0]
    assert abs(normal.mean()) < 0.015  # five standard errors
    assert abs(normal.std() - 1) < 0.012
    assert abs(uniform.mean() - 0.5) < 0.005
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_seeds_that_do_not_fit_and_samples_that_do_not_exist():
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match="seed="):
            Draws(seed)
    with pytest.raises(ValueError, match="sample index -1"):
        draw("normal", indices=[-1])
