"""Does a template's condition matter? The loss on held-out pictures under their own, and under another picture's.

    python examples/flux2/templates/effect.py runs/brightness-1 runs/brightness-2 --trust_template_code

Each argument is the output_path of a run of ``ms-diffsynth train``. Ends with exit code 1 when a run has no effect.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from mindspore import Tensor

from ms_diffsynth import Draws, load_state_dict, run_main
from ms_diffsynth.cli.run import build_datasets, build_module, build_pipeline
from ms_diffsynth.config import load_config
from ms_diffsynth.data.loader import collate
from ms_diffsynth.nn.names import assign
from ms_diffsynth.pipeline import UnitSequence

HELD_OUT = "examples/data/photo_tiles64/heldout.jsonl"


def losses(run: Path, metadata: str, trust_template_code: bool, times: int = 8,
           seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The training objective of a run on every row of ``metadata``, with the right and with a wrong condition.

    Each picture is seen ``times`` times, with another noise, noise level and wrong condition each time; both losses are
    under the same ones. The wrong condition is that of another picture, and each condition is used once.

    Returns: two arrays float32 [times, rows].
    """
    config = load_config(run / "config.yaml", {"dataset_metadata_path": metadata,
                                               "trust_template_code": str(trust_template_code).lower()})
    settings, pipe = SimpleNamespace(**config.flat()), build_pipeline(config)
    module = build_module(settings, pipe, settings.task)
    checkpoint = max(run.glob("step-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2]))
    assign(pipe.template_model, load_state_dict(checkpoint).items())
    cut = module.training_cut()
    dataset, _ = build_datasets(settings, pipe.division_factor)
    slots = collate([module.prepare(dataset[k], cut) for k in range(len(dataset))])
    step = UnitSequence(cut, pipe, outputs=("sample_losses",))
    draws, rows, shape = Draws(seed), len(dataset), pipe.latent_shape(settings.height, settings.width)
    right, wrong = [], []
    for k in range(times):
        samples = np.arange(k * rows, (k + 1) * rows)
        fresh = {"noise": draws.normal("noise", samples, shape),
                 "density_draw": draws.uniform("density_draw", samples)}
        other = derangement(draws.permutation("conditions", k, rows))
        shuffled = {name: value[other] for name, value in slots.items() if name.startswith("template.")}
        for found, given in ((right, slots | fresh), (wrong, slots | fresh | shuffled)):
            found.append(step(tuple(Tensor(given[name]) for name in step.inputs))[0].asnumpy())
    return np.stack(right), np.stack(wrong)


def derangement(order: np.ndarray) -> np.ndarray:
    """From an order of n > 1 things, a permutation that leaves none in its place: each goes to the next one's."""
    found = np.empty_like(order)
    found[order] = np.roll(order, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that training wrote")
    parser.add_argument("--metadata", default=HELD_OUT, help=f"rows that were not trained on (default: {HELD_OUT})")
    parser.add_argument("--times", type=int, default=8, help="how often each picture is seen (default: 8)")
    parser.add_argument("--trust_template_code", action="store_true", help="run the template's model.py, which is code")
    args = parser.parse_args()
    print(f"{'run':24} {'right':>8} {'shuffled':>8} {'difference':>10} {'error':>7}")
    means = []
    for run in args.runs:
        right, wrong = losses(run, args.metadata, args.trust_template_code, args.times)
        paired = (wrong - right).mean(0)  # of each picture, so that the error is that over pictures
        error = paired.std(ddof=1) / len(paired) ** 0.5
        means.append((right.mean(), wrong.mean(), paired.mean()))
        print(f"{run.name:24} {right.mean():8.4f} {wrong.mean():8.4f} {paired.mean():10.4f} {error:7.4f}", flush=True)
    if len(means) > 1:
        average, spread = np.mean(means, 0), np.std([m[2] for m in means], ddof=1) / len(means) ** 0.5
        print(f"{'mean':24} {average[0]:8.4f} {average[1]:8.4f} {average[2]:10.4f} {spread:7.4f}")
    return int(min(m[2] for m in means) <= 0)


if __name__ == "__main__":
    sys.exit(run_main(main))
