"""Classifier-free guidance on branches that are known."""
from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ms_diffsynth.diffusion.guidance import classifier_free, classifier_free_with_norms
from ms_diffsynth.diffusion.packing import pack


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


def test_every_patch_keeps_the_norm_of_its_positive_branch():
    x, s = Tensor(normal(2, 3, 4, 6)), Tensor(np.ones(2, np.float32))
    positive, negative = (lambda x, s: x * 3), (lambda x, s: x * x)
    plain = pack(classifier_free(positive, negative, 4.0)(x, s)).asnumpy()
    found = pack(classifier_free_with_norms(positive, negative, 4.0)(x, s)).asnumpy()
    norms = np.linalg.norm(pack(x * 3).asnumpy(), axis=-1, keepdims=True)
    wanted = plain / np.linalg.norm(plain, axis=-1, keepdims=True) * norms
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert classifier_free_with_norms(positive, negative, 1.0) is positive
    zero = classifier_free_with_norms(lambda x, s: x * 0, lambda x, s: x * 0, 4.0)(x, s).asnumpy()
    assert not zero.any() and np.isfinite(zero).all()
