"""Every operator of the table: against another formula in float64, or finite differences."""
from __future__ import annotations

import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ms_diffsynth.standin import compute  # noqa: F401  (fills the table)
from ms_diffsynth.standin.compute.table import ACLNN, ACLOP, run

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = {BFLOAT16: "bfloat16"}


def tensor(array):
    """As the stand-in describes an array; its memory is the array's own."""
    size = array.dtype.itemsize
    return {"dtype": NAMES.get(array.dtype, array.dtype.name), "shape": list(array.shape), "offset": 0,
            "strides": [s // size for s in array.strides], "address": array.ctypes.data}


def argument(value):
    if isinstance(value, np.ndarray):
        return tensor(value)
    if isinstance(value, tuple):  # a list of tensors
        return {"list": [argument(v) for v in value]}
    if value is None:
        return 0
    return value


def scalar(value, dtype="float32"):
    return {"scalar": value, "dtype": dtype}


def call(name, *arguments, floats=()):
    """Run aclnn<name>; arrays among the arguments are read and written in place."""
    bits = [struct.unpack("<q", struct.pack("<d", f))[0] for f in floats] + [0] * (8 - len(floats))
    run({"name": f"aclnn{name}", "path": "aclnn", "arguments": [argument(a) for a in arguments], "floats": bits})


def older(name, inputs, outputs, **attributes):
    run({"name": name, "path": "aclop", "inputs": [tensor(a) for a in inputs], "outputs": [tensor(a) for a in outputs],
         "attributes": attributes})


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def empty(*shape, dtype=np.float32):
    return np.full(shape, np.nan, dtype) if np.dtype(dtype).kind == "f" else np.zeros(shape, dtype)


def assert_gradient(function, x, gradient, output_gradient, tolerance=2e-3, step=1e-3):
    """``gradient`` is that of sum(function(x) output_gradient), by central differences in random directions."""
    for seed in range(3):
        direction = normal(*x.shape, seed=seed + 100).astype(np.float64)
        ahead, behind = (np.sum(function((x + s * step * direction).astype(np.float32)).astype(np.float64)
                                * output_gradient) for s in (1, -1))
        expected = (ahead - behind) / (2 * step)
        assert np.sum(gradient * direction) == pytest.approx(expected, rel=tolerance, abs=tolerance)


# --- elementwise -----------------------------------------------------------------------------------------------------
UNARY = {
    "Abs": np.abs, "Neg": np.negative, "Reciprocal": np.reciprocal, "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log,
    "Rsqrt": lambda x: x ** -0.5, "Sin": np.sin, "Cos": np.cos, "Tanh": np.tanh, "Floor": np.floor, "Ceil": np.ceil,
    "Sign": np.sign, "Erf": np.vectorize(math.erf), "Relu": lambda x: (x + abs(x)) / 2,
    "Sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2, "Silu": lambda x: x * (1 + np.tanh(x / 2)) / 2,
}
BINARY = {
    "Mul": np.multiply, "Div": np.divide, "Minimum": np.minimum, "Maximum": np.maximum, "PowTensorTensor": np.power,
    "LtTensor": np.less, "LeTensor": np.less_equal, "GtTensor": np.greater, "GeTensor": np.greater_equal,
    "EqTensor": np.equal, "NeTensor": np.not_equal, "LogicalAnd": np.logical_and, "LogicalOr": np.logical_or,
}
WITH_SCALAR = {
    "Muls": np.multiply, "Divs": np.divide, "PowTensorScalar": np.power, "RemainderTensorScalar": np.mod,
    "LtScalar": np.less, "LeScalar": np.less_equal, "GtScalar": np.greater, "GeScalar": np.greater_equal,
    "EqScalar": np.equal, "NeScalar": np.not_equal, "ClampMin": np.maximum,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_tensor(name, dtype):
    x = (abs(normal(3, 5)) + np.float32(0.1)).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    y = empty(3, 5).astype(x.dtype)
    call(name, x, y)
    expected = UNARY[name](x.astype(np.float64))
    # bfloat16 has 8 bits: the nearest is at most half a unit in the last place away, 2 ** -8 of the value
    tolerance = 2 ** -8 if dtype == "bfloat16" else 3e-7
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_tensors_broadcast(name):
    x, y = abs(normal(3, 5)), abs(normal(5, seed=1))
    x[1] = y  # equal values too
    expected = BINARY[name](x.astype(np.float64), y.astype(np.float64))
    out = empty(3, 5, dtype=bool if expected.dtype == bool else np.float32)
    call(name, x, y, out)
    np.testing.assert_allclose(out, expected, rtol=3e-7)


@pytest.mark.parametrize("name", WITH_SCALAR)
def test_functions_of_a_tensor_and_a_scalar(name):
    x = abs(normal(3, 5))
    x[0, 0] = 0.75
    expected = WITH_SCALAR[name](x.astype(np.float64), 0.75)
    out = empty(3, 5, dtype=bool if expected.dtype == bool else np.float32)
    call(name, x, scalar(0.75), out)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


def test_sums_with_alpha_clamps_and_choices():
    x, y = normal(4), normal(4, seed=1)
    for name, arguments, expected in [
            ("Add", (x, y, scalar(2, "int64")), x + 2 * y), ("Sub", (x, y, scalar(0.5)), x - y / 2),
            ("Adds", (x, scalar(3.0), scalar(1, "int64")), x + 3),
            ("Subs", (x, scalar(3.0), scalar(1, "int64")), x - 3),
            ("Clamp", (x, scalar(-0.5), scalar(0.5)), np.minimum(np.maximum(x, -0.5), 0.5)),
            ("Clamp", (x, None, scalar(0.5)), np.minimum(x, 0.5)),
            ("PowScalarTensor", (scalar(10.0), x), np.exp(x * np.log(10))),
            ("SWhere", (x > 0, x, y), (x > 0) * x + (x <= 0) * y)]:
        out = empty(4)
        call(name, *arguments, out)
        np.testing.assert_allclose(out, expected, rtol=2e-6, err_msg=name)
    out = empty(4, dtype=np.complex64)
    call("Polar", abs(x), y, out)
    np.testing.assert_allclose(out, abs(x) * (np.cos(y) + 1j * np.sin(y)), rtol=1e-6)


def test_in_place():
    y, mask = normal(4, seed=1), np.array([True, False, False, True])
    for name, arguments, expected in [
            ("InplaceAdd", (y, scalar(2, "int64")), lambda x: x + 2 * y),
            ("InplaceSub", (y, scalar(1.0)), lambda x: x - y),
            ("InplaceMul", (y,), lambda x: x * y), ("InplaceDiv", (y,), lambda x: x / y),
            ("InplaceAdds", (scalar(3.0), scalar(1.0)), lambda x: x + 3),
            ("InplaceMuls", (scalar(3.0),), lambda x: 3 * x),
            ("InplaceCopy", (y[:1],), lambda x: y[[0, 0, 0, 0]]), ("InplaceOne", (), np.ones_like),
            ("InplaceZero", (), np.zeros_like), ("InplaceFillScalar", (scalar(2.5),), lambda x: 0 * x + 2.5),
            ("InplaceFillTensor", (y[1:2],), lambda x: 0 * x + y[1]),
            ("InplaceMaskedFillScalar", (mask, scalar(7.0)), lambda x: x * ~mask + 7 * mask),
            ("InplaceMaskedFillTensor", (mask, y[:1]), lambda x: x * ~mask + y[0] * mask)]:
        x = normal(4)
        expected = expected(x)
        call(name, x, *arguments)
        np.testing.assert_allclose(x, expected, rtol=1e-6, err_msg=name)


def test_a_cast_rounds_to_nearest_even():
    x = np.array([1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -8 + 2 ** -20, -1 - 2 ** -8], np.float32)  # bfloat16: 2 ** -7
    out = empty(4).astype(BFLOAT16)
    call("Cast", x, 27, out)
    assert out.astype(np.float32).tolist() == [1, 1 + 2 ** -6, 1 + 2 ** -7, -1]
    whole = empty(4, dtype=np.int32)
    call("Cast", np.array([1.9, -1.9, 3.0, 0.0], np.float32), 3, whole)
    assert whole.tolist() == [1, -1, 3, 0]
    finite = empty(3, dtype=bool)
    call("IsFinite", np.array([1, np.inf, np.nan], np.float32), finite)
    assert finite.tolist() == [True, False, False]
    call("LogicalNot", np.array([0, 2, 1], np.float32), finite)
    assert finite.tolist() == [True, False, False]


@pytest.mark.parametrize("axis", [-1, 1])
def test_swiglu(axis):
    x = normal(2, 6, 4)
    shape = (2, 6, 2) if axis == -1 else (2, 3, 4)
    g = normal(*shape, seed=1)

    def function(x):
        y = empty(*shape)
        call("SwiGlu", x, axis, y)
        return y

    first, second = (x[..., :2], x[..., 2:]) if axis == -1 else (x[:, :3], x[:, 3:])
    np.testing.assert_allclose(function(x), first * (1 + np.tanh(first / 2)) / 2 * second, rtol=1e-5, atol=1e-6)
    to_x = empty(2, 6, 4)
    call("SwiGluGrad", g, x, axis, to_x)
    assert_gradient(function, x, to_x, g)


@pytest.mark.parametrize("name, extra, backward, remembers", [
    ("Silu", (), "SiluBackward", "x"), ("Tanh", (), "TanhBackward", "y"), ("Sigmoid", (), "SigmoidBackward", "y"),
    ("GeluV2", (0,), "GeluBackwardV2", "none"), ("GeluV2", (1,), "GeluBackwardV2", "tanh")])
def test_gradients_of_activations(name, extra, backward, remembers):
    x, g = normal(40), normal(40, seed=1)

    def function(x):
        y = empty(40)
        call(name, x, *extra, y)
        return y

    out = empty(40)
    after = (remembers,) if remembers in ("none", "tanh") else ()
    call(backward, g, function(x) if remembers == "y" else x, *after, out)
    assert_gradient(function, x, out, g)


def test_gelu_and_threshold():
    x, out = normal(50), empty(50)
    call("GeluV2", x, 0, out)
    np.testing.assert_allclose(out, [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x], rtol=1e-5, atol=1e-7)
    exact = out.copy()
    call("GeluV2", x, 1, out)
    np.testing.assert_allclose(out, exact, atol=1e-3)  # the approximation's own error is below 5e-4
    assert np.abs(out - exact).max() > 1e-5
    call("ThresholdBackward", x, x, scalar(0.0), out)
    np.testing.assert_array_equal(out, np.maximum(x, 0))


# --- movement --------------------------------------------------------------------------------------------------------
def test_strided_views_are_read_and_written():
    x, out = normal(3, 4), np.zeros((4, 6), np.float32)
    call("Neg", x.T, out[:, ::2])
    np.testing.assert_array_equal(out[:, ::2], -x.T)
    assert not out[:, 1::2].any()


def test_permutations_pieces_and_joins():
    x = normal(2, 3, 4)
    out = empty(4, 2, 3)
    call("Permute", x, [2, 0, 1], out)
    assert out[3, 1, 2] == x[1, 2, 3]
    out = empty(2, 3, 4)
    call("Flip", x, [0, 2], out)
    np.testing.assert_array_equal(out, x[::-1, :, ::-1])
    out = empty(2, 3, 4)
    call("Expand", x[:, :1], [2, 3, 4], out)
    np.testing.assert_array_equal(out, x[:, [0, 0, 0]])
    out = empty(4, 3, 4)
    call("Repeat", x, [2, 1, 1], out)
    np.testing.assert_array_equal(out, x[[0, 1, 0, 1]])
    out = empty(2, 6, 4)
    call("RepeatInterleaveIntWithDim", x, 2, 1, 6, out)
    np.testing.assert_array_equal(out, x[:, [0, 0, 1, 1, 2, 2]])
    parts = tuple(empty(2, n, 4) for n in (2, 1))
    call("SplitTensor", x, 2, 1, parts)
    np.testing.assert_array_equal(parts[1], x[:, 2:])
    call("SplitWithSize", x, [2, 1], 1, parts)
    np.testing.assert_array_equal(parts[0], x[:, :2])
    out = empty(2, 3, 4)
    call("Cat", parts, 1, out)
    np.testing.assert_array_equal(out, x)
    out = empty(2, 2, 3, 4)
    call("Stack", (x, -x), 1, out)
    np.testing.assert_array_equal(out[:, 1], -x)


def test_one_piece_of_a_split_is_whole():
    x, out = normal(2, 3), empty(2, 3)
    call("SplitTensor", x, 3, 1, (out,))
    np.testing.assert_array_equal(out, x)


def test_triangles_and_indices():
    x, out = normal(3, 3), empty(3, 3)
    call("Tril", x, -1, out)
    assert np.argwhere(out).tolist() == [[1, 0], [2, 0], [2, 1]]
    call("Triu", x, 1, out)
    assert np.argwhere(out).tolist() == [[0, 1], [0, 2], [1, 2]]
    index, out = np.array([2, 0], np.int64), empty(3, 2)
    call("IndexSelect", x, 1, index, out)
    np.testing.assert_array_equal(out, x[:, [2, 0]])
    out = empty(2, 3)
    call("Embedding", x, index.astype(np.int32), out)
    np.testing.assert_array_equal(out, x[[2, 0]])
    index_gradient = empty(4, 2)
    call("EmbeddingDenseBackward", normal(3, 2), np.array([1, 3, 1], np.int64), 4, -1, 0, index_gradient)
    np.testing.assert_allclose(index_gradient, [[0, 0], normal(3, 2)[0] + normal(3, 2)[2], [0, 0], normal(3, 2)[1]])
    call("Index", x, (index,), out)
    np.testing.assert_array_equal(out, x[[2, 0]])
    out = empty(3, 2)
    call("Index", x, (np.empty(0, np.int64), index), out)
    np.testing.assert_array_equal(out, x[:, [2, 0]])
    rows, columns = np.array([0, 2, 0], np.int64), np.array([1, 0, 1], np.int64)
    added, put = x.copy(), x.copy()
    call("IndexPutImpl", added, (rows, columns), np.array([1, 2, 4], np.float32), 1, 0)
    expected = x.copy()
    expected[0, 1] += 5  # a place that is named twice
    expected[2, 0] += 2
    np.testing.assert_array_equal(added, expected)
    call("IndexPutImpl", put, (np.empty(0, np.int64), columns[:2]), np.full((3, 2), 7, np.float32), 0, 0)
    assert (put[:, :2] == 7).all() and (put[:, 2:] == x[:, 2:]).all()
    out = empty(3, 1)
    call("Gather", x, 1, np.array([[2], [0], [1]], np.int64), out)
    assert out[:, 0].tolist() == [x[0, 2], x[1, 0], x[2, 1]]
    out = empty(4, dtype=np.int64)
    call("Arange", scalar(1, "int64"), scalar(8, "int64"), scalar(2, "int64"), out)
    assert out.tolist() == [1, 3, 5, 7]


def test_padding_starts_at_the_last_axis_and_may_cut():
    x, out = normal(2, 3), empty(3, 4)
    call("ConstantPadNd", x, [2, -1, 0, 1], scalar(9.0), out)
    assert out.tolist() == [[9, 9, *x[0, :2]], [9, 9, *x[1, :2]], [9, 9, 9, 9]]


def test_upsampling_and_its_gradient():
    x, out = normal(1, 2, 2, 3), empty(1, 2, 4, 6)
    call("UpsampleNearest2d", x, [4, 6], out)
    np.testing.assert_array_equal(out, x.repeat(2, 2).repeat(2, 3))
    back = empty(1, 2, 2, 3)
    call("UpsampleNearest2dBackward", out, [4, 6], [1, 2, 2, 3], back, floats=(2.0, 2.0))
    np.testing.assert_allclose(back, 4 * x, rtol=1e-6)


# --- reductions and products -----------------------------------------------------------------------------------------
def test_products_are_accumulated_in_float32():
    a, b = (normal(64, 64, seed=s).astype(BFLOAT16) for s in (0, 1))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    for name in ("Matmul", "Mm", "BatchMatMul"):
        out = empty(64, 64).astype(BFLOAT16)
        call(name, a, b, out, 0)
        error = np.abs(out.astype(np.float64) - exact)
        assert np.all(error <= 2.0 ** -8 * np.abs(exact) + 1e-5), name  # one rounding at the end, none between
    a, b, c = normal(4, 3), normal(3, 5, seed=1), normal(5, seed=2)
    out = empty(4, 5)
    call("Addmm", c, a, b, scalar(0.5), scalar(2.0), out, 0)
    np.testing.assert_allclose(out, c / 2 + 2 * np.einsum("ik,kj", a, b), rtol=1e-5, atol=1e-6)
    out = empty(2, 4, 5)
    call("Baddbmm", c, np.stack([a, -a]), np.stack([b, b]), scalar(1.0), scalar(1.0), out, 0)
    np.testing.assert_allclose(out, c + np.stack([a @ b, -a @ b]), rtol=1e-5, atol=1e-6)


def test_reductions():
    x = normal(3, 4)
    wide = x.astype(np.float64)
    for name, arguments, expected in [
            ("ReduceSum", ([1], True, 0), wide @ np.ones((4, 1))),
            ("ReduceSum", ([], False, 0), np.ones(3) @ wide @ np.ones(4)),
            ("Mean", ([0], False, 0), np.ones(3) @ wide / 3), ("Amax", ([1], False), np.sort(x)[:, -1]),
            ("Amin", ([0, 1], False), np.sort(x.ravel())[0]), ("Max", (), np.sort(x.ravel())[-1]),
            ("Min", (), np.sort(x.ravel())[0]), ("Cumsum", (1, 0), wide @ np.triu(np.ones((4, 4)))),
            ("LinalgVectorNorm", (scalar(2.0), [], False, 0), math.sqrt((wide ** 2).sum())),
            ("LinalgVectorNorm", (scalar(1.0), [1], True, 0), np.abs(wide) @ np.ones((4, 1))),
            ("LinalgVectorNorm", (scalar(math.inf), [1], False, 0), np.sort(np.abs(x))[:, -1])]:
        arguments = [int(a) if isinstance(a, bool) else a for a in arguments]
        out = empty(*np.shape(expected))
        call(name, x, *arguments, out)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, expected in (("Any", [True, True, False]), ("All", [True, False, False])):
        out = empty(3, dtype=bool)
        call(name, np.array([[1, 1], [1, 0], [0, 0]], bool), [1], 0, out)
        assert out.tolist() == expected
    out = empty(3, dtype=np.int64)
    call("ArgMax", x, 1, 0, out)
    assert out.tolist() == [max(range(4), key=row.__getitem__) for row in x]


def test_softmax_and_its_gradient():
    x, g = normal(3, 7), normal(3, 7, seed=1)

    def softmax(x):
        out = empty(3, 7)
        call("Softmax", x, 1, out)
        return out

    wide = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(softmax(x), wide / wide.sum(1, keepdims=True), rtol=1e-6)
    assert np.isfinite(softmax(x + np.float32(1e4))).all()
    out = empty(3, 7)
    call("SoftmaxBackward", g, softmax(x), 1, out)
    assert_gradient(softmax, x, out, g)


# --- norms -----------------------------------------------------------------------------------------------------------
def test_layer_norm_and_its_gradients():
    x, w, b, g = normal(2, 3, 8), normal(8, seed=1), normal(8, seed=2), normal(2, 3, 8, seed=3)

    def forward(x, w, b):
        y, mean, reciprocal = empty(2, 3, 8), empty(2, 3, 1), empty(2, 3, 1)
        call("LayerNorm", x, [8], w, b, y, mean, reciprocal, floats=(1e-5,))
        return y, mean, reciprocal

    y, mean, reciprocal = forward(x, w, b)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * w + b
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    plain, _, _ = forward(x, None, None)
    np.testing.assert_allclose(plain * w + b, y, rtol=1e-5, atol=1e-6)
    to_x, to_w, to_b = empty(2, 3, 8), empty(8), empty(8)
    call("LayerNormBackward", g, x, [8], mean, reciprocal, w, b, [1, 1, 1], to_x, to_w, to_b)
    assert_gradient(lambda v: forward(v, w, b)[0], x, to_x, g)
    assert_gradient(lambda v: forward(x, v, b)[0], w, to_w, g)
    assert_gradient(lambda v: forward(x, w, v)[0], b, to_b, g)


def test_group_norm_and_its_gradients():
    x, w, b, g = normal(2, 6, 4, 3), normal(6, seed=1), normal(6, seed=2), normal(2, 6, 4, 3, seed=3)

    def forward(x, w, b):
        y, mean, reciprocal = empty(2, 6, 4, 3), empty(2, 3), empty(2, 3)
        call("GroupNorm", x, w, b, 2, 6, 12, 3, y, mean, reciprocal, floats=(1e-5,))
        return y, mean, reciprocal

    y, mean, reciprocal = forward(x, w, b)
    part = x[1, 2:4].astype(np.float64)  # the second group of the second image
    expected = (part - part.mean()) / np.sqrt(part.var() + 1e-5) * w[2:4, None, None] + b[2:4, None, None]
    np.testing.assert_allclose(y[1, 2:4], expected, rtol=1e-4, atol=1e-6)
    to_x, to_w, to_b = empty(2, 6, 4, 3), empty(6), empty(6)
    call("GroupNormBackward", g, x, mean, reciprocal, w, 2, 6, 12, 3, [1, 1, 1], to_x, to_w, to_b)
    assert_gradient(lambda v: forward(v, w, b)[0], x, to_x, g)
    assert_gradient(lambda v: forward(x, v, b)[0], w, to_w, g)
    assert_gradient(lambda v: forward(x, w, v)[0], b, to_b, g)


def test_rms_norm_and_its_gradients():
    x, w, g = normal(2, 3, 8), normal(8, seed=1), normal(2, 3, 8, seed=3)

    def forward(x, w):
        y, reciprocal = empty(2, 3, 8), empty(2, 3, 1)
        call("RmsNorm", x, w, y, reciprocal, floats=(1e-6,))
        return y, reciprocal

    y, reciprocal = forward(x, w)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide / np.sqrt((wide ** 2).mean(-1, keepdims=True) + 1e-6) * w, rtol=1e-5)
    other, again, same, total = normal(2, 3, 8, seed=4), empty(2, 3, 8), empty(2, 3, 1), empty(2, 3, 8)
    call("AddRmsNorm", x - other, other, w, again, same, total, floats=(1e-6,))
    for found, wanted in ((again, y), (same, reciprocal), (total, x)):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    to_x, to_w = empty(2, 3, 8), empty(8)
    call("RmsNormGrad", g, x, reciprocal, w, to_x, to_w)
    assert_gradient(lambda v: forward(v, w)[0], x, to_x, g)
    assert_gradient(lambda v: forward(x, v)[0], w, to_w, g)


# --- attention -------------------------------------------------------------------------------------------------------
LAYOUTS = {"BNSD": lambda x: x, "BSND": lambda x: x.transpose(0, 2, 1, 3),
           "BSH": lambda x: x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1),
           "SBH": lambda x: x.transpose(2, 0, 1, 3).reshape(x.shape[2], x.shape[0], -1)}


def attend(q, k, v, layout="BNSD", mask=None, sparse=0, shift=None):
    """Flash attention of (B, N, S, D) in a layout; the result in that layout, and the rows' maxima and sums."""
    b, n, s, _ = q.shape
    arrays = [np.ascontiguousarray(LAYOUTS[layout](x)) for x in (q, k, v)]
    most, total, out = empty(b, n, s, 8), empty(b, n, s, 8), np.empty_like(arrays[0])
    call("FlashAttentionScore", *arrays, shift, None, None, mask, [], 2147483647, 2147483647, n, layout, 0, sparse,
         most, total, None, out, floats=(0.3, 1.0))
    return out, most, total


def reference(q, k, v, mask=None):
    """One row at a time, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, s in np.ndindex(q.shape[:3]):
        weights = np.array([0 if mask is not None and mask[b, 0, s, t] else math.exp(0.3 * q[b, n, s] @ k[b, n, t])
                            for t in range(k.shape[2])])
        out[b, n, s] = weights @ v[b, n] / weights.sum()
    return out


def qkv(rows=4, columns=5):
    return normal(2, 3, rows, 8), normal(2, 3, columns, 8, seed=1), normal(2, 3, columns, 8, seed=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_attention_is_softmax_attention_in_every_layout(layout):
    q, k, v = qkv()
    mask = np.random.default_rng(5).random((2, 1, 4, 5)) < 0.4
    mask[..., 0] = False
    out, most, total = attend(q, k, v, layout, mask)
    np.testing.assert_allclose(out, LAYOUTS[layout](reference(q, k, v, mask)), rtol=1e-5, atol=1e-6)
    assert (most == most[..., :1]).all() and (total == total[..., :1]).all()


def test_causal_attention_and_a_shift():
    q, k, v = qkv(5, 5)
    causal = np.triu(np.ones((2, 1, 5, 5), bool), 1)
    np.testing.assert_allclose(attend(q, k, v, sparse=2)[0], reference(q, k, v, causal), rtol=1e-5, atol=1e-6)
    q, k, v = qkv(4, 5)  # the last row sees all
    late = np.triu(np.ones((2, 1, 4, 5), bool), 2)
    np.testing.assert_allclose(attend(q, k, v, sparse=3)[0], reference(q, k, v, late), rtol=1e-5, atol=1e-6)
    shift = np.where(late, np.float32(-1e9), np.float32(0))
    np.testing.assert_allclose(attend(q, k, v, shift=shift)[0], reference(q, k, v, late), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_flash_attention(layout):
    q, k, v = qkv()
    g = normal(2, 3, 4, 8, seed=4)
    mask = np.zeros((2, 1, 4, 5), bool)
    mask[..., 4] = True
    laid = [np.ascontiguousarray(LAYOUTS[layout](x)) for x in (q, k, v, g)]
    out, most, total = attend(q, k, v, layout, mask)
    found = [np.empty_like(x) for x in laid[:3]]
    call("FlashAttentionScoreGrad", *laid, None, None, None, mask, most, total, None, out, [], 2147483647, 2147483647,
         3, layout, 0, 0, *found, None, floats=(0.3, 1.0))
    weigh = LAYOUTS[layout](g)
    for i, gradient in enumerate(found):
        inputs = [q, k, v]

        def function(x, i=i, inputs=inputs):
            given = [*inputs]
            given[i] = x
            return attend(*given, layout, mask)[0]

        expected_layout = LAYOUTS[layout]
        for seed in range(3):
            direction = normal(*inputs[i].shape, seed=seed + 100).astype(np.float64)
            ahead, behind = (np.sum(function((inputs[i] + s * 1e-3 * direction).astype(np.float32)).astype(np.float64)
                                    * weigh) for s in (1, -1))
            assert np.sum(gradient * expected_layout(direction)) == pytest.approx((ahead - behind) / 2e-3, rel=3e-3,
                                                                                 abs=3e-3)


def test_fewer_heads_of_keys():
    q, k, v = qkv()
    out, _, _ = attend(q, k[:, :1], v[:, :1])
    np.testing.assert_allclose(out, reference(q, k[:, [0, 0, 0]], v[:, [0, 0, 0]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [0, 1])
def test_rotary_embedding_turns_pairs(mode):
    x, g = normal(2, 5, 3, 8), normal(2, 5, 3, 8, seed=1)
    angles = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    angles = np.concatenate([angles, angles], 1) if mode == 0 else angles.repeat(2, 1)
    cos, sin = (f(angles).reshape(1, 5, 1, 8) for f in (np.cos, np.sin))

    def rotate(x):
        out = empty(2, 5, 3, 8)
        call("RotaryPositionEmbedding", x, cos, sin, mode, out)
        return out

    first, second = (slice(0, 4), slice(4, 8)) if mode == 0 else (slice(0, 8, 2), slice(1, 8, 2))
    turn = np.exp(1j * angles[:, first].astype(np.float64)).reshape(1, 5, 1, 4)
    expected = (x[..., first] + 1j * x[..., second]) * turn
    np.testing.assert_allclose(rotate(x)[..., first] + 1j * rotate(x)[..., second], expected, rtol=1e-5, atol=1e-6)
    to_x, to_cos, to_sin = empty(2, 5, 3, 8), empty(1, 5, 1, 8), empty(1, 5, 1, 8)
    call("RotaryPositionEmbeddingGrad", g, cos, sin, x, mode, to_x, to_cos, to_sin)
    assert_gradient(rotate, x, to_x, g)
    quarter = np.zeros_like(cos), np.ones_like(sin)
    turned = empty(2, 5, 3, 8)
    call("RotaryPositionEmbedding", x, *quarter, mode, turned)
    np.testing.assert_allclose(to_cos, (g * x).sum((0, 2), keepdims=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_sin, (g * turned).sum((0, 2), keepdims=True), rtol=1e-4, atol=1e-5)


# --- convolution -----------------------------------------------------------------------------------------------------
CASES = {"plain": ((2, 4, 6, 5), (6, 4, 3, 3), 1, 1, 1, 1), "strided": ((1, 4, 7, 7), (3, 4, 3, 3), 2, 1, 1, 1),
         "dilated": ((1, 2, 8, 7), (3, 2, 3, 2), 1, 0, 2, 1), "grouped": ((2, 4, 5, 5), (6, 2, 3, 3), 1, 1, 1, 2),
         "uneven": ((1, 2, 6, 8), (2, 2, 3, 3), 2, 0, 1, 1), "line": ((2, 3, 9), (4, 3, 3), 1, 1, 1, 1),
         "volume": ((1, 2, 3, 4, 4), (3, 2, 3, 1, 1), 1, 0, 1, 1)}


def convolve(x, w, b, stride, padding, dilation, groups):
    axes = x.ndim - 2
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], w.shape[2:])]
    out = empty(x.shape[0], w.shape[0], *size)
    call("Convolution", x, w, b, [stride] * axes, [padding] * axes, [dilation] * axes, 0, [0] * axes, groups, out, 0)
    return out


@pytest.mark.parametrize("case", CASES)
def test_convolution_by_its_definition_and_its_gradients(case):
    shape, kernel, *how = CASES[case]
    stride, padding, dilation, groups = how
    x, w, b = normal(*shape), normal(*kernel, seed=1), normal(kernel[0], seed=2)
    out = convolve(x, w, b, *how)
    wide = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *[(padding, padding)] * (x.ndim - 2)])
    expected = np.zeros(out.shape)
    for place in np.ndindex(out.shape):
        first = place[1] // (kernel[0] // groups) * kernel[1]
        seen = tuple(slice(p * stride, p * stride + dilation * (k - 1) + 1, dilation)
                     for p, k in zip(place[2:], kernel[2:]))
        expected[place] = (wide[(place[0], slice(first, first + kernel[1]), *seen)] * w[place[1]]).sum() + b[place[1]]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    g = normal(*out.shape, seed=3)
    found = [np.empty_like(a) for a in (x, w, b)]
    axes = x.ndim - 2
    call("ConvolutionBackward", g, x, w, [kernel[0]], [stride] * axes, [padding] * axes, [dilation] * axes, 0,
         [0] * axes, groups, [1, 1, 1], 0, *found)
    assert_gradient(lambda v: convolve(v, w, b, *how), x, found[0], g, tolerance=5e-3)
    assert_gradient(lambda v: convolve(x, v, b, *how), w, found[1], g, tolerance=5e-3)
    assert_gradient(lambda v: convolve(x, w, v, *how), b, found[2], g, tolerance=5e-3)


# --- the older path and the optimizers -------------------------------------------------------------------------------
def test_older_operators():
    x, y = normal(3, 4), normal(3, 4, seed=1)
    axes = np.array([1], np.int64)
    infinite, zero = np.full((3, 4), np.inf, np.float32), np.zeros((3, 4), np.float32)
    for name, inputs, expected, attributes in [
            ("Add", (x, y), x + y, {}), ("Sub", (x, y), x - y, {}), ("Mul", (x, y), x * y, {}),
            ("RealDiv", (x, y), x / y, {}), ("AddN", (x, y, x), 2 * x + y, {"N": 3}), ("Square", (x,), x ** 2, {}),
            ("Identity", (x,), x, {}), ("TensorMove", (x,), x, {}), ("Assign", (x, y), y, {}),
            ("AssignAdd", (x, y), x + y, {}), ("ZerosLike", (x,), 0 * x, {}), ("OnesLike", (x,), 0 * x + 1, {}),
            ("MulNoNan", (infinite, zero), zero, {}), ("RsqrtGrad", (x, y), -y * x ** 3 / 2, {}),
            ("ReduceSum", (x, axes), np.sum(x, 1), {"keep_dims": False}),
            ("ReduceMean", (x, axes), np.sum(x, 1)[:, None] / 4, {"keep_dims": True}),
            ("BiasAdd", (x, y[0]), x + y[0], {}), ("BiasAddGrad", (x,), np.ones(len(x)) @ x, {"data_format": "NCHW"}),
            ("BiasAddGrad", (x.reshape(3, 2, 2),), np.einsum("nch->c", x.reshape(3, 2, 2)),
             {"data_format": "NCHW"}),
            ("GatherV2", (x, np.array([2, 0], np.int32), axes), x[:, [2, 0]], {}),
            ("GatherNd", (x, np.array([[2, 0], [1, 3]], np.int64)), np.array([x[2, 0], x[1, 3]]), {}),
            ("ScatterNd", (np.array([[2], [0], [2]], np.int64), x, np.array([3, 4], np.int64)),
             np.array([x[1], 0 * x[0], x[0] + x[2]]), {}),
            ("UnsortedSegmentSum", (x, np.array([1, -1, 1], np.int32), np.array(2, np.int64)),
             np.array([0 * x[0], x[0] + x[2]]), {}),
            ("Pack", (x, y), np.stack([x, y], 1), {"axis": 1}),
            ("Fill", (np.array([2, 3], np.int64), np.array(1.5, np.float32)), np.full((2, 3), 1.5), {}),
            ("StridedSlice", (x, np.array([0, 3], np.int64), np.array([2, 0], np.int64), np.array([1, -2], np.int64)),
             x[0:2, 3:0:-2], {}),
            ("StridedSlice", (x, *[np.array(v, np.int64) for v in ([1, 0], [0, 2], [1, 1])]), x[1, 0:2],
             {"shrink_axis_mask": 1}),
            ("ApplyGradientDescent", (x, np.array(0.5, np.float32), y), x - y / 2, {}),
            ("SGD", (x, y, np.array(0.5, np.float32)), x - y / 2, {})]:
        out = empty(*np.shape(expected))
        older(name, inputs, [out], **attributes)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    whole = empty(3, dtype=np.int64)
    older("ArgMaxV2", (x, axes), [whole])
    assert whole.tolist() == [max(range(4), key=row.__getitem__) for row in x]
    older("Range", [np.array(v, np.int64) for v in (1, 7, 2)], [whole])
    assert whole.tolist() == [1, 3, 5]
    parts = [empty(3) for _ in range(4)]
    older("Unpack", (x,), parts, axis=1)
    np.testing.assert_array_equal(np.stack(parts, 1), x)


def test_the_gradient_of_a_strided_slice_lies_where_it_was_cut():
    bounds = [np.array(v, np.int64) for v in ([0, 1], [3, 4], [2, 2])]
    x, g, out = normal(3, 4), normal(2, 2, seed=1), empty(3, 4)
    older("StridedSliceGrad", (np.array([3, 4], np.int64), *bounds, g), [out])
    cut = empty(2, 2)
    older("StridedSlice", (x, *bounds), [cut])
    assert np.sum(out * x) == pytest.approx(np.sum(g * cut), rel=1e-5)
    assert np.count_nonzero(out) == 4


def test_older_layer_norm():
    x, w, b = normal(3, 8), normal(8, seed=1), normal(8, seed=2)
    out, mean, variance = empty(3, 8), empty(3, 1), empty(3, 1)
    older("LayerNorm", (x, w, b), [out, mean, variance], begin_norm_axis=1, epsilon=1e-5)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * w + b
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance[:, 0], wide.var(1), rtol=1e-5)

    def normal_of(x, w, b):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * w + b

    g, gradients = normal(3, 8, seed=3), [empty(3, 8), empty(8), empty(8)]
    older("LayerNormGrad", (g, x, variance, mean, w), gradients)
    assert_gradient(lambda v: normal_of(v, w, b), x, gradients[0], g)
    assert_gradient(lambda v: normal_of(x, v, b), w, gradients[1], g)
    assert_gradient(lambda v: normal_of(x, w, v), b, gradients[2], g)


def test_adam_as_in_its_paper():
    p, m, v = (a.astype(np.float64) for a in (normal(6), np.zeros(6), np.zeros(6)))
    found = [p.astype(np.float32), np.zeros(6, np.float32), np.zeros(6, np.float32)]
    number = np.float32
    for step in (1, 2, 3):
        g = normal(6, seed=step)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.astype(np.float64) ** 2
        p = p - 1e-2 * (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.999 ** step)) + 1e-12)
        constants = [np.array(c, number) for c in (0.9 ** step, 0.999 ** step, 1e-2, 0.9, 0.999, 1e-12)]
        older("ApplyAdamD", (*found, *constants, g), found)
    np.testing.assert_allclose(found[0], p, rtol=1e-4)


def test_adamw_of_two_kinds():
    p, m, v, g = (normal(6, seed=s) for s in range(4))
    v = abs(v)
    found = [a.copy() for a in (p, m, v)]
    floats = [struct.unpack("<d", struct.pack("<f", f) + bytes(4))[0] for f in (1e-2, 0.9, 0.99, 0.1, 1e-8)]
    call("ApplyAdamWV2", *found, None, g, np.array([2], np.float32), 0, 0, floats=floats)
    m2, v2 = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    expected = p * (1 - 1e-3) - 1e-2 * (m2 / (1 - 0.9 ** 3)) / (np.sqrt(v2 / (1 - 0.99 ** 3)) + 1e-8)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[2], v2, rtol=1e-5)
    constants = [np.array(c, np.float32) for c in (1e-2, 0.9, 0.1, 0.99, 0.01, 0.1, 1e-8)]
    out = [empty(6) for _ in range(3)]
    older("AdamApplyOneWithDecayAssign", (g, v, m, p, *constants), out)
    np.testing.assert_allclose(out[2], p - 1e-2 * (m2 / (np.sqrt(v2) + 1e-8) + 0.1 * p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_twice(nesterov):
    p, total = normal(6), np.zeros(6, np.float32)
    expected = p.astype(np.float64)
    for step in (1, 2):
        g = normal(6, seed=step)
        older("ApplyMomentum", (p, total, np.array(0.1, np.float32), g, np.array(0.9, np.float32)), [p],
              use_nesterov=nesterov)
        whole = g if step == 1 else 0.9 * normal(6, seed=1) + g
        expected -= 0.1 * (g + 0.9 * whole if nesterov else whole)
    np.testing.assert_allclose(p, expected, rtol=1e-5)


# --- the table -------------------------------------------------------------------------------------------------------
def test_what_is_missing_says_what_to_write():
    with pytest.raises(NotImplementedError, match=r"float32\[2,3\], scalar float32, 7.*@aclnn\(\"Nothing\""):
        call("Nothing", normal(2, 3), scalar(1.0), 7)
    with pytest.raises(NotImplementedError, match=r"bfloat16\[2\].*@aclop\(\"Nothing\"\)"):
        older("Nothing", [normal(2).astype(BFLOAT16)], [empty(2)])
    with pytest.raises(NotImplementedError, match="dropout"):
        q = normal(1, 1, 2, 4)
        call("FlashAttentionScore", q, q, q, None, None, None, None, None, 0, 0, 1, "BNSD", 0, 0, None, None, None, q,
             floats=(1.0, 0.9))


def test_arguments_that_are_not_what_the_table_says_are_errors():
    x = normal(2)
    with pytest.raises(TypeError, match="more arguments"):
        call("Neg", x, x, x)
    with pytest.raises(TypeError, match="letter s"):
        call("Muls", x, x, x)
    with pytest.raises(TypeError, match=r"fewer|output"):
        call("Mul", x, x)
    with pytest.raises(ValueError, match="broadcast"):
        call("Neg", x, empty(3))


def test_every_operator_is_run_by_a_test_of_this_file():
    source = Path(__file__).read_text()
    unary = {*UNARY, *BINARY, *WITH_SCALAR}
    unseen = [n for n in ACLNN if f'"{n.removeprefix("aclnn")}"' not in source and n.removeprefix("aclnn") not in unary]
    assert not unseen + [n for n in ACLOP if f'"{n}"' not in source]
