"""Rotary positions against complex numbers, in float64."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.qwen_image.rotary import image_angles, image_table
from ms_diffsynth.pipelines.shared.rotary import rotate_halves, text_table

AXES = (4, 6, 6)


def test_places_are_centred_and_text_goes_on_behind_the_picture():
    angles = image_angles(2, 3, 4, AXES)
    assert angles.shape == (2 + 12, 8)
    frame, row, column = angles[:, 0], angles[:, 2], angles[:, 5]  # the first frequency of each axis is 1
    assert frame.tolist() == [2, 3] + [0] * 12  # max(3 // 2, 4 // 2) = 2
    assert row.tolist() == [2, 3] + [-2] * 4 + [-1] * 4 + [0] * 4
    assert column.tolist() == [2, 3] + [-2, -1, 0, 1] * 3
    np.testing.assert_allclose(angles[1, 5:] / angles[1, 5], 10000.0 ** (-np.arange(3) / 3), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (4, 6)])
def test_pairs_are_turned_as_complex_numbers(shape):
    height, width = shape
    x = np.random.default_rng(0).standard_normal((2, 3 + height * width, 2, 16)).astype(np.float32)
    cos, sin = (network.positions(table, 2, 2, x.dtype) for table in image_table(3, height, width, AXES))
    found = network.rotate(Tensor(x), cos, sin).asnumpy()
    turn = np.exp(1j * image_angles(3, height, width, AXES).astype(np.float64))[None, :, None]
    wanted = ((x[..., ::2] + 1j * x[..., 1::2]) * turn)
    np.testing.assert_allclose(found[..., ::2], wanted.real, atol=1e-6)
    np.testing.assert_allclose(found[..., 1::2], wanted.imag, atol=1e-6)


def test_halves_are_turned_as_complex_numbers():
    x = np.random.default_rng(1).standard_normal((2, 3, 7, 8)).astype(np.float32)
    found = rotate_halves(Tensor(x), text_table(7, 8, 1e6)).asnumpy()
    turn = np.exp(1j * np.outer(np.arange(7), 1e6 ** (-np.arange(4) / 4)))
    wanted = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(found, np.concatenate([wanted.real, wanted.imag], -1), atol=2e-6)
