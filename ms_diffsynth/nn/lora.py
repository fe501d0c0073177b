"""Low-rank adaptation: y = W x + (alpha / rank) B A x, with A and B in float32 whatever W is stored in.

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; initialisation of peft 0.15 (A uniform in +-1/sqrt(in), B zero).
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from ms_diffsynth.errors import ConfigError, WeightError, listing, nearest
from ms_diffsynth.nn.names import to_numpy

_LINEAR = (mint.nn.Linear, nn.Dense)

# (module name, shape) -> numbers uniform in [0, 1)
Uniform = Callable[[str, tuple[int, ...]], np.ndarray]


class LoRALinear(nn.Cell):
    """A frozen linear layer with a trained low-rank correction.

    Shapes: lora_A float32 [rank, in], lora_B float32 [out, rank]; input [..., in] -> output [..., out] in its dtype.
    """

    def __init__(self, base: nn.Cell, lora_A: np.ndarray, lora_B: np.ndarray, alpha: float, name: str):
        super().__init__(auto_prefix=False)  # the base keeps its parameter names
        self.base = base
        self.lora_A = Parameter(Tensor(lora_A, ms.float32), name=f"{name}.lora_A.weight")
        self.lora_B = Parameter(Tensor(lora_B, ms.float32), name=f"{name}.lora_B.weight")
        self.scale = alpha / lora_A.shape[0]

    def construct(self, x):
        low = mint.nn.functional.linear(x, self.lora_A.astype(x.dtype))
        return self.base(x) + mint.nn.functional.linear(low, self.lora_B.astype(x.dtype)) * self.scale


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
    return injected


def lora_parameters(model: nn.Cell) -> list[Parameter]:
    """A and B of every LoRA in ``model``, in the model's order."""
    return [p for cell in lora_modules(model).values() for p in (cell.lora_A, cell.lora_B)]


def lora_pairs(model: nn.Cell) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module name -> (A float32 [rank, in], B float32 [out, rank]) on the host, the scale not folded in."""
    return {name: (to_numpy(cell.lora_A), to_numpy(cell.lora_B)) for name, cell in lora_modules(model).items()}


def set_lora(model: nn.Cell, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Put A and B into the LoRAs of ``model``.

    Raises: WeightError when modules or shapes differ, listing the first ten.
    """
    cells = lora_modules(model)
    wrong = [f"{n}: not in the file" for n in cells if n not in pairs]
    wrong += [f"{n}: no LoRA there" for n in pairs if n not in cells]
    wrong += [f"{n}: A {a.shape}, B {b.shape}, expected A {cells[n].lora_A.shape}, B {cells[n].lora_B.shape}"
              for n, (a, b) in pairs.items() if n in cells
              and (a.shape, b.shape) != (cells[n].lora_A.shape, cells[n].lora_B.shape)]
    if wrong:
        raise WeightError(f"these LoRA weights do not fit the model: {listing(wrong)}. Expected the same "
                          "lora_target_modules and lora_rank as when they were saved.")
    for name, (a, b) in pairs.items():
        # assigned, not set_data: a compiled step would go on reading the old memory (MindSpore 2.10)
        ops.assign(cells[name].lora_A, Tensor(a, ms.float32))
        ops.assign(cells[name].lora_B, Tensor(b, ms.float32))


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
