"""Grids equal to the reference cases', and the algebra of warps.

The sampled values of the two training grids were computed by PyTorch 2.13 (CPU) in float32, as torch.linspace shifted
by 3s / (1 + 2s); the hashes are of all 1000 values, which were compared with PyTorch's when the hashes were made.
"""
from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from ms_diffsynth.diffusion import schedule as sch
from ms_diffsynth.errors import ConfigError

PLACES = [0, 1, 2, 100, 333, 499, 500, 501, 750, 997, 998, 999]
GRIDS = {
    "diffsynth_flux": ("2431695469ecc709", [
        1.0, 0.999667108, 0.999333858, 0.964362025, 0.857692361, 0.751493931, 0.75074774, 0.75, 0.501991987,
        0.0148221338, 0.0118811885, 0.00892857183]),
    "flow_match_euler": ("240edbe067da1bfe", [
        1.0, 0.999666393, 0.999332428, 0.964285672, 0.857326388, 0.75074929, 0.75, 0.74924922, 0.5, 0.00894632097,
        0.0059760958, 0.00299401209]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_training_grids_equal_the_reference_cases_to_the_last_bit(name):
    sigmas = getattr(sch, name)(3.0).sigmas
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (1000,)
    assert np.array_equal(sigmas[PLACES], np.array(GRIDS[name][1], np.float32))
    assert hashlib.blake2b(sigmas.tobytes(), digest_size=8).hexdigest() == GRIDS[name][0]
    assert (np.diff(sigmas) < 0).all()
    assert sigmas.min() > 0  # a weight of s^-2 is finite everywhere
    with pytest.raises(ValueError, match="read-only"):
        sigmas[0] = 0


def test_diffsynth_four_steps():
    """DiffSynth-Studio 2.1.12, FlowMatchScheduler("FLUX.1").set_timesteps(4)."""
    np.testing.assert_allclose(sch.diffsynth_flux().sampling(4), [1, 0.857692, 0.602151, 0.00892857, 0], atol=5e-7)


def test_flux_dev_shifts_by_the_size_of_the_image():
    """diffusers: calculate_shift(4096) = 1.15, then exp(mu) / (exp(mu) + 1/s - 1) of 1, 3/4, 1/2, 1/4."""
    for seq_len, mu in ((256, 0.5), (4096, 1.15), (1024, 0.63)):
        assert sch.DynamicShift().mu(seq_len) == pytest.approx(mu, rel=1e-12)
        wanted = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)] + [0]
        np.testing.assert_allclose(sch.flux_dev().sampling(4, seq_len), wanted, rtol=2e-7)
        assert np.array_equal(sch.flux_sampling(4, seq_len, True), sch.flux_dev().sampling(4, seq_len))
    with pytest.raises(ConfigError, match="seq_len=None"):
        sch.flux_dev().sampling(4)


def test_flux_schnell_is_not_shifted():
    for sigmas in (sch.flux_schnell().sampling(4), sch.flux_sampling(4, 4096, False)):
        assert np.array_equal(sigmas, np.array([1, 0.75, 0.5, 0.25, 0], np.float32))
    assert np.array_equal(sch.flux_schnell().sampling(1), [1, 0])


@pytest.mark.parametrize("schedule", [sch.diffsynth_flux(), sch.flow_match_euler(1.0), sch.flux_dev(),
                                      sch.flux_schnell()])
@pytest.mark.parametrize("n", [1, 2, 3, 28, 1000])
def test_sampling_falls_from_pure_noise_to_zero(schedule, n):
    sigmas = schedule.sampling(n, 1024)
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (n + 1,)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (np.diff(sigmas) < 0).all()


def test_steps_below_one_are_refused():
    with pytest.raises(ConfigError, match="num_inference_steps=0"):
        sch.flux_schnell().sampling(0)


def test_linspace_against_numpy():
    for n in (1, 2, 3, 10, 1000):
        np.testing.assert_allclose(sch.linspace(1.0, 0.25, n), np.linspace(1.0, 0.25, n), rtol=1e-7)


def test_warps():
    s = sch.to_one_nth(50)
    np.testing.assert_allclose(sch.Shift(math.exp(0.8))(s), sch.ExponentialShift(0.8)(s), rtol=5e-7)
    assert np.array_equal(sch.Shift(1.0)(s), s)
    stretched = sch.TerminalStretch(0.02)(s)
    np.testing.assert_allclose(stretched, 1 - (1 - s) * 0.98 / (1 - 1 / 50), atol=2e-7)
    assert stretched[-1] == pytest.approx(0.02, abs=1e-7)  # 1 - 0.98, rounded at the size of 1
    assert np.array_equal(sch.TerminalStretch(0.02)(s[:1]), [1])


def test_a_new_schedule_is_two_grids():
    """Qwen-Image as DiffSynth-Studio 2.1.12 trains it: mu 0.8, last sigma 0.02, middle 0.6955."""
    grid = sch.Grid(sch.to_one_nth, (sch.ExponentialShift(0.8), sch.TerminalStretch(0.02)))
    sigmas = sch.Schedule(training=grid, inference=grid).sigmas
    np.testing.assert_allclose(sigmas[[0, 500, 999]], [1, 0.6955, 0.02], atol=1e-4)
