"""Networks whose equal blocks are one cell: which cell computes a block, and with which weights.

A step of FLUX.1 at full depth that recomputes is compiled in 77 s of processor time and 2.75 GiB; with a cell for every
block and MindSpore's own recompute it was 108 s and 3.8 GiB (docs/compiled_step.md has the table).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from ms_diffsynth.nn.functional import Layer
from ms_diffsynth.nn.recompute import Kept, Offloaded, Recomputed

# layers of a block, and what it computes beside them -> the cell that computes it
Build = Callable[[list[nn.Cell]], nn.Cell]


@dataclass(frozen=True)
class Kind:
    """Blocks of one list: ``layers(block)`` in the order in which ``build`` takes them; ``build`` adds the rest."""

    list_name: str
    layers: Callable[[nn.Cell], list[Layer]]
    build: Build


class Arranged:
    """For a cell whose class has ``kinds``: name -> Kind. A construct reads, for each name,

    - ``self.<name>_cells``: one cell per different block: ``cell(activations, weights)``, see `nn.recompute.Kept`;
    - ``self.<name>_cell_of``: for each block the index of its cell;
    - ``self.<name>_weights``: for each block its weights.

    They are worked out when they are read, from the layers that the blocks have then: a LoRA, storage in 8 bits and
    recompute (``is_recomputed``, ``is_offloaded`` of a block) may come in any order before the first step.
    """

    def kinds(self) -> dict[str, Kind]:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        for what in ("_cells", "_cell_of", "_weights"):
            if name.endswith(what) and name.removesuffix(what) in self.kinds():
                return self._arrange(name.removesuffix(what))[what]
        return super().__getattr__(name)

    def _arrange(self, name: str) -> dict[str, Any]:
        kind = self.kinds()[name]
        known = self.__dict__.setdefault("_known_blocks", {})  # not an attribute: a cell would take it for its own
        blocks = [(block, kind.layers(block)) for block in getattr(self, kind.list_name)]
        signatures = [(name, getattr(block, "is_recomputed", False), getattr(block, "is_offloaded", False),
                       *(layer.kind for layer in layers)) for block, layers in blocks]
        for signature, (_, layers) in zip(signatures, blocks):
            if signature not in known:
                cell = kind.build([layer.function for layer in layers])
                known[signature] = (Offloaded if signature[2] else Recomputed if signature[1] else Kept)(cell)
        different = list(dict.fromkeys(signatures))
        return {"_cells": nn.CellList([known[s] for s in different], auto_prefix=False) if different else (),
                "_cell_of": tuple(different.index(s) for s in signatures),
                "_weights": tuple(tuple(layer.weights for layer in layers) for _, layers in blocks)}


def at(block: nn.Cell, names: Sequence[str]) -> list[nn.Cell]:
    """The cells of ``block`` at dotted names."""
    found = []
    for name in names:
        cell = block
        for part in name.split("."):
            cell = cell._cells[part]
        found.append(cell)
    return found
