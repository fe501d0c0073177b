"""What of a run is saved, and how a step gets it back.

Every random number is drawn on the host, keyed by the seed and the number of the sample (`draws`), and the order
of the data is computed (`data.loader`). So the state is what a step changes, and a few whole numbers.
"""
from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, ops

from ms_diffsynth import __version__, runtime
from ms_diffsynth.errors import CheckpointError, listing
from ms_diffsynth.formats.json_text import shown
from ms_diffsynth.formats.weights import FLOATS
from ms_diffsynth.nn.names import load_state
from ms_diffsynth.storage.checkpoint import Checkpoint
from ms_diffsynth.training.step import TrainStep

CHECKPOINTS = "checkpoints"  # folder in the folder of a run
PREPARED = ".prepared"  # another one, of rows that do not fit into memory; gone when the run has ended


def versions() -> dict[str, str]:
    """What may change the last bit of a number."""
    return ({"ms_diffsynth": __version__, "kernels": runtime.kernels()}
            | {name: version(name) for name in ("mindspore", "mindone", "numpy")})


def run_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the run that saved a checkpoint."""
    return checkpoint.path.parent.parent


def parameters_of(step: TrainStep) -> dict[str, dict[str, Parameter]]:
    """Every Parameter that a step changes, by group and name, but for moments that the ranks have divided.

    Accumulators are empty between two steps.
    """
    groups = {"weights": {p.name: p for p in step.weights}}
    if not step.optimizer.is_divided:
        groups["moments"] = step.optimizer.state_tensors()
    if step.ema is not None:
        groups["ema"] = step.ema.state_tensors()
    if step.loss_scaler is not None:
        groups["loss_scale"] = {n: p for n, p in vars(step.loss_scaler).items() if isinstance(p, Parameter)}
    return groups


def check_state(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError for a sound checkpoint that is none of a training run: one that a script saved."""
    kinds: dict[str, type] = dict.fromkeys(
        ("step", "epoch", "position", "skipped", "skipped_in_a_row", "saved_at"), int)
    kinds |= {"saved": list, "captions": list, "identity": dict, "versions": dict}
    found = checkpoint.state
    wrong = [f"{name}={shown(found[name]) if name in found else 'nothing'}" for name, kind in kinds.items()
             if type(found.get(name)) is not kind or (kind is int and not -1 <= found[name] < 1 << 53)
             or (kind is list and not all(isinstance(text, str) for text in found[name]))]
    if wrong:
        raise CheckpointError(f"{checkpoint.path} is no checkpoint of a training run: its state says {listing(wrong)}. "
                              "Resume from one that training saved.")


def restore(step: TrainStep, checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    """Give a step the state of a checkpoint, in place, so that what is compiled sees it.

    Args:
        now: the present `identity`. A loss scale that it changes is not restored; a moving average that was not kept
            before starts from the weights.

    Raises: CheckpointError when the checkpoint has no weights or no moments, or holds what is not finite; WeightError
        when they are of others.
    """
    own = {group: parameters for group, parameters in parameters_of(step).items() if group != "moments"}
    lost = [name for name in ("weights", "moments") if name not in checkpoint.groups]
    if lost:
        raise CheckpointError(f"{checkpoint.path} has no {' and no '.join(lost)}: it has {listing(checkpoint.groups)}. "
                              "Resume from a checkpoint of a training run.")
    if now.get("loss_scale") != checkpoint.state["identity"].get("loss_scale"):
        own.pop("loss_scale", None)
    for name, parameters in own.items():
        if name in checkpoint.groups:
            load_state(parameters, _Finite(checkpoint, name))
    step.optimizer.load_state_tensors(_Finite(checkpoint, "moments"))
    if step.ema is not None and "ema" not in checkpoint.groups:
        for average, weight in zip(step.ema.average, step.ema.parameters):
            ops.assign(average, weight.astype(average.dtype))


class _Finite:
    """The arrays of a group, each read and looked at when it is asked for. Raises: CheckpointError."""

    def __init__(self, checkpoint: Checkpoint, group: str):
        self.checkpoint, self.group, self.arrays = checkpoint, group, checkpoint.open(group)
        self.shapes = self.arrays.shapes

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        if array.dtype.name in FLOATS and not np.isfinite(array).all():
            raise CheckpointError(f"{self.checkpoint.path} holds numbers in {self.group} that are not finite: {name}. "
                                  "Resume from an earlier checkpoint.")
        return array
