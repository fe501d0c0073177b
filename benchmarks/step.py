"""A training step, an encoding or a sample on the CPU: ms_diffsynth, mindone and PyTorch in turn.

    python benchmarks/step.py --model flux --torch_python TORCH_ENV/bin/python --rounds 10 --json step.json

Every contender is a process of its own that loads the same weights and the same batch. The driver asks one after the
other for one step and stops the others meanwhile, so that only one computes and the machine's drift hits all alike.
See README.md beside this file.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import WORKLOADS

HERE = Path(__file__).resolve().parent
KINDS = {"graph": "ms_diffsynth, compiled", "off": "the same, native kernels turned off",
         "pynative": "ms_diffsynth, PyNative",
         "mindone": "mindone TrainStep, compiled", "torch": "PyTorch, eager", "torch_compile": "PyTorch, torch.compile"}
TORCH = {"torch": "eager", "torch_compile": "compile"}
WARM_UP = 12  # calls not counted: the first compiles, and for ten MindSpore tries numbers of threads for each kernel


def warm_up(model: str) -> int:
    """Steps of a workload that are not counted."""
    return max(1, WARM_UP // WORKLOADS[model].repeats)


def environment(kind: str = "graph") -> dict[str, str]:
    """This process's, with the package on the path; PyTorch's environment shares no packages with ours."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if kind == "off":
        variables["MS_DIFFSYNTH_NATIVE"] = "0"
    return variables if kind in TORCH else {**variables, "PYTHONPATH": str(HERE.parent)}


class Worker:
    """A contender: a process that makes one step per line it is sent, and is stopped in between."""

    def __init__(self, model: str, kind: str, weights: Path, torch_python: str | None, log: Path):
        self.model, self.kind, self.answers, self.log = model, kind, [], log
        command = ([torch_python, str(HERE / "worker_torch.py"), model, str(weights), TORCH[kind]] if kind in TORCH
                   else [sys.executable, str(HERE / "worker_ms.py"), model, str(weights),
                         "graph" if kind == "off" else kind])
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                            env=environment(kind), cwd=weights.parent, text=True)

    def step(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker '{self.kind}' ended:\n{self.log.read_text()[-3000:]}")
        self.answers.append(json.loads(line))
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def result(self) -> dict:
        counted = self.answers[warm_up(self.model):]
        measured = [a["seconds"] for a in counted]
        return {"first_seconds": self.answers[0]["seconds"], "step_seconds": measured,
                "cpu_seconds": [a["cpu_seconds"] for a in counted],
                "median": statistics.median(measured), "min": min(measured), "max": max(measured),
                "peak_gb": self.answers[-1]["peak_gb"], "losses": [a["loss"] for a in self.answers]}


def measure(model: str, kinds: list[str], rounds: int, torch_python: str | None) -> dict[str, dict]:
    """One result per contender. They start one after the other, because compiling takes the most memory."""
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        try:
            command = [sys.executable, str(HERE / "worker_ms.py"), model, str(weights), "write"]
            written = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
            if written.returncode:
                raise SystemExit(f"the weights cannot be written:\n{written.stderr[-3000:]}")
            for kind in kinds:
                workers.append(Worker(model, kind, weights, torch_python, Path(folder) / f"{kind}.log"))
                for _ in range(warm_up(model)):
                    workers[-1].step()
                print(f"{kind}: first step after {workers[-1].answers[0]['seconds']:.1f} s", file=sys.stderr)
            for _ in range(rounds):
                for worker in workers:
                    worker.step()
        finally:
            for worker in workers:
                worker.end()
    return {worker.kind: worker.result() for worker in workers}


def table(results: dict[str, dict]) -> str:
    reference = results.get("torch")
    rows = ["| | step, median (min to max) s | ratio to PyTorch: median, of minima | CPU time, least s | first step s "
            "| peak GB | loss: first, last |", "|---|---|---|---|---|---|---|"]
    for kind, r in results.items():
        ratio = "-"
        if reference:
            # the ratio within each round, so that drift cancels
            pairs = [a / b for a, b in zip(r["step_seconds"], reference["step_seconds"])]
            ratio = f"{statistics.median(pairs):.2f}, {r['min'] / reference['min']:.2f}"
        rows.append(f"| {KINDS[kind]} | {r['median']:.3f} ({r['min']:.3f} to {r['max']:.3f}) | {ratio} "
                    f"| {min(r['cpu_seconds']):.3f} | {r['first_seconds']:.1f} | {r['peak_gb']:.1f} "
                    f"| {r['losses'][0]:.6f}, {r['losses'][-1]:.6f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WORKLOADS), default="flux", help="what is measured (default: flux)")
    parser.add_argument("--rounds", type=int, default=10, help="steps measured for each")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=None, help="contenders (default: all)")
    parser.add_argument("--torch_python", help="python of an environment with torch, diffusers and safetensors")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    kinds = arguments.only or [k for k in KINDS if k not in TORCH or arguments.torch_python]
    if set(kinds) & set(TORCH) and not arguments.torch_python:
        parser.error("PyTorch needs --torch_python: the python of an environment with torch, diffusers and safetensors")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected at least 1")
    results = measure(arguments.model, kinds, arguments.rounds, arguments.torch_python)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
