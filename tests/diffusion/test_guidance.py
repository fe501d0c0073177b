"""Classifier-free guidance on branches that are known."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.diffusion.guidance import classifier_free


@pytest.fixture(scope="module", autouse=True)
def _cpu():
    runtime.configure("graph", "CPU")


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_guidance_extrapolates_from_the_negative_branch():
    x, s = Tensor(normal(1, 2)), Tensor(np.ones(1, np.float32))
    positive, negative = (lambda x, s: x * 3), (lambda x, s: x)
    np.testing.assert_allclose(classifier_free(positive, negative, 4.0)(x, s).asnumpy(), 9 * x.asnumpy(), rtol=1e-6)
    np.testing.assert_allclose(classifier_free(positive, negative, 0.0)(x, s).asnumpy(), x.asnumpy(), rtol=1e-6)


def test_without_guidance_the_negative_branch_is_not_run():
    def never(latents, sigma):
        raise AssertionError("the negative branch ran")

    x, s = Tensor(normal(1, 2)), Tensor(np.ones(1, np.float32))
    assert np.array_equal(classifier_free(lambda x, s: x * 3, never, 1.0)(x, s).asnumpy(), 3 * x.asnumpy())
