"""Low-rank adaptation: y = W x + (alpha / rank) B A x, with A and B in float32 whatever W is stored in.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; initialisation of peft 0.15 (A uniform in +-1/sqrt(in), B zero).
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.ops.auto_generate import SplitWithSize

from ms_diffsynth.errors import ConfigError, WeightError, listing, nearest
from ms_diffsynth.nn.names import to_numpy

_LINEAR = (mint.nn.Linear, nn.Dense)
_split = SplitWithSize()

# (module name, shape) -> numbers uniform in [0, 1)
Uniform = Callable[[str, tuple[int, ...]], np.ndarray]


class LoRALinear(nn.Cell):
    """A frozen linear layer with a trained low-rank correction.

    Shapes: lora_A float32 [rank, in], lora_B float32 [out, rank]; input [..., in] -> output [..., out] in its dtype.
    In a network of blocks that take their weights as arguments (`nn.blocks`) A and B lie in its `FlatLoRA` instead.
    """

    def __init__(self, base: nn.Cell, lora_A: np.ndarray, lora_B: np.ndarray, alpha: float, name: str):
        super().__init__(auto_prefix=False)  # the base keeps its parameter names
        self.base = base
        self.lora_A = Parameter(Tensor(lora_A, ms.float32), name=f"{name}.lora_A.weight")
        self.lora_B = Parameter(Tensor(lora_B, ms.float32), name=f"{name}.lora_B.weight")
        self.module, self.rank, self.scale = name, lora_A.shape[0], alpha / lora_A.shape[0]

    def construct(self, x):
        low = mint.nn.functional.linear(x, self.lora_A.astype(x.dtype))
        return self.base(x) + mint.nn.functional.linear(low, self.lora_B.astype(x.dtype)) * self.scale

    @property
    def flat(self) -> FlatLoRA | None:
        """Where A and B lie, when they are not Parameters of this cell."""
        return self.__dict__.get("_flat")  # not an attribute: the cell would take it for its own

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """A float32 [rank, in] and B float32 [out, rank], on the host."""
        return (to_numpy(self.lora_A), to_numpy(self.lora_B)) if self.flat is None else self.flat.pair(self)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and of B."""
        outs, ins = self.base.weight.shape
        return (self.rank, ins), (outs, self.rank)

    @property
    def size(self) -> int:
        """Elements of both."""
        return sum(a * b for a, b in self.shapes)


class FlatLoRA(nn.Cell):
    """The LoRA matrices of a network's blocks in one Parameter: one gradient, one norm, one update.

    Of each layer it holds A^T [in, rank], then B^T [rank, out]: as factors of a product these need no transposition.
    As a cell it takes a Tensor of the dtype that is computed in, and gives the part of each block in that dtype, which
    `LoRAMatrices` takes apart. The gradients come back as one Tensor. (All matrices at once would be hundreds:
    MindSpore 2.10 cannot compile that many results of one operator.)

    Args:
        blocks: for every block its layers that have a LoRA.

    Attributes:
        flat: float32 [all of them].
    """

    def __init__(self, blocks: Sequence[Sequence[LoRALinear]]):
        super().__init__(auto_prefix=False)
        layers = [layer for block in blocks for layer in block]
        self.flat = Parameter(Tensor(np.concatenate([matrix.T.reshape(-1) for layer in layers
                                                     for matrix in layer.pair()])), name="lora")
        self.sizes = tuple(sum(layer.size for layer in block) for block in blocks if block)
        self.has_lora, self.is_split = tuple(bool(block) for block in blocks), len(self.sizes) > 1
        self.__dict__["layers"] = layers  # not an attribute: they are cells of the network
        self._begin: dict[int, int] = {}
        end = 0
        for layer in layers:
            self._begin[id(layer)], end = end, end + layer.size
            layer.__dict__["_flat"] = self
            del layer.lora_A, layer.lora_B

    def construct(self, like):
        flat = self.flat.astype(like.dtype)
        parts = _split(flat, self.sizes, 0) if self.is_split else (flat,)  # MindSpore 2.10 loses the tuple of one part
        found, taken = (), 0
        for k in range(len(self.has_lora)):
            if self.has_lora[k]:
                found += (parts[taken],)
                taken += 1
            else:
                found += (parts[0],)  # not read; a constant or an empty tuple among arguments confuses MindSpore 2.10
        return found

    def pair(self, layer: LoRALinear) -> tuple[np.ndarray, np.ndarray]:
        """A and B of one layer, on the host."""
        return self._pair(layer, to_numpy(self.flat))

    def matrices(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The matrices of all layers by the names they have in files, from an array laid out as the Parameter is."""
        found = {}
        for layer in self.layers:
            a, b = self._pair(layer, flat)
            found |= {f"{layer.module}.lora_A.weight": a, f"{layer.module}.lora_B.weight": b}
        return found

    def _pair(self, layer: LoRALinear, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin = self._begin[id(layer)]
        (rank, ins), (outs, _) = layer.shapes
        a, b = np.split(flat[begin:begin + layer.size], [rank * ins])
        return np.ascontiguousarray(a.reshape(ins, rank).T), np.ascontiguousarray(b.reshape(rank, outs).T)

    def write(self, pairs: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> None:
        """Put A and B of layers, by their ``id``, into the Parameter, in place."""
        flat = to_numpy(self.flat)
        for key, pair in pairs.items():
            new = np.concatenate([matrix.astype(np.float32).T.reshape(-1) for matrix in pair])
            flat[self._begin[key]:self._begin[key] + len(new)] = new
        ops.assign(self.flat, Tensor(flat))


class LoRAMatrices(nn.Cell):
    """The matrices of a block's layers, A^T and B^T in turn, from its part of a `FlatLoRA`."""

    def __init__(self, layers: Sequence[LoRALinear]):
        super().__init__(auto_prefix=False)
        self.shapes = tuple(shape[::-1] for layer in layers for shape in layer.shapes)
        self.sizes = tuple(a * b for a, b in self.shapes)

    def construct(self, flat):
        parts, matrices = _split(flat, self.sizes, 0), ()
        for k in range(len(self.shapes)):
            matrices += (parts[k].reshape(self.shapes[k]),)
        return matrices


class NoMatrices(nn.Cell):
    """The same of a block without LoRA, whatever Tensor it is given."""

    def construct(self, flat):
        return ()


def linear_modules(model: nn.Cell) -> dict[str, nn.Cell]:
    """Name -> cell of every linear layer that can carry a LoRA, those inside a LoRA excepted."""
    inside = {f"{name}.base" for name, cell in model.cells_and_names() if isinstance(cell, LoRALinear)}
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, _LINEAR) and name not in inside}


def lora_modules(model: nn.Cell) -> dict[str, LoRALinear]:
    """Name -> cell of every LoRA in ``model``."""
    return {name: cell for name, cell in model.cells_and_names() if isinstance(cell, LoRALinear)}


def match_targets(model: nn.Cell, targets: Iterable[str]) -> list[str]:
    """Names of the linear layers that ``targets`` select: a full name, or its end after a dot (peft's rule).

    Raises: ConfigError listing every target that selects nothing, and the names that exist.
    """
    names = list(linear_modules(model))
    targets = [t.strip() for t in targets if t.strip()]
    chosen = {t: [n for n in names if n == t or n.endswith("." + t)] for t in targets}
    lost = [t for t in targets if not chosen[t]]
    if lost or not targets:
        ends = sorted({re.sub(r"^.*?\.\d+\.", "", n, count=1) for n in names})  # the name inside its block
        near = nearest(lost[0], ends + [n.split(".")[-1] for n in names]) if lost else ""
        raise ConfigError(f"lora_target_modules: {listing(map(repr, lost)) or 'nothing given'} selects no linear layer "
                          f"of {type(model).__name__}.{near} Expected names, or ends of names, of its linear layers: "
                          f"{listing(ends, 30)}.")
    selected = {n for found in chosen.values() for n in found}
    return [n for n in names if n in selected]


def inject_lora(model: nn.Cell, targets: Iterable[str], rank: int, alpha: float | None = None,
                uniform: Uniform | None = None) -> dict[str, LoRALinear]:
    """Freeze ``model`` and put a LoRA on the linear layers that ``targets`` select.

    Args:
        rank: of the correction. alpha: numerator of its scale; None means ``rank``.
        uniform: source of the initial A; None draws from NumPy's generator seeded with 0.

    Returns: module name -> its LoRA, in the model's order.
    """
    if rank < 1:
        raise ConfigError(f"lora_rank={rank}: expected at least 1. Typical ranks are 4 to 64.")
    generator = np.random.default_rng(0)
    uniform = uniform or (lambda _, shape: generator.random(shape))
    names = match_targets(model, targets)
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    modules = linear_modules(model)
    injected = {}
    for name in names:
        base = modules[name]
        outs, ins = base.weight.shape
        bound = 1 / np.sqrt(ins)
        lora_A = ((2 * uniform(name, (rank, ins)) - 1) * bound).astype(np.float32)
        injected[name] = LoRALinear(base, lora_A, np.zeros((outs, rank), np.float32), float(alpha or rank), name)
        _replace(model, name, injected[name])
    if hasattr(model, "take_lora"):
        model.take_lora()
    return injected


def lora_parameters(model: nn.Cell) -> list[Parameter]:
    """What holds the LoRAs of ``model``: one Parameter for all in its blocks, then A and B of any other."""
    flat = [cell.flat for _, cell in model.cells_and_names() if isinstance(cell, FlatLoRA)]
    return flat + [p for cell in lora_modules(model).values() if cell.flat is None for p in (cell.lora_A, cell.lora_B)]


def lora_pairs(model: nn.Cell) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module name -> (A float32 [rank, in], B float32 [out, rank]) on the host, the scale not folded in."""
    return {name: cell.pair() for name, cell in lora_modules(model).items()}


def set_lora(model: nn.Cell, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Put A and B into the LoRAs of ``model``.

    Raises: WeightError when modules or shapes differ, listing the first ten.
    """
    cells = lora_modules(model)
    wrong = [f"{n}: not in the file" for n in cells if n not in pairs]
    wrong += [f"{n}: no LoRA there" for n in pairs if n not in cells]
    wrong += [f"{n}: A {a.shape}, B {b.shape}, expected A {cells[n].shapes[0]}, B {cells[n].shapes[1]}"
              for n, (a, b) in pairs.items() if n in cells and (a.shape, b.shape) != cells[n].shapes]
    if wrong:
        raise WeightError(f"these LoRA weights do not fit the model: {listing(wrong)}. Expected the same "
                          "lora_target_modules and lora_rank as when they were saved.")
    for name, (a, b) in pairs.items():
        if cells[name].flat is None:
            # assigned, not set_data: a compiled step would go on reading the old memory (MindSpore 2.10)
            ops.assign(cells[name].lora_A, Tensor(a, ms.float32))
            ops.assign(cells[name].lora_B, Tensor(b, ms.float32))
    for flat in {id(cell.flat): cell.flat for cell in cells.values() if cell.flat is not None}.values():
        flat.write({id(cell): pairs[name] for name, cell in cells.items() if cell.flat is flat})


def fuse_lora(model: nn.Cell, pairs: dict[str, tuple[np.ndarray, np.ndarray]], scale: float = 1.0) -> None:
    """Add ``scale`` * B A to the weights, computed in float32 and rounded once.

    Raises: WeightError for a module that the model does not have, a shape that does not fit, or weights in 8 bits.
    """
    modules = linear_modules(model)
    stored = [n for n in pairs if n in modules and hasattr(modules[n], "weight_scale")]
    if stored:
        raise WeightError(f"a LoRA cannot be added to weights that are stored in 8 bits: {listing(stored)}. Load the "
                          "LoRA first, then store the model in 8 bits (fp8_models).")
    wrong = [n for n, (a, b) in pairs.items()
             if n not in modules or (b.shape[0], a.shape[1]) != tuple(modules[n].weight.shape)]
    if wrong or not pairs:
        raise WeightError(f"{len(wrong)} of {len(pairs)} LoRA modules do not fit {type(model).__name__}: "
                          f"{listing(wrong)}. Expected a LoRA trained on this architecture.")
    for name, (a, b) in pairs.items():
        weight = modules[name].weight
        fused = to_numpy(weight).astype(np.float32) + np.float32(scale) * (b.astype(np.float32) @ a.astype(np.float32))
        ops.assign(weight, Tensor(fused, weight.dtype))


def _replace(model: nn.Cell, name: str, cell: nn.Cell) -> None:
    """Put ``cell`` where the module ``name`` is, without renaming a parameter."""
    *path, last = name.split(".")
    parent = model
    for part in path:
        parent = parent._cells[part]
    parent._cells[last] = cell
    if hasattr(parent, "cell_list"):  # nn.SequentialCell runs a list of its own
        parent.cell_list = list(parent._cells.values())
