"""LoRAs as pairs: what tests of networks, steps and files say in terms of the adapter's contract."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from mindspore import Parameter, nn

from ms_diffsynth.formats.adapters import LORA
from ms_diffsynth.formats.lora import AdapterFile
from ms_diffsynth.nn.adapters.contract import Uniform
from ms_diffsynth.nn.adapters.layer import AdaptedLinear, adapted_layers
from ms_diffsynth.nn.adapters.linear import fuse
from ms_diffsynth.nn.adapters.lora import LoRA

Pair = tuple[np.ndarray, np.ndarray]


def inject_lora(model: nn.Cell, targets: Iterable[str], rank: int, alpha: float | None = None,
                uniform: Uniform | None = None) -> dict[str, AdaptedLinear]:
    return LoRA().inject(model, targets, rank, alpha, uniform)


def lora_parameters(model: nn.Cell) -> list[Parameter]:
    return LoRA().parameters(model)


def lora_pairs(model: nn.Cell) -> dict[str, Pair]:
    """Module -> (A [rank, in], B [out, rank])."""
    return {name: tuple(cell.tensors().values()) for name, cell in adapted_layers(model).items()}


def set_lora(model: nn.Cell, pairs: Mapping[str, Pair]) -> None:
    LoRA().load(model, {f"{name}.{part}": array for name, pair in pairs.items()
                        for part, array in zip(LoRA.format.parts, pair)})


def fuse_lora(model: nn.Cell, pairs: Mapping[str, Pair], scale: float = 1.0) -> None:
    modules = {name: dict(zip(LORA.parts, pair)) for name, pair in pairs.items()}
    fuse(AdapterFile(modules, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, LORA)), model, scale)
