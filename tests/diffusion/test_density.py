"""Positions of training sigmas, eager and compiled, against the formulas in float64."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ms_diffsynth import runtime
from ms_diffsynth.diffusion import density
from ms_diffsynth.errors import ConfigError

MODES = ("pynative", "graph")
UNIFORM = np.linspace(0, 1, 101, endpoint=False).astype(np.float32)
NORMAL = np.linspace(-4, 4, 101).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _cpu():
    runtime.configure("graph", "CPU")


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a compilation that fails leaves a folder


class Position(nn.Cell):
    def __init__(self, scheme, *numbers):
        super().__init__()
        self.scheme, self.numbers = scheme, numbers

    def construct(self, draw):
        u = density.density(draw, self.scheme, *self.numbers)
        return u, density.timestep_index(u, 1000)


class Index(nn.Cell):
    def construct(self, u):
        return density.timestep_index(u, 1000)


def compiled(cell, mode):
    return ms.jit(cell, fullgraph=True) if mode == "graph" else cell


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.5)])
def test_logit_normal(mode, mean, std):
    u, _ = compiled(Position("logit_normal", mean, std, 0.0), mode)(Tensor(NORMAL))
    wanted = 1 / (1 + np.exp(-(mean + std * NORMAL.astype(np.float64))))
    np.testing.assert_allclose(u.asnumpy(), wanted, atol=2e-6)  # the CPU's sigmoid is good to 8e-7
    assert density.draw_kind("logit_normal") == "normal"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1.29, 0.0, -0.5])
def test_mode(mode, scale):
    u, index = compiled(Position("mode", 0.0, 1.0, scale), mode)(Tensor(UNIFORM))
    x = UNIFORM.astype(np.float64)
    np.testing.assert_allclose(u.asnumpy(), 1 - x - scale * (np.cos(np.pi * x / 2) ** 2 - 1 + x), atol=1e-6)
    assert index.asnumpy().min() >= 0
    assert index.asnumpy().max() == 999  # u = 1 at a draw of 0
    assert density.draw_kind("mode") == "uniform"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", ["none", "uniform", "sigma_sqrt", "cosmap", "diffsynth"])
def test_the_others_are_uniform(mode, scheme):
    u, _ = compiled(Position(scheme, 0.0, 1.0, 1.29), mode)(Tensor(UNIFORM))
    assert np.array_equal(u.asnumpy(), UNIFORM)
    assert density.draw_kind(scheme) == "uniform"


@pytest.mark.parametrize("mode", MODES)
def test_index_stays_on_the_grid(mode):
    u = np.array([0, 0.00099, 0.001, 0.5, 0.9995, np.nextafter(np.float32(1), np.float32(0)), 1, 1.5, -0.2], np.float32)
    index = compiled(Index(), mode)(Tensor(u))
    assert index.dtype == ms.int32
    assert index.asnumpy().tolist() == [0, 0, 1, 500, 999, 999, 999, 999, 0]


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_scheme_is_refused(mode):
    with pytest.raises(ConfigError, match="Did you mean 'cosmap'"):
        compiled(Position("cosmop", 0.0, 1.0, 1.29), mode)(Tensor(UNIFORM))
    with pytest.raises(ConfigError, match="weighting_scheme='cosmop'"):
        density.draw_kind("cosmop")
