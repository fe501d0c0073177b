"""`mindspore.mint`: creation of tensors and functions of tensors, from primitives that have a CPU kernel.

Names, arguments and results are those of `mindspore.mint`; the names in ``__all__`` are replaced. Compared with NumPy
in value and gradient by tests/ops/test_cpu_tensor.py.
"""
from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops
from mindspore.common import dtype as mstype
from mindspore.ops import operations as P
from mindspore.ops.primitive import _primexpr, constexpr

from ms_diffsynth.errors import DeviceError

__all__ = [
    "addmm", "arange", "argmax", "argmin", "argsort", "baddbmm", "chunk", "cumsum", "diag", "diff", "einsum", "full",
    "full_like", "index_select", "linspace", "logsumexp", "mm", "norm", "ones_like", "outer", "repeat_interleave",
    "roll", "sort", "split", "stack", "std", "topk", "tril", "unbind", "var", "zeros_like",
]

_GATHER = P.Gather()
_ONES_LIKE = P.OnesLike()
_SLICE = P.Slice()
_ZEROS_LIKE = P.ZerosLike()


# ---- creation ----

def arange(start=0, end=None, step=1, *, dtype=None):
    return ops.arange(start, end, step, dtype=dtype)


@_primexpr
def _dtype_of(number):
    if isinstance(number, bool):
        return mstype.bool_
    return mstype.int64 if isinstance(number, int) else mstype.float32


def full(size, fill_value, *, dtype=None):
    """Of the number's own kind by default; ``ops.full`` would round 0.5 to 0."""
    return ops.full(size, fill_value, dtype=_dtype_of(fill_value) if dtype is None else dtype)


def full_like(input, fill_value, *, dtype=None):
    return ops.full(input.shape, fill_value, dtype=input.dtype if dtype is None else dtype)


def zeros_like(input, *, dtype=None):
    out = _ZEROS_LIKE(input)
    return out if dtype is None else ops.cast(out, dtype)


def ones_like(input, *, dtype=None):
    out = _ONES_LIKE(input)
    return out if dtype is None else ops.cast(out, dtype)


def linspace(start, end, steps, *, dtype=None):
    """Counted from both ends, as PyTorch does: the last value is exactly ``end``."""
    dtype = mstype.float32 if dtype is None else dtype
    if steps == 1:
        return ops.full((1,), start, dtype=dtype)
    index = ops.arange(0, steps, 1, dtype=mstype.float32)
    step = (end - start) / (steps - 1)
    return ops.select(index < steps // 2, start + step * index, end - step * (steps - 1 - index)).astype(dtype)


# ---- products ----

def outer(input, vec2):
    return input.reshape(-1, 1) * vec2.reshape(1, -1)


def mm(input, mat2):
    return ops.matmul(input, mat2)


def addmm(input, mat1, mat2, *, beta=1, alpha=1):
    return input * beta + ops.matmul(mat1, mat2) * alpha


def baddbmm(input, batch1, batch2, *, beta=1, alpha=1):
    out = ops.bmm(batch1, batch2) * alpha
    # with beta 0 `input` is often uninitialised memory, and 0 * nan is nan
    return out if beta == 0 else out + input * beta


@constexpr
def _einsum_plan(equation, shapes):
    """How to compute an equation, the operands one after the other.

    Returns: (axes to sum over, shape to broadcast to) of every operand; for every operand but the first (order of the
    axes so far, their shape [B, M, K], order of its own axes, their shape [B, K, N], shape of the product); and the
    order of the last product's axes in the result.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise ValueError(f"einsum equation='{equation}' with {len(shapes)} operands: expected {len(terms)}.")
    letters = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]  # for the axes of an ellipsis
    widest = max(len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes))
    for k, (term, shape) in enumerate(zip(terms, shapes)):
        count = len(shape) - len(term.replace("...", ""))
        terms[k] = term.replace("...", "".join(letters[widest - count:widest]))
        if len(terms[k]) != len(shape):
            raise ValueError(f"einsum equation='{equation}': operand {k} has the shape {list(shape)}, which does not "
                             f"fit '{term}'.")
        if len(set(terms[k])) != len(terms[k]):
            raise DeviceError(f"einsum equation='{equation}' on the CPU: '{term}' names an axis twice. Take the "
                              "diagonal first, with mint.diag.")
    given = "".join(terms)
    dots = "".join(letters[:widest])
    result = right.replace("...", dots) if arrow else dots + "".join(
        sorted(c for c in set(given) if given.count(c) == 1 and c not in dots))
    sizes = {}
    for term, shape in zip(terms, shapes):
        for c, n in zip(term, shape):
            if sizes.get(c, 1) not in (1, n) and n != 1:
                raise ValueError(f"einsum equation='{equation}' of shapes {[list(s) for s in shapes]}: axis '{c}' has "
                                 f"{sizes[c]} and {n} elements.")
            sizes[c] = max(n, sizes.get(c, 1))
    odd = [c for c in result if c not in sizes or result.count(c) > 1]
    if odd:
        raise ValueError(f"einsum equation='{equation}': the result names '{odd[0]}' twice, or no operand has it.")
    firsts, reduced = [], []
    for k, term in enumerate(terms):
        elsewhere = result + "".join(terms[:k] + terms[k + 1:])
        summed = tuple(i for i, c in enumerate(term) if c not in elsewhere)
        firsts.append((summed, tuple(sizes[c] for c in term)))
        reduced.append("".join(c for c in term if c in elsewhere))
    pairs, now = [], reduced[0]
    for k in range(1, len(terms)):
        other, later = reduced[k], result + "".join(reduced[k + 1:])
        both = [c for c in now if c in other]
        batch, summed = [c for c in both if c in later], [c for c in both if c not in later]
        rows, columns = [c for c in now if c not in both], [c for c in other if c not in both]

        def count(names):
            return int(np.prod([sizes[c] for c in names], dtype=np.int64))

        pairs.append((tuple(now.index(c) for c in batch + rows + summed), (count(batch), count(rows), count(summed)),
                      tuple(other.index(c) for c in batch + summed + columns),
                      (count(batch), count(summed), count(columns)),
                      tuple(sizes[c] for c in batch + rows + columns)))
        now = "".join(batch + rows + columns)
    return tuple(firsts), tuple(pairs), tuple(now.index(c) for c in result)


def einsum(equation, *operands):
    """Every pair of operands as one product of matrices."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    firsts, pairs, order = _einsum_plan(equation, tuple([x.shape for x in operands]))
    parts = ()
    for k in range(len(operands)):
        x = operands[k]
        if x.shape != firsts[k][1]:
            x = x.broadcast_to(firsts[k][1])
        if len(firsts[k][0]) > 0:
            x = x.sum(firsts[k][0])
        parts = parts + (x,)
    out = parts[0]
    for k in range(len(pairs)):
        left, left_shape, right, right_shape, shape = pairs[k]
        a = ops.transpose(out, left).reshape(left_shape)
        b = ops.transpose(parts[k + 1], right).reshape(right_shape)
        out = ops.bmm(a, b).reshape(shape)
    return ops.transpose(out, order)


# ---- reductions ----

@_primexpr
def _dims(dim, ndim):
    """``dim`` as a tuple of non-negative axes; None means all."""
    if dim is None:
        return tuple(range(ndim))
    return tuple(d % ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))


@_primexpr
def _count(shape, dims):
    return int(np.prod([shape[d] for d in dims]))


@_primexpr
def _check_order(p):
    if p not in ("fro", 1, 2, float("inf")):
        raise DeviceError(f"mint.norm with p={p} on the CPU: expected 'fro', 1, 2 or inf. "
                          "Compose it from abs, pow and sum.")
    return p


def var(input, dim=None, *, correction=1, keepdim=False):
    dims = _dims(dim, input.ndim)
    centred = input - input.mean(dims, keep_dims=True)
    return ops.square(centred).sum(dims, keepdims=keepdim) / max(_count(input.shape, dims) - correction, 0)


def std(input, dim=None, *, correction=1, keepdim=False):
    return ops.sqrt(var(input, dim, correction=correction, keepdim=keepdim))


def norm(input, p="fro", dim=None, keepdim=False, *, dtype=None):
    """The gradient at zero is zero, not nan."""
    x = input if dtype is None else input.astype(dtype)
    dims, p = _dims(dim, input.ndim), _check_order(p)
    if p == 1:
        return ops.abs(x).sum(dims, keepdims=keepdim)
    if p == float("inf"):
        return ops.amax(ops.abs(x), dims, keepdims=keepdim)
    square = ops.square(x).sum(dims, keepdims=keepdim)
    zero = (square == 0).astype(x.dtype)
    return ops.sqrt(square + zero) - zero


def logsumexp(input, dim, keepdim=False):
    dims = _dims(dim, input.ndim)
    top = ops.stop_gradient(ops.amax(input, dims, keepdims=True))
    out = ops.log(ops.exp(input - top).sum(dims, keepdims=True)) + top
    return out if keepdim else out.squeeze(dims)


def cumsum(input, dim, dtype=None):
    if dtype is not None:
        return ops.cumsum(input.astype(dtype), dim)
    if input.dtype == mstype.bool_:
        return ops.cumsum(input.astype(mstype.int64), dim)
    return ops.cumsum(input, dim)


# ---- order ----

def argmax(input, dim=None, keepdim=False):
    if dim is None:
        return ops.argmax(input.reshape(-1), 0).astype(mstype.int64)
    return ops.argmax(input, dim, keepdim).astype(mstype.int64)


def argmin(input, dim=None, keepdim=False):
    return argmax(-input, dim, keepdim)


def sort(input, *, dim=-1, descending=False, stable=False):
    values, indices = ops.sort(input, dim, descending)
    return values, indices.astype(mstype.int64)


def argsort(input, dim=-1, descending=False, stable=False):
    return ops.sort(input, dim, descending)[1].astype(mstype.int64)


def topk(input, k, dim=-1, largest=True, sorted=True):
    values, indices = ops.topk(input, k, dim, largest, sorted)
    return values, indices.astype(mstype.int64)


# ---- pieces ----

@_primexpr
def _slices(shape, sections, dim):
    """(begin, size) of each section; ``sections`` is their common size, the last may be smaller, or their sizes."""
    total = shape[dim]
    if isinstance(sections, int):
        sections = tuple(min(sections, total - start) for start in range(0, total, sections))
    if sum(sections) != total:
        raise ValueError(f"split into {tuple(sections)} of an axis of {total}: expected sizes that add up to it.")
    starts = np.cumsum((0, *sections[:-1]))
    axes, dim = range(len(shape)), dim % len(shape)
    return tuple((tuple(int(start) if a == dim else 0 for a in axes), tuple(n if a == dim else shape[a] for a in axes))
                 for start, n in zip(starts, sections))


def split(tensor, split_size_or_sections, dim=0):
    """Slices: the primitive for sections of different sizes has no CPU kernel before MindSpore 2.10."""
    if isinstance(split_size_or_sections, int) and tensor.shape[dim] % split_size_or_sections == 0:
        return P.Split(dim, tensor.shape[dim] // split_size_or_sections)(tensor)
    return tuple([_SLICE(tensor, begin, size) for begin, size in _slices(tensor.shape, split_size_or_sections, dim)])


def chunk(input, chunks, dim=0):
    return split(input, -(-input.shape[dim] // chunks), dim)


def stack(tensors, dim=0):
    return ops.stack(tensors, axis=dim)


def unbind(input, dim=0):
    return input.unbind(dim)


def index_select(input, dim, index):
    return _GATHER(input, index, dim)


def repeat_interleave(input, repeats, dim=None, *, output_size=None):
    if dim is None:
        return input.reshape(-1).repeat_interleave(repeats, 0)
    return input.repeat_interleave(repeats, dim)


def tril(input, diagonal=0):
    return input.tril(diagonal)


@_primexpr
def _check_main_diagonal(diagonal):
    if diagonal != 0:
        raise DeviceError(f"mint.diag with diagonal={diagonal} on the CPU: expected 0. Pad the result.")


def diag(input, diagonal=0):
    _check_main_diagonal(diagonal)
    if input.ndim == 1:
        return ops.eye(input.shape[0], input.shape[0], input.dtype) * input.reshape(1, -1)
    side = min(input.shape[0], input.shape[1])
    return (input[:side, :side] * ops.eye(side, side, input.dtype)).sum(1)


@_primexpr
def _shifts(shifts, dims):
    shifts = tuple(shifts) if isinstance(shifts, (tuple, list)) else (shifts,)
    dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    return tuple(zip(shifts, dims))


@constexpr
def _rolled(size, shift):
    return Tensor((np.arange(size) - shift) % size, mstype.int32)


def roll(input, shifts, dims=None):
    out = input.reshape(-1) if dims is None else input
    for shift, dim in _shifts(shifts, 0 if dims is None else dims):
        out = _GATHER(out, _rolled(out.shape[dim], shift), dim)
    return out.reshape(input.shape)


@constexpr
def _span(start, end):
    return Tensor(np.arange(start, end), mstype.int32)


def diff(input, n=1, dim=-1, prepend=None, append=None):
    if prepend is not None:
        input = ops.cat((prepend, input), dim)
    if append is not None:
        input = ops.cat((input, append), dim)
    for _ in range(n):
        size = input.shape[dim]
        input = _GATHER(input, _span(1, size), dim) - _GATHER(input, _span(0, size - 1), dim)
    return input
