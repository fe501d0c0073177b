"""Runs of the toy family for any number of ranks: as a script, what one rank of a job does.

    python ranks.py MODEL DATA OUT NAME [NAME ...]    every run of these names into OUT/NAME, one after the other
"""
from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device import DEVICE

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

import pytest
from mindspore import nn, ops
from PIL import Image
from toy_run import Module, Own, dataset_of, poison, rows, train

from ms_diffsynth import runtime
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import DataError, OutputError
from ms_diffsynth.launch.job import SCHEDULER, Job
from ms_diffsynth.launch.ports import free_port
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.training import prepared
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.trainer import Trainer
from ms_diffsynth.training.two_stage import launch_data_process_task

ROWS, BATCH = 16, 8  # pictures, and pictures a step, over all ranks
FULL = {"trainable_models": "dit"}

# Steps of BATCH pictures; "accumulation" divides them further.
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"mode": "graph"},
    "lora eager": {"accumulation": 2},
    "prior": {"prior": True},
    "own forward": {"kind": Own, "steps": 8},
    "bad sample": {"bad": 13, "loss_scale": 128.0, "steps": 8},
    "full": {"mode": "graph", "how": FULL, "use_ema": True},
    "zero 1": {"mode": "graph", "how": FULL, "accumulation": 2, "zero_stage": 1},
    "zero 2": {"mode": "graph", "how": FULL, "accumulation": 2, "zero_stage": 2, "max_grad_norm": 0.1},
    "zero 1 eager": {"how": FULL, "zero_stage": 1},
    "zero 2 eager": {"how": FULL, "zero_stage": 2, "accumulation": 2, "steps": 12, "checkpoint_steps": 6,
                     "keep_checkpoints": 9},
    "zero 2 prodigy": {"mode": "graph", "how": FULL, "zero_stage": 2, "accumulation": 2, "optimizer": "prodigy",
                       "learning_rate": 1.0, "optimizer_args": ("d0=1e-3",), "steps": 8},
    "adafactor": {"mode": "graph", "how": FULL, "optimizer": "adafactor", "steps": 8},
    "resumed": {"how": FULL, "zero_stage": 2, "accumulation": 2, "steps": 12,
                "resume": "OUT/zero 2 eager at 6/checkpoints/step-00000006"},
    # by one process, what N ranks compute, in the order in which they sum: rank by rank
    "lora in 2": {"mode": "graph", "accumulation": 2}, "lora in 4": {"mode": "graph", "accumulation": 4},
    "full in 2": {"mode": "graph", "accumulation": 2, "how": FULL},
    "full in 4": {"mode": "graph", "accumulation": 4, "how": FULL},
    "lora in order": {"mode": "graph", "in_order": True},
    "full in order": {"mode": "graph", "in_order": True, "how": FULL},
    "stopped": {"how": FULL, "zero_stage": 1, "term": (1, 5), "checkpoint_steps": 100,
                "grace_seconds": 600.0},
    "stopped in pictures": {"how": FULL, "zero_stage": 1, "pictures": 4, "sample_steps": 4, "checkpoint_steps": 100,
                            "grace_seconds": 600.0},
    "another seed": {"steps": 2, "other_seed": 1},
    "bad row": {"how": FULL, "zero_stage": 1, "bad_row": (1, 3), "steps": 4, "checkpoint_steps": 100},
    "full disk": {"how": FULL, "zero_stage": 1, "full": 1, "steps": 2, "checkpoint_steps": 1},
}


def run(name: str, model: Path, data: Path, out: Path, steps: int | None = None, kind: type = Module,
        how: dict[str, Any] | None = None, prior: bool = False, bad: int | None = None, term: Any = None,
        pictures: int | None = None, full: int | None = None, other_seed: int | None = None,
        bad_row: Any = None, in_order: bool = False,
        resume: str = "none", **options: Any) -> str:
    """One of `RUNS`, in this process and all others of the job. Returns: a digest of the weights it ended with."""
    accelerator = Accelerator(options.get("accumulation", 1), options.get("mode", "pynative"), DEVICE)
    ranks = accelerator.num_processes
    module = kind(model, "sft", Objective(prior_loss_weight=1.0) if prior else None, **(how or {}))
    with pytest.MonkeyPatch.context() as patch:
        if bad is not None:
            poison(patch, bad)
        if term is not None and term[0] == accelerator.process_index:
            _send(patch, term[1])
        if full == accelerator.process_index:
            patch.setattr("ms_diffsynth.training.hooks.checkpoints.write_part", _no_space)
        if other_seed == accelerator.process_index:
            options["seed"] = 7
        if bad_row is not None and bad_row[0] == accelerator.process_index:
            _bad_row(patch, (bad_row[1] - 1) * BATCH // ranks)
        if in_order:
            patch.setattr("mindspore.ops.operations.AllReduce", InOrder)
        if pictures is not None:
            options["sampler"] = _pictures(pictures)
        train(out / name, module, dataset_of(data), resume=resume.replace("OUT", str(out)),
              **{"batch_size": BATCH // ranks // options.get("accumulation", 1), "num_epochs": None,
                 "max_train_steps": steps or 30, "checkpoint_steps": 0} | options,
              **({"class_dataset": rows(5, 50)} if prior else {}))
    return hashlib.sha256(b"".join(to_numpy(p).tobytes() for p in module.trainable_parameters())).hexdigest()


def _pictures(step: int) -> Callable[[], list[Image.Image]]:
    """A sampler on which the other ranks wait; at its last call this process gets SIGTERM in the middle of it."""
    calls = []

    def sampler() -> list[Image.Image]:
        calls.append(1)
        if len(calls) == 1 + step // 4:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return [Image.new("RGB", (8, 8))]

    return sampler


class InOrder(nn.Cell):
    """An AllReduce that sums rank by rank; MindSpore's goes around a ring, from another rank on for each part."""

    def __init__(self):
        super().__init__()
        self.gather, self.ranks = ops.AllGather(), runtime.current().world_size

    def construct(self, x):
        rows = self.gather(x).reshape((self.ranks, -1))
        total = rows[0]
        for rank in range(1, self.ranks):
            total = total + rows[rank]
        return total.reshape(x.shape)


def _send(patch: pytest.MonkeyPatch, step: int) -> None:
    """This process gets SIGTERM in the middle of a step."""
    original = Trainer.compute

    def compute(self, *batch):
        if self.logger.num_steps == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch)

    patch.setattr(Trainer, "compute", compute)


def _bad_row(patch: pytest.MonkeyPatch, sound: int) -> None:
    """This process can prepare so many rows, and not the next one."""
    original, made = prepared.prepare_row, itertools.count()

    def prepare_row(*arguments):
        if next(made) == sound:
            raise DataError("the bad row")
        return original(*arguments)

    patch.setattr(prepared, "prepare_row", prepare_row)


def _no_space(*_: Any, **__: Any) -> None:
    raise OutputError("part cannot be written: ENOSPC")


def cache(model: Path, data: Path, out: Path) -> None:
    """Stage one of split training."""
    launch_data_process_task(Accelerator(1, "pynative", DEVICE), dataset_of(data), Module(model, "sft:data_process"),
                             ModelLogger(out / "cache"))


def start(ranks: int, *words: str | Path) -> list[subprocess.CompletedProcess]:
    """A job of this script: what became of each rank."""
    job = Job(command=(sys.executable, __file__, *map(str, words)), workers=ranks, log_dir=Path(words[2]),
              master_address="127.0.0.1", master_port=free_port("127.0.0.1"))
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open(job.log(rank), "w+")) for rank in job.ranks]
        processes = [subprocess.Popen(SCHEDULER, env=job.environment(None), stderr=subprocess.DEVNULL)]
        stack.callback(lambda: [process.kill() for process in processes])
        for rank, log in zip(job.ranks, logs):
            variables = {k: v for k, v in job.environment(rank).items() if k != "MS_DIFFSYNTH_HEARTBEAT"}
            processes.append(subprocess.Popen(job.command, env=variables | path, stdout=log, stderr=log,
                                              preexec_fn=lambda: os.sched_setaffinity(0, range(os.cpu_count()))))
        until = time.monotonic() + 900  # only against hanging, however busy the machine is
        while time.monotonic() < until and None in (codes := [process.poll() for process in processes[1:]]):
            time.sleep(0.1)
        return [subprocess.CompletedProcess(job.command, code, Path(log.name).read_text())
                for code, log in zip(codes, logs)]


def make(name: str, model: Path, data: Path, out: Path) -> str | None:
    """The cache, or what `run` does."""
    return cache(model, data, out) if name == "cache" else run(name, model, data, out, **RUNS[name])


def main(model: Path, data: Path, out: Path, names: list[str]) -> None:
    """All runs of these names, and then what each rank ended with, for comparison."""
    atexit.register(lambda: print(f"leaves with policy {os.sched_getscheduler(0)}"))  # after what ranks register
    found = {name: make(name, model, data, out) for name in names}
    (out / f"rank-{runtime.current().rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
