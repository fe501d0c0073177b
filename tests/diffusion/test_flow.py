"""The straight path, eager and compiled."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ms_diffsynth.diffusion import flow


class Path(nn.Cell):
    def construct(self, input_latents, noise, sigma):
        return flow.interpolate(input_latents, noise, sigma), flow.velocity_target(input_latents, noise)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3, 2), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_path_and_target(mode, shape, dtype):
    rng = np.random.default_rng(0)
    x, n = rng.standard_normal((2, 3, *shape)).astype(dtype)
    sigma = np.array([0.0, 0.25, 1.0], np.float32)
    cell = ms.jit(Path(), fullgraph=True) if mode == "graph" else Path()
    latents, target = cell(Tensor(x), Tensor(n), Tensor(sigma))
    assert latents.dtype == target.dtype == ms.float32
    latents, target, x, n = latents.asnumpy(), target.asnumpy(), x.astype(np.float64), n.astype(np.float64)
    assert np.array_equal(latents[0], x[0].astype(np.float32))  # sigma 0 is data
    assert np.array_equal(latents[2], n[2].astype(np.float32))  # sigma 1 is noise
    np.testing.assert_allclose(latents[1], 0.75 * x[1] + 0.25 * n[1], atol=1e-6)
    np.testing.assert_allclose(target, n - x, atol=1e-6)
    s = sigma.reshape(-1, *[1] * len(shape))
    np.testing.assert_allclose(latents - s * target, x, atol=1e-6)  # following the target leads back to the data
