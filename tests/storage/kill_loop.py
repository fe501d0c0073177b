"""Kill a process that saves without end, many times: kill_loop.py FOLDER COUNT SECONDS. Prints what was found as JSON.

SECONDS is the longest a process saves. It is forked, because Python takes longer to start than a save takes.
"""
from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from ms_diffsynth.errors import CheckpointError
from ms_diffsynth.storage.checkpoint import latest, open_checkpoint_folder, remove_old_checkpoints, save_checkpoint
from ms_diffsynth.storage.lock import lock_folder


def groups_of(step: int) -> dict[str, dict[str, np.ndarray]]:
    """60 kB, told apart by the step."""
    return {"weights": {"w": np.full(5_000, step, np.float32)}, "moments": {"m": np.full((2, 5_000), step, np.float32)}}


def save_without_end(root: Path, pipe: int) -> None:
    """Save, say so, remove old ones; go on from what is there."""
    with lock_folder(root):
        found = latest(root)
        step = found.step if found else 0
        os.write(pipe, step.to_bytes(8, "little"))  # now it begins
        while True:
            step += 1
            saved = save_checkpoint(root, step, groups_of(step), {"step": step})
            os.write(pipe, step.to_bytes(8, "little"))
            remove_old_checkpoints(saved)


def is_sound(path: Path) -> bool:
    """Whether the checkpoint opens, and holds what was saved."""
    try:
        found = open_checkpoint_folder(path)
    except CheckpointError:
        return False
    return all(found.read(group).keys() == arrays.keys()
               and all(np.array_equal(found.read(group)[n], a) for n, a in arrays.items())
               for group, arrays in groups_of(found.step).items())


def trial(root: Path, seconds: float, count: dict[str, int]) -> int:
    """One process, killed while it saves or removes. Returns: the latest step that is found then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_without_end(root, writing)
        finally:
            os._exit(1)
    os.close(writing)
    acknowledged = os.read(reading, 8)
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        acknowledged = int.from_bytes((acknowledged + pipe.read())[-8:], "little")
    names = [path.name for path in root.iterdir()]
    count["killed"] += status == signal.SIGKILL
    count["while_saving"] += any(name.startswith(".tmp") for name in names)
    count["while_removing"] += any(name.startswith(".trash") for name in names)
    with lock_folder(root):
        found = latest(root)
        count["leftovers"] += sum(path.name.startswith(".") and path.name != ".lock" for path in root.iterdir())
    step = found.step if found else 0
    count["lost"] += step < acknowledged
    folders = [path for path in root.iterdir() if path.name.startswith("step-")]
    count["damaged"] += sum(not is_sound(path) for path in folders)
    count["fewer_than_two"] += len(folders) < min(2, step)
    return step


def main() -> None:
    """See above."""
    random.seed(0)
    count = dict.fromkeys(["killed", "while_saving", "while_removing", "leftovers", "lost", "damaged",
                           "fewer_than_two"], 0)
    for _ in range(int(sys.argv[2])):
        step = trial(Path(sys.argv[1]) / "out", float(sys.argv[3]), count)
    sys.stdout.write(json.dumps(count | {"saved": step}))


if __name__ == "__main__":
    main()
