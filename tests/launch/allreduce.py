"""A worker that trains nothing: MindSpore's AllReduce in a loop, as a training loop would have it.

    python allreduce.py STEPS FOLDER [sleep|raise|exit STEP [RANK]]     what rank 1, or another, does at that step
"""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops, set_device
from mindspore.communication import get_group_size, get_rank, init

from ms_diffsynth.launch.worker import beat
from ms_diffsynth.training.signals import stopping_on_signals


def misbehave(what: str) -> None:
    if what == "sleep":
        time.sleep(3600)
    if what == "raise":
        raise ValueError("boom")
    os._exit(0)


def main() -> None:
    steps, folder = int(sys.argv[1]), Path(sys.argv[2])
    what, when, who = [*sys.argv[3:], "1"][:3] if len(sys.argv) > 3 else ("", "-1", "1")
    set_device("CPU")
    init()
    rank, world, reduce = get_rank(), get_group_size(), ops.AllReduce()
    with stopping_on_signals(60) as stop:
        for step in range(1, steps + 1):
            beat(step)
            if (rank, step) == (int(who), int(when)):
                misbehave(what)
            ranks, stops = reduce(Tensor(np.array([rank + 1, stop.signal is not None], np.float32))).asnumpy()
            assert ranks == world * (world + 1) / 2
            print(f"rank {rank} step {step}")
            if stops:  # the same on every rank, so none waits for another
                break
            time.sleep(0.1)
        beat(step, "save")
        (folder / f"saved-{rank}").write_text(str(step))


if __name__ == "__main__":
    main()
