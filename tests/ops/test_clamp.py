"""Limits that let what is not finite through, in value and gradient, eager and compiled."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.ops.clamp import clamp


def limited(x):
    return clamp(x, -1.0, 2.0)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("length", [1, 7, 1000])
def test_numbers_are_limited_and_broken_ones_stay(mode, length, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal(length).astype(np.float32) * 3
    call = ms.jit(limited, fullgraph=True) if mode == "graph" else limited
    np.testing.assert_array_equal(call(Tensor(x)).asnumpy(), x.clip(-1, 2))
    for broken in (np.nan, np.inf, -np.inf):
        for place in {0, length // 2, length - 1}:
            bad = x.copy()
            bad[place] = broken
            wanted = x.clip(-1, 2)
            wanted[place] = broken
            np.testing.assert_array_equal(call(Tensor(bad)).asnumpy(), wanted)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_gradients_stop_at_the_limits(mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gradient = ms.grad(limited)
    call = ms.jit(gradient, fullgraph=True) if mode == "graph" else gradient
    assert call(Tensor(np.float32([-3, 0.5, 1.5, 7]))).asnumpy().tolist() == [0, 1, 1, 0]
