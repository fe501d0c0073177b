"""Compiling the training step of a LoRA by the number of FLUX.1's blocks, tiny width: the table of README.md.

    python benchmarks/compiling.py                      # on the CPU; --device Ascend for the stand-in for CANN

Seconds of processor time, and GiB of this machine at the peak of the process.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ms_diffsynth.debug.skeleton import RESULT, Plan
from ms_diffsynth.standin import environment

WIDTH = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16,
         "axes_dims_rope": [4, 6, 6]}
DEPTHS = ((2, 4), (4, 8), (8, 16), (19, 38))


def measure(device: str, double: int, single: int, recompute: bool) -> str:
    plan = Plan(family="flux", model="FLUX.1-dev", height=128, width=128, text_tokens=16, dtype="float32", steps=2,
                recompute=recompute, device=device,
                settings=WIDTH | {"num_layers": double, "num_single_layers": single})
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(Path(folder) / "log.jsonl", shapes_only=True) if device == "Ascend" else None
        done = subprocess.run([sys.executable, "-m", "ms_diffsynth.debug.skeleton", json.dumps(asdict(plan))],
                              cwd=sys.path[0], env=variables, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    report = json.loads(done.stdout.splitlines()[-1].removeprefix(RESULT))
    return f"{report['compile_seconds']:.1f}, {report['host_peak'] / 2 ** 30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["CPU", "Ascend"], default="CPU")
    device = parser.parse_args().device
    print("| blocks | plain | recompute |\n|---|---|---|", flush=True)
    for double, single in DEPTHS:
        print(f"| {double} + {single} | {measure(device, double, single, False)} "
              f"| {measure(device, double, single, True)} |", flush=True)


if __name__ == "__main__":
    main()
