"""Does a template's condition matter? The loss on held-out images under their own, and under another image's.

    python examples/flux2/templates/effect.py runs/brightness-1 runs/brightness-2 --trust_template_code

Each argument is the output_path of a run of ``ms-diffsynth train``. Ends with exit code 1 when a run has no effect.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor

from ms_diffsynth import (
    ConfigError,
    Draws,
    build_datasets,
    build_module,
    build_pipeline,
    load_config,
    load_state_dict,
    run_main,
)
from ms_diffsynth.data.loader import collate
from ms_diffsynth.nn.names import assign
from ms_diffsynth.pipeline import Pipeline, UnitSequence
from ms_diffsynth.program import Cut

HELD_OUT = "examples/data/photo_tiles64/heldout.jsonl"


def losses(run: Path, metadata: str, trust_template_code: bool, times: int = 8, seed: int = 0) -> np.ndarray:
    """The training objective of a run on every row of ``metadata``: under the right condition, a wrong one, and none.

    Each image is seen ``times`` times, with another noise, noise level and wrong condition each time; the three
    losses are under the same ones. A wrong condition is another image's, and each is used once. None: the base model
    without the template.

    Returns: float32 [3, times, rows].
    """
    config = load_config(run / "config.yaml", dataset_metadata_path=metadata, trust_template_code=trust_template_code)
    pipe = build_pipeline(config)
    module = build_module(config, pipe)
    checkpoints = sorted(run.glob("step-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2]))
    if not checkpoints:
        raise ConfigError(f"{run} holds no step-*.safetensors: expected the output_path of a run with save_steps.")
    assign(pipe.template_model, load_state_dict(checkpoints[-1]).items())
    cut, loss_with = loss_of(pipe)
    dataset = build_datasets(config).instance
    slots = collate([module.prepare(dataset[k], cut) for k in range(len(dataset))])
    pipe.units = [unit for unit in pipe.units if unit not in pipe.optional_units["template_inputs"]]
    _, loss_without = loss_of(pipe)
    draws, rows, found = Draws(seed), len(dataset), []
    shape = (rows, *pipe.latent_shape(config.data.height, config.data.width))
    for k in range(times):
        samples = np.arange(k * rows, (k + 1) * rows)
        fresh = {name: pipe.objective.draw(name, shape, len(pipe.sigmas), draws.of(samples)) for name in cut.draws}
        other = derangement(draws.permutation("conditions", k, rows))
        shuffled = {name: value[other] for name, value in slots.items() if name.startswith("template.")}
        found.append([loss_with(slots | fresh), loss_with(slots | fresh | shuffled), loss_without(slots | fresh)])
    return np.swapaxes(found, 0, 1)


def loss_of(pipe: Pipeline) -> tuple[Cut, Callable[[dict[str, np.ndarray]], np.ndarray]]:
    """The pipeline's training program cut for its loss, and that loss as a function of the slots it needs."""
    program = pipe.training_program(pipe.objective, pipe.sigmas)
    cut = program.cut(("sample_losses",), fuse=pipe.always_fused)
    step = UnitSequence(cut, pipe)
    return cut, lambda slots: step(tuple(Tensor(slots[name]) for name in step.inputs))[0].asnumpy()


def derangement(order: np.ndarray) -> np.ndarray:
    """From an order of n > 1 things, a permutation that leaves none in its place: each goes to the next one's."""
    found = np.empty_like(order)
    found[order] = np.roll(order, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that training wrote")
    parser.add_argument("--metadata", default=HELD_OUT, help=f"rows that were not trained on (default: {HELD_OUT})")
    parser.add_argument("--times", type=int, default=8, help="how often each image is seen (default: 8)")
    parser.add_argument("--trust_template_code", action="store_true", help="run the template's model.py, which is code")
    args = parser.parse_args()
    print(f"{'run':20} {'right':>8} {'shuffled':>8} {'without':>8} {'difference':>10} {'error':>7}")
    table = []
    for run in args.runs:
        found = losses(run, args.metadata, args.trust_template_code, args.times)
        paired = (found[1] - found[0]).mean(0)  # of each image: the error is that over images
        table.append((*found.mean((1, 2)), paired.mean()))
        show(run.name, table[-1], paired)
    if len(table) > 1:  # the error is that over runs
        show("mean", np.mean(table, 0), np.array([row[3] for row in table]))
    return int(min(row[3] for row in table) <= 0)


def show(name: str, row: Sequence[float], differences: np.ndarray) -> None:
    """One line: the three losses, shuffled less right, and the standard error of that."""
    error = differences.std(ddof=1) / len(differences) ** 0.5
    print(f"{name:20} {row[0]:8.4f} {row[1]:8.4f} {row[2]:8.4f} {row[3]:10.4f} {error:7.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
