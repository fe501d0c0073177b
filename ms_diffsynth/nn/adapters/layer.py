"""A linear layer with an adapter, and which layers of a network can have one."""
from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn

from ms_diffsynth.errors import ConfigError, listing, nearest
from ms_diffsynth.nn.names import to_numpy

if TYPE_CHECKING:
    from ms_diffsynth.nn.adapters.flat import FlatTensors
    from ms_diffsynth.nn.functional import Layer

_LINEAR = (mint.nn.Linear, nn.Dense)


class AdaptedLinear(nn.Cell):
    """A frozen linear layer with the trained tensors of an adapter, float32 whatever the weight is stored in.

    A subclass says what they compute, twice: ``construct`` [..., in] -> [..., out] for a layer that stands anywhere,
    and `function` for a layer of blocks that take their weights as arguments (`nn.blocks`). There the tensors lie in
    the network's `FlatTensors`, and this cell has none.

    Args:
        tensors: part -> its first value; a part is the end of a name in files, such as ``lora_A.weight``. The tensor is
            then the attribute of that name up to the dot.
        scale: alpha / rank. name: of the module, in front of the names of the Parameters.
    """

    keeps_float32 = False  # whether blocks get the tensors as they are, not in the dtype that is computed in

    def __init__(self, base: nn.Cell, tensors: Mapping[str, np.ndarray], scale: float, name: str):
        super().__init__(auto_prefix=False)  # the base keeps its parameter names
        self.base = base
        self.module, self.scale = name, scale
        self.parts, self.shapes = tuple(tensors), tuple(array.shape for array in tensors.values())
        for part, array in tensors.items():
            setattr(self, attribute(part), Parameter(Tensor(array, ms.float32), name=f"{name}.{part}"))

    @property
    def weight(self) -> Parameter:
        """That of the base: T5 looks at the dtype of its layer's."""
        return self.base.weight

    @property
    def flat(self) -> FlatTensors | None:
        """Where the tensors are, when they are not Parameters of this cell."""
        return self.__dict__.get("_flat")  # not an attribute: the cell would take it for its own

    @property
    def size(self) -> int:
        """Elements of all tensors."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def own_parameters(self) -> list[Parameter]:
        """The tensors, when they are Parameters of this cell."""
        return [getattr(self, attribute(part)) for part in self.parts]

    def tensors(self) -> dict[str, np.ndarray]:
        """Part -> its value on the host."""
        if self.flat is not None:
            return self.flat.tensors(self)
        return {part: to_numpy(p) for part, p in zip(self.parts, self.own_parameters())}

    def weight_changed(self) -> None:
        """Called when the weight of the base was put into another form, such as 8 bits, or has other values."""

    # -- in blocks ---------------------------------------------------------------------------------------------------

    def kind(self, base: Hashable) -> Hashable:
        """What two layers that compute the same by the same cell agree in; ``base`` is that of the layer below."""
        return (type(self).__name__, base, self.scale, self.shapes)

    @property
    def frozen(self) -> tuple[Parameter, ...]:
        """Parameters that `function` gets behind the weights of the base."""
        return ()

    def function(self, base: Layer, place: int) -> nn.Cell:
        """The cell ``function(x, weights, tensors)`` that computes this layer in a block.

        ``weights`` are those of ``base`` and `frozen`; ``tensors`` those of all layers of the block, where the parts of
        this one begin at ``place``, transposed: A^T [in, r], B^T [r, out].
        """
        raise TypeError(f"{type(self).__name__} has no function(self, base, place): implement it.")


def attribute(part: str) -> str:
    """``lora_A`` of ``lora_A.weight``."""
    return part.partition(".")[0]


def adapted_layers(model: nn.Cell) -> dict[str, AdaptedLinear]:
    """Name -> cell of every layer of ``model`` that has an adapter."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, AdaptedLinear)}


def linear_modules(model: nn.Cell) -> dict[str, nn.Cell]:
    """Name -> cell of every linear layer that can have an adapter, those that have one excepted."""
    inside = {f"{name}.base" for name in adapted_layers(model)}
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, _LINEAR) and name not in inside}


def bare_layers(model: nn.Cell) -> dict[str, nn.Cell]:
    """Name -> cell of every linear layer, without the adapter that it may have."""
    return linear_modules(model) | {name: cell.base for name, cell in adapted_layers(model).items()}


def selected(target: str, names: Iterable[str]) -> list[str]:
    """Of ``names`` those that are ``target``, or end with it after a dot: peft's rule."""
    return [name for name in names if name == target or name.endswith("." + target)]


def match_targets(model: nn.Cell, targets: Iterable[str]) -> list[str]:
    """Names of the linear layers that ``targets`` select: a full name, or its end after a dot (peft's rule).

    Raises: ConfigError listing every target that selects nothing, and the names that exist.
    """
    names = list(linear_modules(model))
    targets = [t.strip() for t in targets if t.strip()]
    chosen = {t: selected(t, names) for t in targets}
    lost = [t for t in targets if not chosen[t]]
    if lost or not targets:
        ends = sorted({re.sub(r"^.*?\.\d+\.", "", n, count=1) for n in names})  # the name inside its block
        near = nearest(lost[0], ends + [n.split(".")[-1] for n in names]) if lost else ""
        raise ConfigError(
            f"lora_target_modules: {listing(map(repr, lost)) or 'nothing given'} selects none of the linear layers of "
            f"{type(model).__name__}.{near} Expected names, or ends of names, of its linear layers: "
            f"{listing(ends, 30)}.")
    found = {n for own in chosen.values() for n in own}
    return [n for n in names if n in found]


def put(model: nn.Cell, name: str, cell: nn.Cell) -> None:
    """Put ``cell`` where the module ``name`` is, without renaming a parameter."""
    *path, last = name.split(".")
    parent = model
    for part in path:
        parent = parent._cells[part]
    parent._cells[last] = cell
    if hasattr(parent, "cell_list"):  # nn.SequentialCell runs a list of its own
        parent.cell_list = list(parent._cells.values())
