"""Samplers on velocities that are known, and against diffusers' schedulers."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint

from ms_diffsynth.diffusion.samplers import SAMPLERS, euler
from ms_diffsynth.diffusion.schedule import FLUX_SCHNELL, diffsynth_flux

EVERY = pytest.mark.parametrize("name", SAMPLERS)


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


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_equals_diffusers(name):
    """samplers.npz is written by make_samplers.py."""
    def denoise(x, s):
        s = s.reshape((-1, 1, 1, 1))
        return (x - 0.7 * mint.tanh(2 * x) - 0.1 * s) / s

    known = np.load(Path(__file__).with_name("samplers.npz"))
    found = SAMPLERS[name](denoise, Tensor(known["start"]), known[f"{name} sigmas"])
    np.testing.assert_allclose(found.asnumpy(), known[name], atol=1e-5)


@EVERY
def test_the_error_falls_with_the_order(name):
    """Data of a normal distribution of width 0.5, where the velocity and the way that it leads are known."""
    def variance(s):
        return 0.25 * (1 - s) ** 2 + s ** 2

    def denoise(x, s):
        s = s.reshape((-1, 1))
        return x * (s - 0.25 * (1 - s)) / variance(s)

    noise, end = normal(1, 8), 0.2
    exact = noise * np.sqrt(variance(end))
    error = [np.abs(SAMPLERS[name](denoise, Tensor(noise), np.linspace(1, end, n + 1)).asnumpy() - exact).max()
             for n in (8, 16)]
    order = np.log2(error[0] / error[1])
    assert abs(order - 1) < 0.35 if name == "euler" else order > 1.8


@EVERY
def test_in_all_steps_together_a_point_of_data_is_met(name):
    data, noise = normal(2, 2, 3, 4)
    denoise = lambda x, s: (x - Tensor(data)) / s.reshape((2, 1, 1))  # noqa: E731
    told = []
    found = SAMPLERS[name](denoise, Tensor(noise), diffsynth_flux().sampling(6), lambda *k: told.append(k))
    np.testing.assert_allclose(found.asnumpy(), data, atol=2e-6)
    assert told == [(k, 6) for k in range(1, 7)]


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
