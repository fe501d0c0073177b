"""Which process is to blame, decided on processes that are only said to run; the last exception of a log."""
from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from ms_diffsynth.launch.diagnosis import Diagnosis, Pulse, last_exception, last_place
from ms_diffsynth.launch.job import Job


@dataclass(eq=False)
class Said:
    """What `Process` says about a process."""

    name: str
    log: Path
    code: int | None = None
    is_stopped: bool = False
    log_begin: int = 0


class Scene:
    """Two workers and a scheduler, at a time that the test sets."""

    def __init__(self, folder):
        job = Job(command=("x",), workers=2, log_dir=folder, master_address="127.0.0.1", master_port=1, hang_seconds=20,
                  compile_seconds=100)
        self.workers = [Said(f"rank {k}", folder / f"worker-{k}.log") for k in job.ranks]
        self.scheduler = Said("the scheduler", folder / "scheduler.log")
        for said in (*self.workers, self.scheduler):
            said.log.write_text("")
        self.pulses = [Pulse(job.heartbeat(rank)) for rank in job.ranks]
        self.diagnosis = Diagnosis(job, self.workers, self.pulses, self.scheduler)

    def beat(self, now, rank, step, phase="step", steps=1):
        self.pulses[rank].path.write_text(f'{{"step": {step}, "phase": "{phase}", "steps": {steps}}}'.ljust(128))
        self.pulses[rank].look(now)

    def run(self, last, seconds=1.0):
        """Steps 0 to ``last`` of ``seconds`` each; returns when the last one begins."""
        for step in range(last + 1):
            for rank in (0, 1):
                self.beat(step * seconds, rank, step)
        return last * seconds

    def line(self, now):
        outcome = self.diagnosis.find_failed(now) or self.diagnosis.find_hung(now)
        return outcome and (outcome.code, outcome.line())


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_two_steps_that_last(scene):
    now = scene.run(3)
    assert scene.line(now + 19.9) is None
    code, line = scene.line(now + 20.1)
    assert code == 75 and line.startswith("rank 0 hung: nothing begun for 20 s in phase 'step' of step 3, at an "
                                          "unknown place; rank 1 in phase 'step' of step 3, at an unknown place")


def test_who_is_a_step_behind_is_waited_for(scene):
    scene.beat(scene.run(3) + 1, 0, 4)
    assert scene.line(30)[1].startswith("rank 1 hung: nothing begun for 27 s in phase 'step' of step 3")


def test_who_is_in_no_collective_is_waited_for(scene):
    scene.run(3)
    dump = 'Current thread 0x1 (most recent call first):\n  File "{}", line 7 in {}\n'
    scene.workers[0].log.write_text(dump.format("/lib/mindspore/common/tensor.py", "asnumpy"))
    scene.workers[1].log.write_text(dump.format("/data/data.py", "read"))
    assert scene.line(30)[1].startswith("rank 1 hung: nothing begun for 27 s in phase 'step' of step 3, data.py:7 in "
                                        "read; rank 0 in phase 'step' of step 3, tensor.py:7 in asnumpy; ")


def test_who_ended_too_early_is_waited_for(scene):
    scene.run(3)
    scene.workers[1].code = 0
    assert scene.line(22) is None
    assert scene.line(24) == (70, "rank 1 ended too early, with exit code 0 in phase 'step' of step 3; the others "
                                 f"waited 21 s for it (log: {scene.workers[1].log})")


def test_who_saves_excuses_the_others(scene):
    now = scene.run(3)
    scene.beat(now, 0, 3, "save")
    assert scene.line(now + 99) is None
    assert scene.line(now + 101)[1].startswith("rank 0 hung: nothing begun for 101 s in phase 'save' of step 3")


def test_who_ended_before_a_long_save_is_no_reason(scene):
    now = scene.run(3)
    scene.workers[1].code = 0
    scene.beat(now, 0, 3, "save")
    assert scene.line(now + 99) is None


def test_long_steps_may_be_five_times_as_long(scene):
    now = scene.run(3, seconds=10)
    assert scene.line(now + 49) is None and scene.line(now + 51)[0] == 75


def test_the_first_step_may_last_like_a_compilation(scene):
    now = scene.run(0)
    assert scene.line(now + 99) is None and scene.line(now + 101)[0] == 75


def test_how_long_the_first_step_was_does_not_count(scene):
    for rank in (0, 1):
        scene.beat(0, rank, 0)
        scene.beat(90, rank, 1)
        scene.beat(91, rank, 2)
    assert scene.line(91 + 19) is None and scene.line(91 + 21)[0] == 75


def test_steps_that_were_over_before_the_first_look(scene):
    for rank in (0, 1):
        scene.beat(0, rank, 5, steps=5)
    assert scene.line(19) is None and scene.line(21)[0] == 75


def test_a_rank_without_heartbeat_is_no_excuse_and_not_to_blame(scene):
    for step in range(3):
        scene.beat(step, 0, step)
    assert scene.line(23)[1].startswith("rank 0 hung: ")


def test_programs_without_heartbeats_are_never_said_to_hang(scene):
    assert scene.line(1e6) is None


def test_of_several_dead_one_killed_by_a_signal_is_the_first(scene):
    scene.workers[0].code, scene.workers[1].code = 1, -signal.SIGSEGV
    scene.workers[1].log.write_text("Fatal Python error: Segmentation fault\n")
    assert scene.line(0) == (75, "rank 1 was killed by SIGSEGV: Fatal Python error: Segmentation fault "
                                f"(log: {scene.workers[1].log})")


def test_words_of_another_matter_are_not_those_of_sigkill(scene):
    scene.workers[1].code = -signal.SIGKILL
    scene.workers[1].log.write_text("OSError: no such file, never mind\n")
    assert "OSError" not in scene.line(0)[1]


def test_a_worker_before_the_scheduler(scene):
    scene.scheduler.code, scene.workers[1].code = 1, 3
    assert scene.line(0)[1].startswith("rank 1 failed with exit code 3")


@pytest.mark.fault
def test_stopped_for_five_seconds_on_end(scene):
    scene.workers[1].is_stopped = True
    assert scene.line(0) is None and scene.line(4.9) is None
    scene.workers[1].is_stopped = False
    assert scene.line(5.1) is None
    scene.workers[1].is_stopped = True
    assert scene.line(6) is None and scene.line(10.9) is None
    assert scene.line(11) == (75, f"rank 1 was stopped by a signal for 5 s (log: {scene.workers[1].log})")


# -- the last exception of a log, among all that MindSpore and the interpreter write around it -------------------------

TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 3, in <module>\n    f()\n{}\n'
MINDSPORE = "RuntimeError: Launch failed\n\n{0}\n- C++ Call Stack: (For framework developers)\n{0}\nop.cc:671 Run\n"


@pytest.mark.parametrize("text, expected", [
    ("", ""),
    ("step 1\nstep 2\n", ""),
    (TRACEBACK.format("ValueError: boom"), "ValueError: boom"),
    (TRACEBACK.format("KeyboardInterrupt"), "KeyboardInterrupt"),
    (TRACEBACK.format("mine.Strange: without a usual name"), "mine.Strange: without a usual name"),
    (TRACEBACK.format(MINDSPORE.format("-" * 50)) + "[INFO] DISTRIBUTED(1): over\n", "RuntimeError: Launch failed"),
    (TRACEBACK.format("KeyError: 1") + "\nDuring handling of the above exception, another exception occurred:\n\n"
     + TRACEBACK.format("ValueError: 2"), "ValueError: 2"),
    (TRACEBACK.format("KeyError: 1") + "going on\nCheckpointError: step-7 is damaged: say --resume none\n",
     "CheckpointError: step-7 is damaged: say --resume none"),
    ("Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File x\n", "Fatal Python error: Segmentation fault"),
    ("\r 10%|# | 1/10\rDataError: row 3\n", "DataError: row 3"),
    ("WARNING: an Error: of no kind\nerror: x\n", ""),
    (TRACEBACK.format("ValueError: " + "x" * 1000), "ValueError: " + "x" * 388 + " ..."),
])
def test_last_exception(tmp_path, text, expected):
    (tmp_path / "log").write_text("OSError: of an earlier job\n" + text)
    assert last_exception(tmp_path / "log", len("OSError: of an earlier job\n")) == expected


def test_a_large_log(tmp_path):
    (tmp_path / "log").write_text("KeyError: long ago\n" + "x" * 10**6 + "\n" + TRACEBACK.format("ValueError: boom"))
    assert last_exception(tmp_path / "log") == "ValueError: boom"
    (tmp_path / "log").write_bytes(b"\xff\xfe\n" + b"ValueError: \xff\n")
    assert last_exception(tmp_path / "log") == "ValueError: �"


def test_last_place(tmp_path):
    log = tmp_path / "log"
    log.write_text("nothing\n")
    assert last_place(log) is None
    log.write_text("Fatal Python error: Aborted\n\n"
                   'Thread 0x7f (most recent call first):\n  File "/a/x.py", line 1 in w\n\n'
                   'Current thread 0x7e (most recent call first):\n  File "/a/b.py", line 12 in wait\n'
                   '  File "/a/c.py", line 3 in main\n')
    assert str(last_place(log)) == "b.py:12 in wait" and last_place(log).file == "/a/b.py"
    log.write_text(log.read_text().replace("Current thread", "Thread"))  # when a thread of C++ took the signal
    assert str(last_place(log)) == "b.py:12 in wait"
