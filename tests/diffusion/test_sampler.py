"""Euler's method on velocities that are known."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.diffusion.sampler import euler
from ms_diffsynth.diffusion.schedule import FLUX_SCHNELL, diffsynth_flux


@pytest.fixture(scope="module", autouse=True)
def _cpu():
    runtime.configure("graph", DEVICE)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", [1, 4, 20])
def test_a_constant_velocity_is_integrated_exactly(n):
    velocity, start = normal(2, 3, 4), np.ones((2, 3, 4), np.float32)
    found = euler(lambda x, s: Tensor(velocity), Tensor(start), diffsynth_flux().sampling(n))
    np.testing.assert_allclose(found.asnumpy(), start - velocity, atol=2e-6)


def test_one_step_is_exact_on_a_straight_path():
    data, noise = normal(2, 2, 3, 4)
    found = euler(lambda x, s: Tensor(noise - data), Tensor(noise), FLUX_SCHNELL.schedule().sampling(1))
    np.testing.assert_allclose(found.asnumpy(), data, atol=5e-7)


def test_any_number_of_steps_is_exact_for_a_point_of_data():
    """All data at one point: the velocity (x - data) / s is linear in x, and Euler's steps stay on the line."""
    data, noise = normal(2, 2, 3, 4)
    denoise = lambda x, s: (x - Tensor(data)) / s.reshape((2, 1, 1))  # noqa: E731
    found = euler(denoise, Tensor(noise), diffsynth_flux().sampling(7))
    np.testing.assert_allclose(found.asnumpy(), data, atol=2e-6)


def test_what_denoise_is_given_and_what_is_told():
    seen, told = [], []

    def denoise(latents, sigma):
        seen.append(sigma.asnumpy())
        assert sigma.dtype == latents.dtype == ms.float32
        return latents.astype(ms.float16) * 0

    sigmas = FLUX_SCHNELL.schedule().sampling(4)
    euler(denoise, Tensor(normal(3, 2)), sigmas, lambda done, steps: told.append((done, steps)))
    assert np.array_equal(seen, np.repeat(sigmas[:4, None], 3, 1))  # the final 0 is never shown to the network
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
