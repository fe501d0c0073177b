"""The timestep embedding equals float64 NumPy as well as float32 can, for the whole range of timesteps."""
from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from reference import STRICT, Case, check

from ms_diffsynth.ops.sinusoid import get_timestep_embedding

TIMES = np.array([0.0, 1.0, 37.5, 999.0, 3500.0], np.float32)


def angles(times, half, shift=1, scale=1.0, period=10000):
    """The angles as float32 rounds them: at 3500 one rounding alone moves the sine by 1e-4."""
    exponent = np.float32(-math.log(period)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    if (half, shift, period) == (128, 0, 10000):  # torch 2.13.0 on a CPU: torch.exp of these exponents
        frequencies[[12, 106]] = [float.fromhex("0x1.afd136p-2"), float.fromhex("0x1.fe9f5ap-12")]
    return (np.float32(scale) * (times.astype(np.float32)[:, None] * frequencies)).astype(np.float64)


def sines(times, half=4, **settings):
    a = angles(times, half, **settings)
    return np.concatenate([np.sin(a), np.cos(a)], 1)


def flipped(times, half=4, **settings):
    a = angles(times, half, **settings)
    return np.concatenate([np.cos(a), np.sin(a)], 1)


def embed(times, dim, **settings):
    return get_timestep_embedding(times, dim, **settings)


CASES = [
    Case(name="default", function=embed, reference=sines, inputs=[TIMES], settings={"dim": 8}, gradient=False,
         tolerance=1e-6),
    Case(name="as in FLUX", function=embed, reference=lambda t: flipped(t, 128, shift=0), inputs=[TIMES],
         settings={"dim": 256, "flip_sin_to_cos": True, "downscale_freq_shift": 0}, gradient=False, tolerance=1e-6),
    Case(name="as in Qwen-Image", function=embed, reference=lambda t: flipped(t, 4, shift=0, scale=1000),
         inputs=[TIMES / 4096], gradient=False, tolerance=1e-6,
         settings={"dim": 8, "flip_sin_to_cos": True, "downscale_freq_shift": 0, "scale": 1000}),
    Case(name="odd width, other period", function=embed, inputs=[TIMES], gradient=False, tolerance=1e-6,
         reference=lambda t: np.pad(sines(t, 3, period=100), [(0, 0), (0, 1)]),
         settings={"dim": 7, "max_period": 100}),
    Case(name="whole timesteps", function=embed, reference=sines, inputs=[np.array([3, 999], np.int32)],
         settings={"dim": 8}, gradient=False, tolerance=1e-6),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_equals_numpy(case, compiled):
    check(case, compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_gradient_equals_the_formula(compiled):
    def total(t):
        return embed(t, 8).sum()
    gradient = ms.grad(total)

    def step(t):
        return gradient(t)
    found = (ms.jit(step, **STRICT) if compiled else step)(Tensor(TIMES)).asnumpy()
    a, frequencies = angles(TIMES, 4), angles(np.ones(1), 4)
    np.testing.assert_allclose(found, (frequencies * (np.cos(a) - np.sin(a))).sum(1), rtol=0, atol=2e-6)


def test_mindone_networks_use_it():
    from mindone.diffusers.models import embeddings
    assert embeddings.get_timestep_embedding is get_timestep_embedding
    cell = embeddings.Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(cell(Tensor(TIMES)).asnumpy(), flipped(TIMES, shift=0), atol=1e-6)
