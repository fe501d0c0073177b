"""Networks whose equal blocks are one cell: which cell computes a block, and with which weights.

A step of FLUX.1 at full depth that recomputes is compiled in 48 s of processor time and 1.9 GiB; with a cell for every
block and MindSpore's own recompute it was 108 s and 3.8 GiB (benchmarks/README.md has the table).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import Parameter, nn

from ms_diffsynth.nn.adapters.flat import FlatTensors
from ms_diffsynth.nn.adapters.layer import AdaptedLinear
from ms_diffsynth.nn.functional import functions, layer_of
from ms_diffsynth.nn.recompute import Kept, Offloaded, Recomputed


@dataclass(frozen=True)
class Kind:
    """The blocks of one list: ``names`` of their layers and Parameters, dotted, in the order in which ``build`` takes
    their functions, after the block itself, to make the cell of a block. Blocks with equal layers, of one class and
    with one ``variant`` (an attribute, if they have it: what the cell depends on besides) are equal.
    ``twin_of``: the kind whose blocks these are too, computed in another way; the adapters are that kind's."""

    list_name: str
    names: Sequence[str]
    build: Callable[[nn.Cell, list[nn.Cell]], nn.Cell]
    twin_of: str = ""


class Arranged:
    """For a cell whose class has ``kinds``: name -> Kind. A construct reads, for each name,

    - ``self.<name>_cells``: one cell per different block: ``cell(activations, weights, lora)``, see
      `nn.recompute.Kept`;
    - ``self.<name>_cell_of``: for each block the index of its cell;
    - ``self.<name>_weights``: for each block its weights;
    - ``self.<name>_lora``: for each block its place in what ``self.lora`` gives, a `FlatTensors` which is there
      when ``self.has_lora``, or else in ``self.no_lora``. The name is ``lora`` whatever the adapter.

    They are worked out when they are read, from the layers that the blocks have then: an adapter, storage in 8 bits and
    recompute (``is_recomputed``, ``is_offloaded`` of a block) may come in any order before the first step.
    """

    def kinds(self) -> dict[str, Kind]:
        raise TypeError(f"{type(self).__name__} has no kinds(self): implement it; return name -> Kind.")

    def __getattr__(self, name: str) -> Any:
        for what in ("_cells", "_cell_of", "_weights", "_lora"):
            if name.endswith(what) and name.removesuffix(what) in self.kinds():
                return self._arrange(name.removesuffix(what))[what]
        if name == "no_lora":
            placeholder = min(self.get_parameters(), key=lambda parameter: parameter.size)  # see `FlatTensors`
            return (placeholder,) * sum(map(len, self._lora_layers().values()))
        if name == "has_lora":
            return "lora" in self.__dict__["_cells"]
        return super().__getattr__(name)

    def _arrange(self, name: str) -> dict[str, Any]:
        kind = self.kinds()[name]
        known = self.__dict__.setdefault("_known_blocks", {})  # not an attribute: a cell would take it for its own
        blocks = [(block, [layer_of(cell) for cell in at(block, kind.names)])
                  for block in getattr(self, kind.list_name)]
        signatures = [(name, (type(block), getattr(block, "variant", None)), getattr(block, "is_recomputed", False),
                       getattr(block, "is_offloaded", False), *(layer.kind for layer in layers))
                      for block, layers in blocks]
        for signature, (block, layers) in zip(signatures, blocks):
            if signature not in known:
                cell = kind.build(block, functions(layers))
                known[signature] = (Offloaded if signature[3] else Recomputed if signature[2] else Kept)(cell)
        different = list(dict.fromkeys(signatures))
        return {"_cells": nn.CellList([known[s] for s in different], auto_prefix=False) if different else (),
                "_cell_of": tuple(different.index(s) for s in signatures),
                "_weights": tuple(tuple(layer.weights for layer in layers) for _, layers in blocks),
                "_lora": self._lora_places(name)}

    def take_lora(self) -> None:
        """Put the adapters of all blocks into one Parameter. Called when they were put on the layers."""
        blocks = [layers for blocks in self._lora_layers().values() for layers in blocks]
        if any(blocks):
            self.insert_child_to_cell("lora", FlatTensors(blocks))

    def _lora_layers(self) -> dict[str, list[list[AdaptedLinear]]]:
        """Of each kind, for each block, the layers that have an adapter, in the order of its layers."""
        return {name: [[cell for cell in at(block, kind.names) if isinstance(cell, AdaptedLinear)]
                       for block in getattr(self, kind.list_name)] for name, kind in self.kinds().items()
                if not kind.twin_of}

    def _lora_places(self, name: str) -> tuple[int, ...]:
        begin, name = 0, self.kinds()[name].twin_of or name
        for kind, blocks in self._lora_layers().items():
            if kind == name:
                return tuple(range(begin, begin + len(blocks)))
            begin += len(blocks)
        return ()


def by_head(x, heads):
    """[B, S, D] -> [B, S, H, D / H]; for compiled code."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1)


def held(**cells: nn.Cell) -> nn.Cell:
    """A cell that only holds others, by names that may be numbers: what is read as ``held["0"]`` in PyTorch."""
    holder = nn.Cell()
    for name, cell in cells.items():
        holder.insert_child_to_cell(name, cell)
    return holder


def at(block: nn.Cell, names: Sequence[str]) -> list[nn.Cell | Parameter]:
    """What ``block`` has at dotted names: cells, or Parameters of its own."""
    found = []
    for name in names:
        cell = block
        for part in name.split("."):
            cell = cell._cells[part] if part in cell._cells else cell._params[part]
        found.append(cell)
    return found
