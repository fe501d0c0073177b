"""The loss chart: ticks, and that the lines lie where they should."""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.data import loss_curve
from ms_diffsynth.data.plots import nice_ticks
from ms_diffsynth.errors import DataError


@pytest.mark.parametrize("low, high", [(0, 1), (0.13, 0.97), (1, 1200), (-3, 4), (1e-9, 3e-9), (5, 5), (0, 0)])
def test_ticks_are_round_and_enclose(low, high):
    ticks = nice_ticks(low, high, 6)
    steps = np.diff(ticks)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 9
    mantissa = steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert np.allclose(steps, steps[0]) and min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


def blue(image):
    pixels = np.asarray(image).astype(int)
    return np.nonzero((pixels[64:420, 80:770, 2] - pixels[64:420, 80:770, 0]) > 150)


def test_a_falling_loss_falls_on_the_page():
    image = loss_curve(range(100), np.linspace(2, 1, 100))
    assert image.size == (800, 480) and image.mode == "RGB"
    y, x = blue(image)
    assert y[x < 50].mean() < y[x > 600].mean() - 200
    assert np.unique(x).size > 650  # the line runs through


@pytest.mark.parametrize("losses", [[1.0], [3.0, 3.0, 3.0], [1.0, np.nan, np.inf, 2.0], [1e-12, 2e-12], [-5.0, 5e8]])
def test_odd_losses_are_drawn(losses):
    assert blue(loss_curve(range(len(losses)), losses))[0].size


def test_one_step_many_times():
    assert blue(loss_curve([7, 7], [1, 2], title="word " * 60))[0].size


def test_nothing_to_draw():
    with pytest.raises(DataError, match="none of 2 losses is finite"):
        loss_curve([1, 2], [np.nan, np.inf])
    with pytest.raises(DataError, match="equal length"):
        loss_curve([1, 2], [1])
