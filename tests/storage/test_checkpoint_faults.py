"""Nothing saved is lost: a save is interrupted at every call, killed at random, and loses the power at every moment."""
from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from faults import FaultyCalls, Killed
from power_loss import Folder, ModelCalls, build
from processes import run_python

from ms_diffsynth.errors import OutputError
from ms_diffsynth.storage.checkpoint import latest, remove_old_checkpoints, save_checkpoint
from ms_diffsynth.storage.files import CALLS, Calls
from ms_diffsynth.storage.lock import lock_folder

pytestmark = pytest.mark.fault


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a thing: these tests write a hundred thousand small files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def save(root: Path, step: int, number: int, calls: Calls = CALLS, groups: Sequence[str] = ("weights", "ema")) -> Path:
    """The ``number``-th save, at ``step``: everything in it tells its number."""
    arrays = {"a": np.full(3, number, np.float32), "b": np.full((2, 2), number, np.float64)}
    return save_checkpoint(root, step, dict.fromkeys(groups, arrays), {"number": number}, calls=calls)


def restart(root: Path) -> int:
    """The number of the save that a new run goes on from, 0 for none; all of it must be of that save."""
    with lock_folder(root):
        found = latest(root)
    if found is None:
        return 0
    number = found.state["number"]
    arrays = [array for group in found.groups for array in found.read(group).values()]
    assert all((array == number).all() for array in arrays), f"step {found.step} mixes saves: {arrays}"
    return number


# -- every call --------------------------------------------------------------------------------------------------


def first(root: Path, calls: Calls, done: Callable[[int], None]) -> None:
    """The first save there is, in a folder that is not there."""
    save(root, 1, 1, calls)
    done(1)


def following(root: Path, calls: Calls, done: Callable[[int], None]) -> None:
    """A save when there are two, and the removal of the older."""
    saved = save(root, 3, 3, calls)
    done(3)
    remove_old_checkpoints(saved, calls=calls)


def again(root: Path, calls: Calls, done: Callable[[int], None]) -> None:
    """A save of a step that is there."""
    save(root, 2, 3, calls)
    done(3)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "kill", "short"])
@pytest.mark.parametrize("action, has_exchange", [(first, True), (following, True), (again, True), (again, False)])
def test_no_interrupted_call_loses_a_checkpoint(memory, action, has_exchange, fault):
    before = 0 if action is first else 2
    after = 1 if action is first else 3
    for number in range(1, before + 1):
        save(memory / "before", number, number)
    probe = FaultyCalls(has_exchange=has_exchange)
    if before:
        shutil.copytree(memory / "before", memory / "probe")
    action(memory / "probe", probe, lambda number: None)
    assert len(probe.made) > 40, f"only {len(probe.made)} calls: {probe.made}"
    wrong = []
    for at in range(len(probe.made)):
        root, sure = memory / f"{at}", [before]
        if before:
            shutil.copytree(memory / "before", root)
        try:
            action(root, FaultyCalls(at, fault, has_exchange=has_exchange), sure.append)
            is_reported = False
        except (OutputError, Killed):
            is_reported = True
        found = restart(root)
        names = [path.name for path in root.iterdir()]
        hidden = [name for name in names if name.startswith(".") and name != ".lock"]
        if not sure[-1] <= found <= after or found not in (before, after):
            wrong.append(f"{probe.made[at]} (call {at}): save {sure[-1]} was sure, {found} is found in {names}")
        if hidden or len(names) - 1 < min(2, found):
            wrong.append(f"{probe.made[at]} (call {at}): {names} is left")
        if (sure[-1] != after and not is_reported) or (fault == "short" and sure[-1] != after):
            wrong.append(f"{probe.made[at]} (call {at}): not reported, or no reason to fail")
        shutil.rmtree(root)
    assert not wrong, f"{len(wrong)} of {len(probe.made)} interruptions: {wrong[:5]}"


# -- random kills ------------------------------------------------------------------------------------------------


def test_200_kills_while_saving_lose_nothing(memory):
    script = Path(__file__).with_name("kill_loop.py")
    result = run_python(script, memory, "200", "0.01", timeout=None)
    assert result.returncode == 0, result.stderr[-2000:]
    count = json.loads(result.stdout)
    assert {name: count[name] for name in ("killed", "lost", "damaged", "fewer_than_two", "leftovers")} == {
        "killed": 200, "lost": 0, "damaged": 0, "fewer_than_two": 0, "leftovers": 0}, count
    assert count["while_saving"] >= 10 and count["while_removing"] >= 1 and count["saved"] >= 20, count


# -- loss of power -----------------------------------------------------------------------------------------------


class Watch:
    """Restarts from everything that may be on the disk after a loss of power, after each call of a few saves."""

    def __init__(self, memory: Path, forgets: Callable[[Path], bool] = lambda path: False):
        self.work = memory / "work"
        self.sure = self.promised = self.moments = 0
        self.seen: set = set()
        self.lost: list[str] = []
        (memory / "disk").mkdir()
        self.calls = ModelCalls(memory / "disk", self.look, forgets)

    def look(self, top: Folder) -> None:
        """Restart from each state not seen before."""
        self.moments += 1
        for view in top.views():
            if (self.sure, view) in self.seen:
                continue
            self.seen.add((self.sure, view))
            build(view, self.work)
            found = restart(self.work / "out")
            left = [path.name for path in (self.work / "out").iterdir() if path.name.startswith("step-")]
            if not self.sure <= found <= self.promised or len(left) < min(2, self.sure):
                self.lost.append(f"after {self.moments} calls save {self.sure} was sure, {found} is found in {left}")
                raise Killed  # one is enough
            shutil.rmtree(self.work)

    def run(self) -> Watch:
        """Three saves, a removal of the oldest, the last step again and again; stops at the first loss."""
        try:
            for number, step in enumerate((1, 2, 3, 3, 3), start=1):
                self.promised = number
                self.calls.has_exchange = number < 5
                saved = save(self.calls.disk / "out", step, number, self.calls, groups=["weights"])
                self.sure = number
                self.look(self.calls.top)
                remove_old_checkpoints(saved, calls=self.calls)
        except Killed:
            pass
        return self


def test_no_loss_of_power_loses_a_checkpoint(memory):
    watch = Watch(memory).run()
    states = f"{len(watch.seen)} states after {watch.moments} calls"
    assert not watch.lost, f"{states}: {watch.lost}"
    assert watch.sure == 5 and len(watch.seen) > 800, states


@pytest.mark.parametrize("forgotten", ["the files", "the stage", "the root", "the folder of a new root"])
def test_a_missing_fsync_is_noticed(memory, forgotten):
    """The model must be able to find a loss: without any one of the fsyncs there is one."""
    kind = {0: "the folder of a new root", 1: "the root", 2: "the stage", 3: "the files"}
    watch = Watch(memory, forgets=lambda path: kind[len(path.parts)] == forgotten).run()
    assert len(watch.lost) == 1, f"without the fsync of {forgotten} no loss in {len(watch.seen)} states"
