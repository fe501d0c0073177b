"""The tensors of adapters in one Parameter, and how the blocks that compute with them get them."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_diffsynth.nn.adapters.layer import AdaptedLinear, attribute
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.ops.split import Split

_split = Split(0)


class FlatTensors(nn.Cell):
    """The tensors of the adapters in a network's blocks in one Parameter: one gradient, one norm, one update.

    Of each layer it holds its parts one after the other, matrices transposed: of a LoRA A^T [in, rank], then B^T
    [rank, out]: as factors of a product these need no transposition. As a cell it takes a Tensor of the dtype that is
    computed in, and gives the part of each block in that dtype, or in float32 for an adapter that keeps it;
    `BlockTensors` takes that apart. The gradients come back as one Tensor. (All tensors at once would be hundreds:
    MindSpore 2.10 cannot compile that many results of one operator.)

    Args:
        blocks: for every block its layers that have an adapter, the same everywhere.

    Attributes:
        flat: float32 [all of them]; its name is ``lora``, whatever the adapter.
    """

    def __init__(self, blocks: Sequence[Sequence[AdaptedLinear]]):
        super().__init__(auto_prefix=False)
        layers = [layer for block in blocks for layer in block]
        self.flat = Parameter(Tensor(np.concatenate([array.T.reshape(-1) for layer in layers
                                                     for array in layer.tensors().values()])), name="lora")
        self.sizes = tuple(sum(layer.size for layer in block) for block in blocks if block)
        self.has_tensors, self.is_split = tuple(bool(block) for block in blocks), len(self.sizes) > 1
        self.keeps_float32 = layers[0].keeps_float32
        self.__dict__["layers"] = layers  # not an attribute: they are cells of the network
        self._begin: dict[int, int] = {}
        end = 0
        for layer in layers:
            self._begin[id(layer)], end = end, end + layer.size
            layer.__dict__["_flat"] = self
            for part in layer.parts:
                delattr(layer, attribute(part))

    def construct(self, like):
        flat = self.flat.astype(ms.float32 if self.keeps_float32 else like.dtype)
        parts = _split(flat, self.sizes) if self.is_split else (flat,)  # MindSpore 2.10 loses the tuple of one part
        found, taken = (), 0
        for k in range(len(self.has_tensors)):
            if self.has_tensors[k]:
                found += (parts[taken],)
                taken += 1
            else:
                found += (parts[0],)  # not read; a constant or an empty tuple among arguments confuses MindSpore 2.10
        return found

    def tensors(self, layer: AdaptedLinear) -> dict[str, np.ndarray]:
        """Part -> tensor of one layer, on the host."""
        return self._tensors(layer, to_numpy(self.flat))

    def matrices(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of all layers by the names they have in files, from an array laid out as the Parameter is."""
        return {f"{layer.module}.{part}": array for layer in self.layers
                for part, array in self._tensors(layer, flat).items()}

    def _tensors(self, layer: AdaptedLinear, flat: np.ndarray) -> dict[str, np.ndarray]:
        begin, found = self._begin[id(layer)], {}
        for part, shape in zip(layer.parts, layer.shapes):
            end = begin + int(np.prod(shape))
            found[part] = np.array(flat[begin:end].reshape(shape[::-1]).T, order="C")
            begin = end
        return found

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Put tensors, by the names they have in files, into the Parameter, in place."""
        flat = to_numpy(self.flat)
        for layer in self.layers:
            arrays = [tensors[f"{layer.module}.{part}"].astype(np.float32).T.reshape(-1) for part in layer.parts]
            begin = self._begin[id(layer)]
            flat[begin:begin + layer.size] = np.concatenate(arrays)
        ops.assign(self.flat, Tensor(flat))


class BlockTensors(nn.Cell):
    """The tensors of a block's layers, one after the other and transposed, from its part of `FlatTensors`."""

    def __init__(self, layers: Sequence[AdaptedLinear]):
        super().__init__(auto_prefix=False)
        self.shapes = tuple(shape[::-1] for layer in layers for shape in layer.shapes)
        self.sizes = tuple(int(np.prod(shape)) for shape in self.shapes)

    def construct(self, flat):
        parts, tensors = _split(flat, self.sizes), ()
        for k in range(len(self.shapes)):
            tensors += (parts[k].reshape(self.shapes[k]),)
        return tensors


class NoTensors(nn.Cell):
    """The same of a block without adapter, whatever Tensor it is given."""

    def construct(self, flat):
        return ()
