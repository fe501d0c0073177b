"""Reference cases of text encoders: hidden states, what the network gets of them, and every gradient.

The family's unit ``encode_prompt`` computes from the case's ids; its models lie in the case by their folders.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ms_diffsynth import runtime
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.debug.compare import Quantity, relative_error, tolerances, worst
from ms_diffsynth.debug.gradients import Gradients
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.models import Source
from ms_diffsynth.nn.names import to_numpy, trainable_parameters
from ms_diffsynth.registry import family
from ms_diffsynth.units import TensorUnit


class Probed(nn.Cell):
    """The unit on (ids of each encoder, a cotangent for each output): the mean of each output times its cotangent,
    added up, and the outputs."""

    def __init__(self, unit: TensorUnit):
        super().__init__(auto_prefix=False)
        self.unit, self.encoders = unit, len(unit.input_params)

    def construct(self, inputs):
        outputs = self.unit(*inputs[:self.encoders])
        loss = 0.0
        for k in range(len(outputs)):
            loss = loss + (outputs[k] * inputs[self.encoders + k]).mean()
        return (loss, *outputs)


def check_texts(folder: Path, info: dict[str, Any], mode: str, dtype: str) -> list[Quantity]:
    """Run a case of objective ``text_encoders`` and return every compared quantity."""
    inputs, expected = (load_state_dict(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    allowed = tolerances(dtype, runtime.current().device)
    pipe = family(info["family"]).pipeline(dtype=runtime.DTYPES[dtype])
    unit = next(unit for unit in pipe.units if unit.name == "encode_prompt")
    folders = {name: pipe.store.component(name).folder for name in unit.onload_model_names}
    pipe.sources.update({name: Source(folder / own) for name, own in folders.items()})
    unit.attach(pipe)
    parameters = {f"{own}.{key}": p for name, own in folders.items()
                  for key, p in trainable_parameters(getattr(pipe, name)).items()}
    for parameter in parameters.values():
        parameter.requires_grad = True
    suffixes = ("", *(f"_{k + 1}" for k in range(1, len(folders))))
    ids = [Tensor(inputs[f"input_ids{suffix}"].astype(np.int32)) for suffix in suffixes]
    cotangents = [Tensor(inputs[f"cotangent.{name}"]) for name in ("prompt_embeds", "pooled")]
    step = CompiledStep(Gradients(Probed(unit), list(parameters.values())).run, "the gradients", mode)
    values = [to_numpy(v).astype(np.float32) for v in step(*ids, *cotangents)]
    quantities = []
    for name, own_ids, suffix in zip(folders, ids, suffixes):
        layers = getattr(pipe, name)(own_ids, output_hidden_states=True, return_dict=False)[2]
        errors = [relative_error(to_numpy(layer.astype(ms.float32)), expected[f"hidden_states{suffix}.{k}"])
                  for k, layer in enumerate(layers)]
        quantities.append(Quantity(f"hidden states of {name}", max(errors), allowed.value, f"of {len(errors)}"))
    count = 1 + len(unit.output_params)
    for name, value in zip(unit.output_params, values[1:count]):
        quantities.append(Quantity(name.replace("_", " "), relative_error(value, expected[name]), allowed.value))
    # a sum of both signs: as far off as what is summed
    quantities.append(Quantity("loss", relative_error(values[0], expected["loss"]), allowed.value))
    pairs = {name: (value.reshape(expected[f"grad.{name}"].shape), expected[f"grad.{name}"])
             for name, value in zip(parameters, values[count:])}
    return [*quantities, worst("gradients", pairs, allowed.gradient)]
