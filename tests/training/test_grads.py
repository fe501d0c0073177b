"""Norm, clipping and accumulation of gradients, eager and compiled, against NumPy."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.training import grads

MODES = ("pynative", "graph")
SHAPES = ((), (3,), (2, 5), (4, 3, 2, 2), (300, 300))


@pytest.fixture(scope="module", autouse=True)
def _cpu():
    runtime.configure("graph", DEVICE)


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Clip(nn.Cell):
    def __init__(self, max_grad_norm):
        super().__init__()
        self.max_grad_norm = max_grad_norm

    def construct(self, *gradients):
        norm = ops.sqrt(grads.sum_of_squares(gradients))
        return norm, grads.is_finite(norm), grads.clip_coefficient(norm, self.max_grad_norm)


class NormBySums(nn.Cell):
    def construct(self, *gradients):
        return grads._each(grads._squares_by_sum, gradients)


class Accumulate(nn.Cell):
    def __init__(self, shapes):
        super().__init__()
        self.totals = ParameterTuple([Parameter(Tensor(np.zeros(s, np.float32)), name=f"total{i}", requires_grad=False)
                                      for i, s in enumerate(shapes)])

    def construct(self, first, second):
        grads.accumulate(self.totals, (first, second))
        return grads.added(self.totals, (first, second))


class Reset(nn.Cell):
    def __init__(self, totals):
        super().__init__(auto_prefix=False)
        self.totals = totals

    def construct(self):
        return grads.reset(self.totals)


def compiled(cell, mode):
    return ms.jit(cell, fullgraph=True) if mode == "graph" else cell


def gradients(scale=1.0):
    rng = np.random.default_rng(3)
    return [np.array(rng.standard_normal(s) * scale, np.float32) for s in SHAPES]


def norm_of(arrays):
    return np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in arrays))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale, limit", [(1.0, 1.0), (1e-6, 1.0), (1e-6, 1e-4), (1e3, 0.5), (1.0, None), (0.0, 1.0)])
def test_norm_and_clipping(mode, scale, limit):
    arrays = gradients(scale)
    norm, is_finite, coefficient = compiled(Clip(limit), mode)(*map(Tensor, arrays))
    wanted = norm_of(arrays)
    assert float(norm) == pytest.approx(wanted, rel=1e-6)  # float32 sums of 90000 squares
    assert float(coefficient) == pytest.approx(1.0 if limit is None else min(1.0, limit / (wanted + 1e-6)), rel=1e-6)
    assert bool(is_finite)
    assert norm.dtype == coefficient.dtype == ms.float32


@pytest.mark.parametrize("mode", MODES)
def test_the_coefficient_of_a_broken_norm_is_not_a_number(mode):
    class Coefficient(nn.Cell):
        def construct(self, norm):
            return grads.clip_coefficient(norm, 0.5)

    call = compiled(Coefficient(), mode)
    assert np.isnan(float(call(Tensor(np.float32(np.nan))))) and float(call(Tensor(np.float32(np.inf)))) == 0
    assert float(call(Tensor(np.float32(0.25)))) == 1 and float(call(Tensor(np.float32(2)))) == pytest.approx(0.25)


@pytest.mark.fault
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", range(len(SHAPES)))
def test_one_element_that_is_not_finite_or_overflows_is_seen(mode, bad, where):
    arrays = gradients()
    arrays[where].reshape(-1)[-1] = bad
    cell = _one(mode)
    assert not bool(cell(*map(Tensor, arrays))[1])


def _one(mode, cells={}):  # noqa: B006 (compiled once for all parameters)
    if mode not in cells:
        cells[mode] = compiled(Clip(1.0), mode)
    return cells[mode]


def test_half_precision_is_summed_in_float32():
    arrays = [np.full((100, 100), 100.0, np.float16)]  # the sum of squares, 1e8, is infinite in float16
    assert float(ops.sqrt(grads.sum_of_squares((Tensor(arrays[0]),)))) == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_sums_taken_on_other_devices_are_the_same(mode):
    arrays = gradients()
    sums = compiled(NormBySums(), mode)(*map(Tensor, arrays))
    np.testing.assert_allclose([float(s) for s in sums], [(a.astype(np.float64) ** 2).sum() for a in arrays], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_accumulate_add_and_reset(mode):
    cell = Accumulate([(2, 3), (4,)])
    run, reset = compiled(cell, mode), compiled(Reset(cell.totals), mode)
    pairs = [[np.full((2, 3), v, np.float32), np.full(4, 10 * v, np.float32)] for v in (1.0, 2.0)]
    run(*map(Tensor, pairs[0]))
    sums = run(*map(Tensor, pairs[1]))
    for total, added, value in zip(cell.totals, sums, (1.0, 10.0)):
        assert (total.asnumpy() == 3 * value).all()
        assert (added.asnumpy() == 5 * value).all()  # the totals after accumulating, and the gradients once more
    run(Tensor(np.full((2, 3), np.nan, np.float32)), Tensor(pairs[0][1]))
    assert np.isnan(cell.totals[0].asnumpy()).all()
    reset()
    for total in cell.totals:
        assert (total.asnumpy() == 0).all()
