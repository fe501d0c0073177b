"""Several ranks against one: how far the losses are apart, and how many bytes a step takes between the ranks.

    ms-diffsynth tiny flux models/flux-tiny
    python benchmarks/ranks.py [--ranks 2 4] [--steps 30] [--model models/flux-tiny]

Trains the README's main job (tiny FLUX.1, DreamBooth with class images, compiled step, four images a step)
with one process and by ``ms-diffsynth launch`` with several, which share the same four images: its LoRA, the whole
network, and that with divided moments. Bytes are what the loopback device counted in the whole job less those of a
job of a third of the steps, for each step between; the least is what a ring has to send for the sums: 2 (N - 1) x 4
bytes for each trained weight, over all ranks.
"""
from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples/flux/tiny_dreambooth.yaml"
IMAGES = 4
KINDS = {
    "LoRA": [],
    "whole network": ["--trainable_models", "dit"],
    "whole network, zero_stage 1": ["--trainable_models", "dit", "--zero_stage", "1"],
}


def train(out: Path, model: Path, ranks: int, steps: int, flags: list[str]) -> int:
    """One job. Returns: bytes over the loopback device meanwhile."""
    launch = ["launch", "--workers", str(ranks)] if ranks > 1 else []
    before = loopback_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "ms_diffsynth.cli.main", *launch, "train", str(CONFIG), "--model_paths", str(model),
         "--output_path", str(out), "--batch_size", str(IMAGES // ranks), "--max_train_steps", str(steps),
         "--save_steps", "100000", "--checkpoint_steps", "0", "--sample_prompts", "[]", "--lr_scheduler", "constant",
         "--learning_rate", "1e-4", "--resume", "none", *flags],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{out.name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return loopback_bytes() - before


def loopback_bytes() -> int:
    line = next(row for row in Path("/proc/net/dev").read_text().splitlines() if row.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def column(out: Path, name: str) -> np.ndarray:
    with open(out / "loss.csv", newline="") as file:
        return np.array([float(row[name]) for row in csv.DictReader(file)])


def trained_weights(out: Path) -> int:
    from safetensors import safe_open

    file = sorted(out.glob("step-*.safetensors"))[-1]
    with safe_open(str(file), "np") as tensors:
        return sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", type=Path, default=ROOT / "models/flux-tiny")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    print("| trained | ranks | largest difference of a loss | of a gradient norm | s a step | bytes a step | least |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.only:
            base = Path(folder) / kind
            train(base, args.model, 1, args.steps, KINDS[kind])
            weights = trained_weights(base)
            print(f"| {kind}, {weights:,} weights | 1 | | | {np.median(column(base, 'seconds')):.3f} | | |", flush=True)
            for ranks in args.ranks:
                out, short = Path(folder) / f"{kind} {ranks}", Path(folder) / f"{kind} {ranks} short"
                few = args.steps // 3
                sent = train(out, args.model, ranks, args.steps, KINDS[kind])
                sent -= train(short, args.model, ranks, few, KINDS[kind])
                apart = [np.abs(column(out, name) / column(base, name) - 1).max() for name in ("loss", "grad_norm")]
                seconds = np.median(column(out, "seconds"))
                print(f"| {kind} | {ranks} | {apart[0]:.1e} | {apart[1]:.1e} | {seconds:.3f} | "
                      f"{sent / (args.steps - few):,.0f} | {2 * (ranks - 1) * 4 * weights:,} |", flush=True)


if __name__ == "__main__":
    main()
