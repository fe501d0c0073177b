"""Positions of training sigmas against the formulas in float64, and against PyTorch's."""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.diffusion import density
from ms_diffsynth.errors import ConfigError

UNIFORM = np.linspace(0, 1, 101, endpoint=False).astype(np.float32)
NORMAL = np.linspace(-4, 4, 101).astype(np.float32)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.5)])
def test_logit_normal(mean, std):
    u = density.density(NORMAL, "logit_normal", mean, std)
    wanted = 1 / (1 + np.exp(-(mean + std * NORMAL.astype(np.float64))))
    assert u.dtype == np.float32 and np.array_equal(u, wanted.astype(np.float32))
    assert density.draw_kind("logit_normal") == "normal"


def test_a_draw_far_out_ends_at_an_end():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert density.density(np.float32([-1e4, 1e4]), "logit_normal").tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1.29, 0.0, -0.5])
def test_mode(scale):
    u, x = density.density(UNIFORM, "mode", mode_scale=scale), UNIFORM.astype(np.float64)
    np.testing.assert_allclose(u, 1 - x - scale * (np.cos(np.pi * x / 2) ** 2 - 1 + x), rtol=0, atol=6e-8)
    index = density.timestep_index(u, 1000)
    assert index.min() >= 0 and index.max() == 999  # u = 1 at a draw of 0
    assert density.draw_kind("mode") == "uniform"


@pytest.mark.parametrize("scheme", ["none", "uniform", "sigma_sqrt", "cosmap", "diffsynth"])
def test_the_others_are_uniform(scheme):
    assert np.array_equal(density.density(UNIFORM, scheme), UNIFORM)
    assert density.draw_kind(scheme) == "uniform"


def test_index_stays_on_the_grid():
    u = np.array([0, 0.00099, 0.001, 0.5, 0.9995, np.nextafter(np.float32(1), np.float32(0)), 1, 1.5, -0.2], np.float32)
    index = density.timestep_index(u, 1000)
    assert index.dtype == np.int32
    assert index.tolist() == [0, 0, 1, 500, 999, 999, 999, 999, 0]


# draws whose index MindSpore 2.10's sigmoid on the CPU puts one off, and torch 2.13's int(sigmoid(draw) * 1000)
EDGES = [(-2.6337125301361084, 67), (-0.41380569338798523, 397), (-0.8283219337463379, 304), (1.0355963706970215, 737),
         (1.0252807140350342, 735), (1.0304311513900757, 736)]


def test_indices_beside_an_edge_are_those_of_pytorch():
    draws = np.array([draw for draw, _ in EDGES], np.float32)
    index = density.timestep_index(density.density(draws, "logit_normal"), 1000)
    assert index.tolist() == [index for _, index in EDGES]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'cosmap'"):
        density.density(UNIFORM, "cosmop")
    with pytest.raises(ConfigError, match="weighting_scheme='cosmop'"):
        density.draw_kind("cosmop")
