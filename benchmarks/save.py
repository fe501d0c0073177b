"""What saving costs at the size of a real LoRA: FLUX.1-dev, rank 16, its weights and both moments.

    python benchmarks/save.py [--weights 44.8e6] [--saves 5]
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from ms_diffsynth.storage.checkpoint import open_checkpoint_folder, remove_old_checkpoints, save_checkpoint

TENSORS = 448


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=44.8e6)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    arrays = {kind: {f"{kind}.{k}": rng.standard_normal(int(args.weights) // TENSORS).astype(np.float32)
                     for k in range(TENSORS)} for kind in ("weights", "moment1", "moment2")}
    groups = {"weights": arrays["weights"], "moments": arrays["moment1"] | arrays["moment2"]}
    with tempfile.TemporaryDirectory() as root:
        for step in range(1, args.saves + 1):
            began = time.perf_counter()
            path = save_checkpoint(root, step, groups, {"step": step})
            saved = time.perf_counter() - began
            remove_old_checkpoints(path, 2)
            print(f"{sum(file.stat().st_size for file in path.iterdir()) / 1e6:.0f} MB: written in {saved:.2f} s, with "
                  f"the older ones verified and removed {time.perf_counter() - began:.2f} s", flush=True)
        began = time.perf_counter()
        open_checkpoint_folder(path)
        print(f"opened and verified in {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
