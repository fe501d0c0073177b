"""Adapters that are a few tensors beside each linear layer: all of the contract but what the tensors mean."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_diffsynth.errors import ConfigError, WeightError, listing
from ms_diffsynth.formats.adapters import Format, label
from ms_diffsynth.formats.lora import AdapterFile
from ms_diffsynth.nn.adapters.contract import Adapter, Uniform
from ms_diffsynth.nn.adapters.flat import FlatTensors
from ms_diffsynth.nn.adapters.layer import (
    AdaptedLinear,
    adapted_layers,
    bare_layers,
    linear_modules,
    match_targets,
    put,
)
from ms_diffsynth.nn.names import to_numpy


class LinearAdapter(Adapter):
    """An adapter is made of this by `name`, `format` and `layer`: see `contract.Adapter`."""

    name: str
    format: Format

    def layer(self, base: nn.Cell, name: str, rank: int, scale: float, uniform: Uniform) -> AdaptedLinear:
        """The cell for the linear layer ``base`` at ``name``. Raises: ConfigError for one the adapter does not fit."""
        raise TypeError(f"{type(self).__name__} has no layer(self, base, name, rank, scale, uniform): implement it.")

    def size(self, outs: int, ins: int, rank: int) -> int:
        """Elements of the tensors beside a linear layer [outs, ins]."""
        return rank * (outs + ins)

    def inject(self, network: nn.Cell, targets: Iterable[str], rank: int, alpha: float | None = None,
               uniform: Uniform | None = None) -> dict[str, AdaptedLinear]:
        if rank < 1:
            raise ConfigError(f"lora_rank={rank}: expected at least 1. Typical ranks are 4 to 64.")
        generator = np.random.default_rng(0)
        uniform = uniform or (lambda _, shape: generator.random(shape))
        names = match_targets(network, targets)
        for parameter in network.get_parameters():
            parameter.requires_grad = False
        modules = linear_modules(network)
        injected = {}
        for name in names:
            injected[name] = self.layer(modules[name], name, rank, float(alpha or rank) / rank, uniform)
            put(network, name, injected[name])
        if hasattr(network, "take_lora"):
            network.take_lora()
        return injected

    def parameters(self, network: nn.Cell) -> list[Parameter]:
        """One Parameter for all in the network's blocks, then the tensors of any other layer."""
        flat = [cell.flat for _, cell in network.cells_and_names() if isinstance(cell, FlatTensors)]
        return flat + [p for cell in adapted_layers(network).values() if cell.flat is None
                       for p in cell.own_parameters()]

    def tensors(self, network: nn.Cell) -> dict[str, np.ndarray]:
        return {f"{name}.{part}": array for name, cell in adapted_layers(network).items()
                for part, array in cell.tensors().items()}

    def load(self, network: nn.Cell, tensors: Mapping[str, np.ndarray]) -> None:
        cells = adapted_layers(network)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, array in tensors.items():
            module, part = self._split(name)
            shapes.setdefault(module, {})[part] = array.shape
        wrong = [f"{name}: not in the file" for name in cells if name not in shapes]
        wrong += [f"{name}: no {self.format.name} there" for name in shapes if name not in cells]
        wrong += [f"{name}: {_said(found)}, expected {_said(expected)}" for name, found in shapes.items()
                  if name in cells and found != (expected := dict(zip(cells[name].parts, cells[name].shapes)))]
        if wrong:
            raise WeightError(f"these {self.format.name} weights do not fit the model: {listing(wrong)}. Expected the "
                              "same lora_target_modules and lora_rank as when they were saved.")
        for name, cell in cells.items():
            if cell.flat is None:
                for part, parameter in zip(cell.parts, cell.own_parameters()):
                    # assigned, not set_data: a compiled step would keep reading the old memory (MindSpore 2.10)
                    ops.assign(parameter, Tensor(tensors[f"{name}.{part}"].astype(np.float32)))
        for flat in {id(cell.flat): cell.flat for cell in cells.values() if cell.flat is not None}.values():
            flat.write(tensors)

    def _split(self, name: str) -> tuple[str, str]:
        """Module and part of a tensor."""
        part = next((part for part in self.format.parts if name.endswith(f".{part}")), "")
        return name.removesuffix(f".{part}"), part


def _said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{label(part)} {shape}" for part, shape in shapes.items())


def fuse(file: AdapterFile, model: nn.Cell, scale: float = 1.0) -> None:
    """Put the change of an adapter, ``scale`` times, into the weights: computed in float32 and rounded once.

    Raises: WeightError for a module that the model does not have, a shape that does not fit, or weights in 8 bits.
    """
    layers, adapted = bare_layers(model), adapted_layers(model)
    stored = [n for n in file.modules if n in layers and hasattr(layers[n], "weight_scale")]
    if stored:
        raise WeightError(f"a {file.name} cannot be added to weights that are stored in 8 bits: {listing(stored)}. "
                          f"Load the {file.name} first, then store the model in 8 bits (fp8_models).")
    wrong = [n for n, parts in file.modules.items()
             if n not in layers or not file.formats[n].fits(parts, tuple(layers[n].weight.shape))]
    wrong += [f"{n} (bias)" for n, bias in file.biases.items() if n not in layers
              or getattr(layers[n], "bias", None) is None or layers[n].bias.shape != bias.shape]
    if wrong or not (file.modules or file.biases):
        raise WeightError(f"{len(wrong)} of {len(file.modules)} {file.name} modules do not fit {type(model).__name__}: "
                          f"{listing(wrong)}. Expected a {file.name} trained on this architecture.")
    for name, parts in file.with_scale().items():
        weight = layers[name].weight
        fused = file.formats[name].fused(to_numpy(weight).astype(np.float32), parts, scale)
        ops.assign(weight, Tensor(fused, weight.dtype))
        if name in adapted:
            adapted[name].weight_changed()
    for name, change in file.biases.items():
        bias = layers[name].bias
        changed = to_numpy(bias).astype(np.float32) + np.float32(scale) * change.astype(np.float32)
        ops.assign(bias, Tensor(changed, bias.dtype))
