"""``ms-diffsynth launch --workers 2 train``: stopped, killed, gone on by one process, with the numbers of one."""
from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from records import column

from ms_diffsynth.storage.checkpoint import latest

pytestmark = [pytest.mark.fault, pytest.mark.slow]

STEPS = 400
FLAGS = ("--mode", "pynative", "--sample_prompts", "[]", "--max_train_steps", str(STEPS), "--save_steps", "1000",
         "--checkpoint_steps", "5", "--trainable_models", "dit", "--zero_stage", "1", "--dataset_repeat", "4",
         "--grace_seconds", "600")


@pytest.fixture
def start(config, begin):
    """``start(workers, flag, ...)`` trains in a job, or in one process."""

    def call(workers, *flags):
        launch = ["launch", "--workers", str(workers), "--grace_seconds", "600",
                  "--hang_seconds", "600"] if workers > 1 else []
        return begin("-m", "ms_diffsynth.cli.main", *launch, "train", str(config), *FLAGS, *flags)

    return call


def has_steps(process, count):
    """Wait for a step of the run in "out", and give its worker's numbers of processes."""
    path, until = Path("out/loss.csv"), time.monotonic() + 900
    while not (path.exists() and path.read_text().count("\n") > count):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.01)


def worker(process, rank):
    """The process of a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes()
        except OSError:  # somebody else's, or ended this moment
            continue
        if f"RANK_ID={rank}\0".encode() in variables and str(Path.cwd()).encode() in variables:
            return int(folder.name)
    raise AssertionError("it is not there")


def test_stopped_killed_and_gone_on_by_one(start):
    """The losses are those of one process that is never cut, whatever cuts the job and whoever goes on."""
    whole = start(1, "--batch_size", "2", "--output_path", "whole")
    _, err = whole.communicate(timeout=900)
    assert whole.returncode == 0, err
    stopped = start(2, "--batch_size", "1")
    has_steps(stopped, 10)
    stopped.send_signal(signal.SIGTERM)
    _, err = stopped.communicate(timeout=900)
    assert stopped.returncode == 143 and err.rstrip().endswith("stopped by SIGTERM: all workers have ended"), err
    at = latest("out/checkpoints").step
    assert 10 <= at < STEPS and len(column("out")) == at
    killed = start(2, "--batch_size", "1", "--resume", "auto")
    has_steps(killed, at + 20)
    os.kill(worker(killed, 1), signal.SIGKILL)
    _, err = killed.communicate(timeout=900)
    assert killed.returncode == 75 and "rank 1 was killed by SIGKILL" in err.splitlines()[-1], err
    assert latest("out/checkpoints").step > at
    last = start(1, "--batch_size", "2", "--resume", "auto")
    _, err = last.communicate(timeout=900)
    assert last.returncode == 0 and "resumed from" in err, err
    assert np.allclose(column("out"), column("whole"), rtol=1e-5) and len(column("out")) == STEPS
    assert not [path for path in Path("out/checkpoints").iterdir() if path.name.startswith(".tmp")]
