"""Functions of `mindspore.mint` on tensors: the CPU kernels equal NumPy in value and gradient."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint
from reference import Case, check

from ms_diffsynth.errors import DeviceError

ROWS = np.array([[3, 1, 2], [0, 5, 4]], np.int64)
ORDER = np.array([2, 0, 2], np.int32)
SPREAD = np.array([[0.5, -2.0, 1.25, 3.0], [4.0, -1.0, 2.5, 0.25]], np.float32)  # no ties, no kinks


def piece(function, which):
    """``function`` with one of its several results."""
    def chosen(*inputs, **settings):
        return function(*inputs, **settings)[which]
    return chosen


def stack_two(x, y, dim):
    return mint.stack([x, y], dim)


def diff_prepended(x, first):
    return mint.diff(x, dim=-1, prepend=first)


def select_columns(x, index):
    return mint.index_select(x, 1, index)


def einsum_of(equation):
    """A function of its operands, in a file of its own: compiled code has no variable from outside."""
    def function(*operands):
        return mint.einsum(equation, *operands)
    return function


CASES = [
    *(Case(name=f"einsum {equation}", function=einsum_of(equation), inputs=shapes,
           reference=lambda *operands, equation=equation: np.einsum(equation, *operands))
      for equation, shapes in [
          ("nhwpqc->nchpwq", [(2, 3, 2, 2, 2, 4)]),  # patches of a transformer become an image
          ("ij,jk->ik", [(2, 3), (3, 4)]), ("bhqd,bhkd->bhqk", [(2, 2, 3, 4), (2, 2, 5, 4)]),
          ("...n,d->...nd", [(2, 3), (4,)]), ("...ij,...jk->...ik", [(2, 1, 2, 3), (4, 3, 2)]), ("i,j", [(2,), (3,)]),
          ("ij->j", [(2, 3)]), ("ij->", [(2, 3)]), ("ij,ij->", [(2, 3), (2, 3)]),
          ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 2)]),
          ("cb,cbijk->bijk", [(3, 2), (3, 2, 2, 1, 2)]),
          ("bij, bj", [(2, 3, 4), (2, 4)])]),
    Case(name="outer", function=mint.outer, reference=np.outer, inputs=[(3,), (2,)]),
    Case(name="mm", function=mint.mm, reference=np.matmul, inputs=[(2, 3), (3, 4)]),
    Case(name="addmm", function=mint.addmm, reference=lambda c, a, b: 0.5 * c + 2 * (a @ b),
         inputs=[(2, 4), (2, 3), (3, 4)], settings={"beta": 0.5, "alpha": 2}),
    Case(name="baddbmm", function=mint.baddbmm, reference=lambda c, a, b: 3 * c + 0.5 * (a @ b),
         inputs=[(2, 2, 4), (2, 2, 3), (2, 3, 4)], settings={"beta": 3, "alpha": 0.5}),
    Case(name="var", function=mint.var, reference=lambda x: x.var(-1, ddof=1), inputs=[(2, 4)], settings={"dim": -1}),
    Case(name="var of two axes, keepdim", function=mint.var, inputs=[(2, 3, 2)],
         reference=lambda x: x.var((0, 2), keepdims=True),
         settings={"dim": (0, 2), "correction": 0, "keepdim": True}),
    Case(name="std", function=mint.std, reference=lambda x: x.std(ddof=1), inputs=[(2, 3)]),
    Case(name="cumsum", function=mint.cumsum, reference=lambda x: x.cumsum(1), inputs=[(2, 4)], settings={"dim": 1}),
    Case(name="logsumexp", function=mint.logsumexp, reference=lambda x: np.log(np.exp(x).sum(1)), inputs=[(2, 4)],
         settings={"dim": 1}, tolerance=2e-5),  # the CPU's exp is good to 5e-6
    Case(name="norm", function=mint.norm, reference=lambda x: np.sqrt((x ** 2).sum()), inputs=[(2, 3)]),
    Case(name="norm p=2", function=mint.norm, reference=lambda x: np.sqrt((x ** 2).sum((0, 1), keepdims=True)),
         inputs=[(2, 3, 2)], settings={"p": 2, "dim": (0, 1), "keepdim": True}),
    Case(name="norm p=1", function=mint.norm, reference=lambda x: np.abs(x).sum(-1), inputs=[SPREAD],
         settings={"p": 1, "dim": -1}),
    Case(name="norm p=inf", function=mint.norm, reference=lambda x: np.abs(x).max(-1), inputs=[SPREAD],
         settings={"p": float("inf"), "dim": -1}),
    Case(name="sort", function=piece(mint.sort, 0), reference=lambda x: np.sort(x, -1), inputs=[SPREAD]),
    Case(name="sort descending", function=piece(mint.sort, 0), reference=lambda x: -np.sort(-x, -1), inputs=[SPREAD],
         settings={"descending": True}),
    Case(name="topk", function=piece(mint.topk, 0), reference=lambda x: -np.sort(-x, -1)[:, :2], inputs=[SPREAD],
         settings={"k": 2}),
    Case(name="split", function=piece(mint.split, 1), reference=lambda x: x[:, 1:4], inputs=[(2, 5)],
         settings={"split_size_or_sections": (1, 3, 1), "dim": 1}),
    Case(name="split by size", function=piece(mint.split, 2), reference=lambda x: x[4:], inputs=[(5, 2)],
         settings={"split_size_or_sections": 2}),
    Case(name="chunk", function=piece(mint.chunk, 2), reference=lambda x: x[:, 4:6], inputs=[(2, 6)],
         settings={"chunks": 3, "dim": -1}),
    Case(name="chunk, last smaller", function=piece(mint.chunk, 1), reference=lambda x: x[3:], inputs=[(5, 2)],
         settings={"chunks": 2}),
    Case(name="stack", function=stack_two, reference=lambda x, y: np.stack([x, y], 1), inputs=[(2, 3), (2, 3)],
         settings={"dim": 1}),
    Case(name="unbind", function=piece(mint.unbind, 1), reference=lambda x: x[:, 1], inputs=[(2, 3)],
         settings={"dim": -1}),
    Case(name="index_select", function=select_columns, reference=lambda x, i: x[:, i], inputs=[(2, 3), ORDER]),
    Case(name="repeat_interleave", function=mint.repeat_interleave, reference=lambda x: np.repeat(x, 2, 1),
         inputs=[(2, 3)], settings={"repeats": 2, "dim": 1}),
    Case(name="repeat_interleave flat", function=mint.repeat_interleave, reference=lambda x: np.repeat(x, 2),
         inputs=[(2, 3)], settings={"repeats": 2}),
    Case(name="tril", function=mint.tril, reference=lambda x: np.tril(x, 1), inputs=[(3, 4)],
         settings={"diagonal": 1}),
    Case(name="diag of a vector", function=mint.diag, reference=np.diag, inputs=[(3,)]),
    Case(name="diag of a matrix", function=mint.diag, reference=np.diag, inputs=[(3, 2)]),
    Case(name="roll", function=mint.roll, reference=lambda x: np.roll(x, (1, -2), (0, 1)), inputs=[(3, 4)],
         settings={"shifts": (1, -2), "dims": (0, 1)}),
    Case(name="roll flat", function=mint.roll, reference=lambda x: np.roll(x, 2), inputs=[(2, 3)],
         settings={"shifts": 2}),
    Case(name="diff", function=mint.diff, reference=lambda x: np.diff(x, 2, 0), inputs=[(4, 2)],
         settings={"n": 2, "dim": 0}),
    Case(name="diff, prepended", function=diff_prepended, reference=lambda x, f: np.diff(x, prepend=f),
         inputs=[(2, 3), (2, 1)]),
    Case(name="zeros_like", function=mint.zeros_like, reference=np.zeros_like, inputs=[(2, 3)], gradient=False),
    Case(name="ones_like", function=mint.ones_like, reference=np.ones_like, inputs=[(2, 3)], gradient=False),
    Case(name="full_like", function=mint.full_like, reference=lambda x: np.full_like(x, 2.5), inputs=[(2, 3)],
         settings={"fill_value": 2.5}, gradient=False),
    Case(name="argmax", function=mint.argmax, reference=lambda x: x.argmax(1), inputs=[ROWS.astype(np.float32)],
         settings={"dim": 1}, gradient=False),
    Case(name="argmax of all", function=mint.argmax, reference=np.argmax, inputs=[SPREAD], gradient=False),
    Case(name="argmin", function=mint.argmin, reference=lambda x: x.argmin(0)[None], inputs=[SPREAD],
         settings={"dim": 0, "keepdim": True}, gradient=False),
    Case(name="argsort", function=mint.argsort, reference=lambda x: np.argsort(x, -1), inputs=[SPREAD],
         gradient=False),
    Case(name="argsort of integers", function=mint.argsort, reference=lambda x: np.argsort(x, -1),
         inputs=[ROWS + 2 ** 24], gradient=False),
    Case(name="index of topk", function=piece(mint.topk, 1), reference=lambda x: np.argsort(-x, -1)[:, :2],
         inputs=[SPREAD], settings={"k": 2}, gradient=False),
    Case(name="roll of integers", function=mint.roll, reference=lambda x: np.roll(x, 1, 1), inputs=[ROWS],
         settings={"shifts": 1, "dims": 1}, gradient=False),
    Case(name="diff of integers", function=mint.diff, reference=np.diff, inputs=[ROWS], gradient=False),
    Case(name="cumsum of bools", function=mint.cumsum, reference=lambda x: x.cumsum(1), inputs=[ROWS > 2],
         settings={"dim": 1}, gradient=False),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_equals_numpy(case, compiled):
    check(case, compiled)


def created(x):
    return (mint.arange(1, 7, 2) + x, mint.arange(3, dtype=ms.float32) + x, mint.full((2, 3), 0.5) + x,
            mint.linspace(-1, 0.7, 5) + x, mint.linspace(2, 3, 1) + x, mint.zeros_like(x, dtype=ms.int32),
            mint.full_like(x, 3, dtype=ms.int64))


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_created_tensors_equal_numpy(compiled):
    expected = (np.arange(1, 7, 2), np.arange(3), np.full((2, 3), 0.5), np.linspace(-1, 0.7, 5), np.array([2.0]),
                np.array(0), np.array(3))
    found = (ms.jit(created) if compiled else created)(Tensor(0.0, ms.float32))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a.asnumpy(), b, rtol=0, atol=1e-7)
    assert found[-1].dtype == ms.int64


def test_baddbmm_with_beta_zero_does_not_read_its_input():
    nothing = Tensor(np.full((1, 2, 2), np.nan, np.float32))
    out = mint.baddbmm(nothing, mint.ones((1, 2, 2)), mint.ones((1, 2, 2)), beta=0)
    assert (out.asnumpy() == 2).all()


def test_gradient_of_norm_at_zero_is_zero():
    gradient = ms.grad(lambda x: mint.norm(x, dim=-1).sum())(Tensor(np.zeros((2, 3), np.float32)))
    assert (gradient.asnumpy() == 0).all()


def test_draws_have_the_right_shape_and_moments():
    ms.set_seed(5)
    like = mint.zeros((100, 100))
    for draw in (mint.randn(100, 100), mint.randn((100, 100)), mint.randn_like(like), mint.normal(0.0, 1.0, (100, 100)),
                 (mint.normal(like + 3, like + 2) - 3) / 2):
        x = draw.asnumpy()
        assert x.shape == (100, 100) and abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    for draw in (mint.rand(100, 100), mint.rand_like(like)):
        x = draw.asnumpy()
        assert x.min() >= 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.02
    whole = mint.randint(2, 5, (1000,)).asnumpy()
    assert set(whole) == {2, 3, 4} and set(mint.randint(0, 2, size=(99,)).asnumpy()) == {0, 1}


def test_two_kinds_of_draws_differ():
    """MindSpore's own randn and randn_like give the same numbers after set_seed."""
    ms.set_seed(5)
    assert not np.array_equal(mint.randn(4, 4).asnumpy(), mint.randn_like(mint.zeros((4, 4))).asnumpy())


@pytest.mark.parametrize("call", [lambda: mint.norm(mint.ones((2, 2)), 3), lambda: mint.diag(mint.ones((2, 2)), 1),
                                  lambda: mint.randn(2, generator=ms.Generator()),
                                  lambda: mint.einsum("ii->i", mint.ones((2, 2)))])
def test_what_is_not_there_is_refused(call):
    with pytest.raises(DeviceError, match="on the CPU"):
        call()


@pytest.mark.parametrize("equation, shapes, says", [
    ("ij,jk->ik", [(2, 3)], "with 1 operands: expected 2"), ("ij->i", [(2, 3, 4)], "operand 0 has the shape"),
    ("ij,jk->ik", [(2, 3), (4, 2)], "axis 'j' has 3 and 4 elements"), ("ij->k", [(2, 3)], "no operand has it")])
def test_an_equation_that_does_not_fit_is_refused(equation, shapes, says):
    with pytest.raises(ValueError, match=says):
        mint.einsum(equation, [mint.ones(shape) for shape in shapes])
