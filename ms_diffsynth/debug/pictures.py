"""Reference cases of a text encoder that sees pictures: its tokens, hidden states, loss and every gradient."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.debug.compare import Quantity, relative_error, tolerances, worst
from ms_diffsynth.debug.gradients import Gradients
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.models import Source
from ms_diffsynth.nn.names import to_numpy, trainable_parameters
from ms_diffsynth.registry import family

MODELS = ("vision_tower", "text_encoder")


class Encoders(nn.Cell):
    """The vision tower and the language model on the rows of a case, one after the other, and the case's loss.

    ``construct`` takes, as one tuple, the patches of each picture, then of each row ids [1, T], places [1, T, 4] and
    probe [1, T, W]. It returns the loss, hidden states of each row, and the tokens of each picture.

    Args:
        grids: (rows, columns) of each picture in patches.
        pictures: how many each row has.
    """

    def __init__(self, tower: nn.Cell, language_model: nn.Cell, grids: Sequence[tuple[int, int]],
                 pictures: Sequence[int]):
        super().__init__(auto_prefix=False)
        self.tower, self.language_model = tower, language_model
        self.grids, self.pictures = tuple(grids), tuple(pictures)

    def construct(self, inputs):
        embeds = ()
        for k in range(len(self.grids)):
            embeds += (self.tower(inputs[k], self.grids[k][0], self.grids[k][1]),)
        found, total, count, first = (), 0.0, 0, 0
        for row in range(len(self.pictures)):
            vision = ops.cat(embeds[first:first + self.pictures[row]], 0).expand_dims(0)
            ids, places, probe = inputs[len(embeds) + 3 * row:len(embeds) + 3 * row + 3]
            hidden = self.language_model(ids, vision, places).astype(ms.float32)
            found, total, count = (*found, hidden), total + (hidden * probe).sum(), count + hidden.size
            first += self.pictures[row]
        return (total / count, *found, *embeds)


def check_pictures(folder: Path, info: dict[str, Any], mode: str, dtype: str) -> list[Quantity]:
    """Run a case of objective ``text_encoder`` and return every compared quantity."""
    from ms_diffsynth.pipelines.qwen_image.vision import MERGE, patches_of  # imports mindone's networks

    inputs, expected = (load_state_dict(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    allowed = tolerances(dtype, runtime.current().device)
    pipe = family(info["family"]).pipeline(dtype=runtime.DTYPES[dtype])
    pipe.sources["text_encoder"] = Source(folder / "text_encoder")
    pipe.store.take_parts()
    image_token = pipe.config("text_encoder")["image_token_id"]
    grids = [tuple(grid[1:]) for grid in inputs["image_grid_thw"].tolist()]
    ends = np.cumsum([rows * columns for rows, columns in grids])
    patches = np.split(inputs["pixel_values"], ends[:-1])
    quantities, arrays, places, first = [], list(patches), [], 0
    if "images.0" in inputs:
        own = [patches_of(Image.fromarray(inputs[f"images.{k}"]))[0] for k in range(len(grids))]
        quantities.append(Quantity("pixel values", relative_error(np.concatenate(own), inputs["pixel_values"]), 1e-6))
    masks = inputs["attention_mask"].astype(bool)
    for row, count in enumerate(info["images_per_row"]):
        ids = inputs["input_ids"][row][masks[row]]
        sides = [(rows // MERGE, columns // MERGE) for rows, columns in grids[first:first + count]]
        places.append(pipe.text_places(ids == image_token, sides))
        arrays += [ids[None].astype(np.int32), places[row][None], inputs["probe"][row][masks[row]][None]]
        first += count
    wanted = np.concatenate([expected["position_ids"][:, row, mask].T for row, mask in enumerate(masks)])
    found_places = np.concatenate(places)[:, :3]
    quantities.append(Quantity("positions", float(np.abs(found_places - wanted).max()), 0, unit=f"of {wanted.max()}"))
    parameters = {name: p for model in MODELS for name, p in trainable_parameters(getattr(pipe, model)).items()}
    for parameter in parameters.values():
        parameter.requires_grad = True
    cell = Encoders(pipe.vision_tower, pipe.text_encoder, grids, info["images_per_row"])
    step = CompiledStep(Gradients(cell, list(parameters.values())).run, "the gradients", mode)
    values = [to_numpy(v).astype(np.float32) for v in step(*map(Tensor, arrays))]
    rows, outputs = len(masks), 1 + len(masks) + len(grids)
    hidden = [value[0] for value in values[1:1 + rows]]
    drop, length = info["drop"], expected["prompt_embeds"].shape[1]
    prompts = np.stack([np.pad(h[drop:], ((0, length - len(h[drop:])), (0, 0))) for h in hidden])
    own_mask = np.stack([np.arange(length) < len(h) - drop for h in hidden])
    for name, value, reference in (
            ("picture tokens", np.concatenate(values[1 + rows:outputs]), expected["image_embeds"]),
            ("hidden states", np.concatenate(hidden),
             np.concatenate([expected["hidden_states"][row][mask] for row, mask in enumerate(masks)])),
            ("prompt embeds", prompts, expected["prompt_embeds"]),
            ("prompt mask", own_mask.astype(np.float32), expected["prompt_mask"])):
        quantities.append(Quantity(name, relative_error(value, reference), allowed.value))
    # a sum of both signs: as far off as what is summed
    quantities.append(Quantity("loss", relative_error(values[0], expected["loss"]), allowed.value))
    gradients = dict(zip(parameters, values[outputs:]))
    pairs = {name: (value.reshape(expected[f"grad.{name}"].shape), expected[f"grad.{name}"])
             for name, value in gradients.items()}
    return [*quantities, worst("gradients", pairs, allowed.gradient)]
