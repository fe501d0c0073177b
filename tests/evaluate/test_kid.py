"""Kernel inception distance against sums written out, on distributions whose distance is known, and its interval."""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.evaluate.kid import MOST, drawn, floor, kernel, kid


def draw(rng, count, shift=0.0, size=12):
    """Features as a network's: not negative, correlated."""
    mix = np.random.default_rng(5).normal(size=(size, size)) / 4
    return np.maximum(rng.normal(size=(count, size)) @ mix + shift * np.linspace(-1, 1, size), 0)


def brute_force(x, y):
    """The unbiased estimate of Binkowski et al. 2018, one pair at a time."""
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3

    def within(z):
        pairs = [k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        return sum(pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_the_value_is_that_of_the_sums_written_out():
    rng = np.random.default_rng(0)
    x, y = draw(rng, 7, 0.5), draw(rng, 9)
    assert kid(x, y).value == pytest.approx(brute_force(x, y), rel=1e-12)


def test_a_value_by_hand():
    # one number each, kernel (x y + 1)^3: pairs within x give 1, within y 8, across 1
    assert kid(np.zeros((3, 1)), np.ones((4, 1))).value == pytest.approx(1 + 8 - 2)
    assert kernel(np.array([[2.0, 0.0]]), np.array([[3.0, 5.0]])) == pytest.approx((6 / 2 + 1) ** 3)


def test_the_interval_is_the_jackknife_written_out():
    rng = np.random.default_rng(1)
    x, y = draw(rng, 6, 0.5), draw(rng, 8)
    variance = 0.0
    for n, left_out in ((6, [kid(np.delete(x, i, 0), y).value for i in range(6)]),
                        (8, [kid(x, np.delete(y, i, 0)).value for i in range(8)])):
        variance += (n - 1) / n * np.sum((left_out - np.mean(left_out)) ** 2)
    found = kid(x, y)
    assert found.high - found.value == pytest.approx(1.96 * np.sqrt(variance), rel=1e-9)
    assert found.value - found.low == pytest.approx(1.96 * np.sqrt(variance), rel=1e-9)


def test_unbiased_one_distribution_gives_zero_on_average():
    rng = np.random.default_rng(2)
    values = [kid(draw(rng, 20), draw(rng, 30)).value for _ in range(400)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)


def test_a_growing_shift_gives_a_growing_distance():
    rng = np.random.default_rng(3)
    noise, reference = np.random.default_rng(4), draw(rng, 150)
    state = noise.bit_generator.state
    values = []
    for shift in (0, 0.1, 0.2, 0.4, 0.8, 1.6):
        noise.bit_generator.state = state
        values.append(kid(draw(noise, 150, shift), reference).value)
    assert values == sorted(values) and abs(values[0]) < 0.02 and values[-1] > 1


def test_the_order_of_pictures_and_of_sets_does_not_matter():
    rng = np.random.default_rng(6)
    x, y = draw(rng, 20, 0.3), draw(rng, 30)
    found = kid(x, y)
    for other in (kid(rng.permutation(x), rng.permutation(y)), kid(y, x)):
        assert (other.value, other.low) == pytest.approx((found.value, found.low), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
def test_the_interval_holds_the_truth(shift):
    rng = np.random.default_rng(7)
    found = [kid(draw(rng, 30, shift), draw(rng, 40)) for _ in range(400)]
    values = np.array([e.value for e in found])
    truth = values.mean() if shift else 0.0  # the estimate is unbiased
    # 95 % is meant; the skew of these features costs some far from zero: 0.90 for 0.6, 0.95 and more for the others
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.88
    assert np.mean([e.high - e.low for e in found]) < 1.7 * 3.92 * values.std()  # not wide for safety's sake


@pytest.mark.parametrize("count", [4, 5, 40])
def test_the_floor_is_where_halves_of_one_set_are(count):
    y = draw(np.random.default_rng(8), count)
    rng, values = np.random.default_rng(9), []
    for _ in range(1000):
        order = rng.permutation(count)
        values.append(brute_force(y[order[: count // 2]], y[order[count // 2 :]]) if count < 10 else
                      kid(y[order[: count // 2]], y[order[count // 2 :]]).value)
    expected = np.quantile(values, (0.025, 0.975))
    found = floor(y)
    assert np.allclose(found, expected, atol=0.15 * (expected[1] - expected[0]))
    assert found[0] < 0 < found[1] and found == floor(y) and np.all(np.isfinite(found))


def test_real_pictures_of_one_kind_are_within_the_floor_and_others_above():
    rng = np.random.default_rng(10)
    y = draw(rng, 100)
    assert kid(draw(rng, 60), y).value < floor(y)[1] < kid(draw(rng, 60, 1.0), y).value


def test_large_sets_are_drawn_from():
    y = np.arange(MOST + 7.0)[:, None]
    found = drawn(y, 3)
    assert len(np.unique(found)) == MOST and np.array_equal(found, drawn(y, 3))
    assert not np.array_equal(found, drawn(y, 4)) and drawn(y[:9], 3) is not None and len(drawn(y[:9], 3)) == 9
