"""Data that only moves: permutations, pieces and joins, indices, padding, resizing to the nearest."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ms_diffsynth.standin.compute.table import Array, aclnn

aclnn("InplaceCopy", "&r r", lambda x, source: source)
aclnn("Permute", "r I -> t", lambda x, axes: np.transpose(x, axes))
aclnn("Flip", "r I -> t", lambda x, axes: np.flip(x, tuple(axes)))
aclnn("Expand", "r I -> t", lambda x, shape: x)  # writing an output broadcasts
aclnn("Repeat", "r I -> t", np.tile)
aclnn("RepeatInterleaveIntWithDim", "r i i i -> t", lambda x, times, axis, size: np.repeat(x, times, axis))
aclnn("Stack", "T i -> t", np.stack)
aclnn("Cat", "T i -> t", lambda parts, axis: np.concatenate([p for p in parts if p.shape != (0,)], axis))
aclnn("Tril", "r i -> t", np.tril)
aclnn("Triu", "r i -> t", np.triu)
aclnn("IndexSelect", "r i r -> t", lambda x, axis, index: np.take(x, index, axis))
aclnn("Gather", "r i r -> t", lambda x, axis, index: np.take_along_axis(x, index, axis))
aclnn("Embedding", "r r -> t", lambda weight, index: weight[index])


@aclnn("EmbeddingDenseBackward", "t r i i b -> t")
def embedding_gradient(gradient: Array, index: Array, rows: int, padding: int, by_frequency: bool) -> Array:
    """Of the weight: the sum of what came in for each row; none for that of ``padding``, where it is not negative."""
    if by_frequency:
        raise NotImplementedError("scaled by frequency it is not computed by the stand-in: write it in "
                                  "compute/movement.py")
    weight = np.zeros((rows, gradient.shape[-1]), gradient.dtype)
    np.add.at(weight, index.ravel(), gradient.reshape(-1, gradient.shape[-1]))
    if 0 <= padding < rows:
        weight[padding] = 0
    return weight


@aclnn("SplitTensor", "r i i -> T")
def split(x: Array, size: int, axis: int) -> list[Array]:
    """Pieces of ``size``; the last may be smaller."""
    return np.split(x, range(size, x.shape[axis], size), axis)


@aclnn("SplitWithSize", "r I i -> T")
def split_with_sizes(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    return np.split(x, np.cumsum(sizes)[:-1], axis)


@aclnn("Index", "r T -> t")
def index(x: Array, indices: Sequence[Array | None]) -> Array:
    """Advanced indexing; an axis that is not indexed has no tensor, or an empty one."""
    return x[_places(indices)]


@aclnn("IndexPutImpl", "&t T t b b")
def index_put(x: Array, indices: Sequence[Array | None], values: Array, accumulate: bool, unsafe: bool) -> Array:
    """x with ``values`` at what `index` reads, or added to it, as often as a place is named."""
    result, places = x.copy(), _places(indices)
    if accumulate:
        np.add.at(result, places, values)
    else:
        result[places] = values
    return result


def _places(indices: Sequence[Array | None]) -> tuple[Array | slice, ...]:
    return tuple(slice(None) if i is None or i.shape == (0,) else i for i in indices)


@aclnn("Arange", "s s s -> t")
def arange(start: float, end: float, step: float) -> Array:
    count = math.ceil((end - start) / step)
    return start + np.arange(count) * step


@aclnn("ConstantPadNd", "r I s -> t")
def constant_pad(x: Array, pad: Sequence[int], value: float) -> Array:
    """Padding before and after, from the last axis backwards; a negative one cuts."""
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    kept = tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(x.shape, widths))
    return np.pad(x[kept], [(max(a, 0), max(b, 0)) for a, b in widths], constant_values=value)


@aclnn("UpsampleNearest2d", "r I -> t")
def upsample_nearest(x: Array, size: Sequence[int]) -> Array:
    """(N, C, H, W) to (N, C, *size)."""
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, x.shape[2:]))
    return x[:, :, rows[:, None], columns]


@aclnn("UpsampleNearest2dBackward", "t I I d d -> t")
def upsample_nearest_gradient(gradient: Array, size: Sequence[int], shape: Sequence[int], *scales: float) -> Array:
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, shape[2:]))
    result = np.zeros(shape, np.float32)
    np.add.at(result, (slice(None), slice(None), rows[:, None], columns), gradient)
    return result
