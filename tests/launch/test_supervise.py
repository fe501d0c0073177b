"""One dead, stopped or hung worker ends the job, and the last line says which and why."""
from __future__ import annotations

import os
import re
import signal
import time

import pytest

WAIT = "\nbeat(3)\ntime.sleep(60)\n"


def last_line(err):
    return err.rstrip("\n").splitlines()[-1]


def test_a_job_that_ends_well(launch):
    job = launch("print('rank', rank)\nprint('no error', file=sys.stderr)")
    code, out, err = job.end()
    assert code == 0 and out == "rank 0\n" and err.endswith("\nno error\n")
    assert re.fullmatch(r"2 of 2 workers here, scheduler at 127.0.0.1:20000; logs: .*/logs/worker-K.log",
                        err.splitlines()[0])
    for rank in (0, 1):
        assert (job.logs / f"worker-{rank}.log").read_text().endswith(f" rank {rank}\nrank {rank}\nno error\n")


def test_logs_of_an_earlier_job_are_kept_and_not_read(launch):
    launch("if rank: raise KeyError('first')" + WAIT).end()
    job = launch("sys.exit(rank)")
    assert last_line(job.end()[2]) == f"rank 1 failed with exit code 1 (log: {job.logs}/worker-1.log)"
    assert "KeyError: 'first'" in (job.logs / "worker-1.log").read_text()


@pytest.mark.fault
@pytest.mark.parametrize("what, code, line", [
    ("raise ValueError('boom')", 1, "rank 1 failed with exit code 1 in phase 'step' of step 2: ValueError: boom "
                                    "(log: {log})"),
    ("sys.exit('DataError: row 3: no prompt')", 1, "rank 1 failed with exit code 1 in phase 'step' of step 2: "
                                                   "DataError: row 3: no prompt (log: {log})"),
    ("sys.exit(78)", 78, "rank 1 failed with exit code 78 in phase 'step' of step 2 (log: {log})"),
    ("os.kill(os.getpid(), 9)", 75, "rank 1 was killed by SIGKILL in phase 'step' of step 2 (by somebody, or by the "
                                   "system because memory ran out) (log: {log})"),
    ("os.abort()", 75, "rank 1 was killed by SIGABRT in phase 'step' of step 2: Fatal Python error: Aborted "
                      "(log: {log})"),
    ("import ctypes; ctypes.string_at(0)", 75, "rank 1 was killed by SIGSEGV in phase 'step' of step 2: Fatal Python "
                                              "error: Segmentation fault (log: {log})"),
    ("raise ValueError('hf_0123456789abcdefghij')", 1, "rank 1 failed with exit code 1 in phase 'step' of step 2: "
                                                       "ValueError: [redacted] (log: {log})"),
], ids=["raises", "exits with a message", "exits", "killed", "aborts", "segfault", "token"])
def test_a_dead_worker_ends_the_job(launch, what, code, line):
    job = launch(f"beat(2)\nif rank:\n    {what}" + WAIT)
    began = time.monotonic()
    found, _, err = job.end()
    assert found == code and last_line(err) == line.format(log=job.logs / "worker-1.log")
    assert time.monotonic() - began < 5


@pytest.mark.fault
def test_the_others_may_save_when_one_is_dead(launch):
    job = launch("save_on_sigterm()\ntime.sleep(0.5)\nif rank: os.kill(os.getpid(), 9)" + WAIT)
    assert job.end()[0] == 75 and job.saved() == ["saved-0"]


@pytest.mark.fault
def test_who_ignores_sigterm_is_killed(launch):
    job = launch("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(0.5)\nif rank: sys.exit(5)" + WAIT)
    began = time.monotonic()
    assert job.end()[0] == 5 and time.monotonic() - began < 5


@pytest.mark.fault
@pytest.mark.parametrize("ending, code", [("sys.exit(0)", 0), ("sys.exit(rank)", 1), ("os.kill(os.getpid(), 9)", 75)])
def test_what_a_worker_leaves_behind_is_killed(launch, ending, code):
    job = launch(f"subprocess.Popen(['sleep', '60'])\ntime.sleep(0.5)\n{ending}")
    assert job.end()[0] == code


@pytest.mark.fault
def test_a_stopped_worker_ends_the_job(launch):
    job = launch("save_on_sigterm()\nbeat(2)\ntime.sleep(0.5)\nif rank: os.kill(os.getpid(), signal.SIGSTOP)" + WAIT)
    code, _, err = job.end()
    assert code == 75 and last_line(err) == ("rank 1 was stopped by a signal for 1 s in phase 'step' of step 2 "
                                             f"(log: {job.logs}/worker-1.log)")
    assert job.saved() == ["saved-0", "saved-1"], "it was woken to obey"


@pytest.mark.fault
def test_a_worker_that_is_stopped_for_a_moment_goes_on(launch):
    job = launch("beat(2)\ntime.sleep(1)")
    job.begun()
    pid = job.pid("rank 1")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(pid, signal.SIGCONT)
    assert job.end()[0] == 0


@pytest.mark.fault
def test_a_scheduler_that_fails_ends_the_job(launch):
    job = launch(WAIT, scheduler=["sh", "-c", "echo 'OSError: Address in use' >&2; exit 3"])
    code, _, err = job.end()
    assert code == 3 and last_line(err) == (f"the scheduler failed with exit code 3: OSError: Address in use "
                                            f"(log: {job.logs}/scheduler.log)")


@pytest.mark.fault
def test_a_scheduler_that_stays_is_ended(launch):
    assert launch("pass", scheduler=["sleep", "60"]).end()[0] == 0


@pytest.mark.fault
def test_a_hung_collective_ends_the_job_with_every_stack(launch, tmp_path):
    (tmp_path / "mindspore").mkdir()
    (tmp_path / "mindspore/__init__.py").touch()
    (tmp_path / "mindspore/collective.py").write_text("import time\ndef wait():\n    time.sleep(60)\n")
    job = launch("sys.path.insert(0, '')\nimport mindspore.collective\ndef read():\n    time.sleep(60)\n"
                 "for step in range(4): beat(step); time.sleep(0.3)\n"
                 "beat(4)\nread() if rank else mindspore.collective.wait()\n", hang_seconds=2)
    code, out, err = job.end(15)
    assert code == 75
    assert re.fullmatch(
        r"rank 1 hung: nothing begun for \d s in phase 'step' of step 4, <string>:\d+ in read; rank 0 in phase 'step' "
        rf"of step 4, collective.py:3 in wait; every thread's stack is in the logs \(log: {job.logs}/worker-1.log\)",
        last_line(err))
    assert "Current thread" not in out + err, "stacks are for the logs"
    for rank in (0, 1):
        assert "(most recent call first)" in (job.logs / f"worker-{rank}.log").read_text()


@pytest.mark.fault
def test_other_phases_have_a_limit_of_their_own(launch):
    job = launch("beat(0, 'compile')\ntime.sleep(60)", hang_seconds=60, compile_seconds=1)
    assert job.end()[0] == 75


def test_a_machine_that_sleeps_is_no_machine_that_hangs(launch):
    job = launch("for step in range(12): beat(step); time.sleep(0.2)", hang_seconds=2)
    job.begun()
    time.sleep(0.7)
    everybody = [job.pid(who) for who in ("rank 0", "rank 1", "supervisor")]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in reversed(everybody):  # the supervisor first: it sees heartbeats of three seconds ago
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.2)
    assert job.end()[0] == 0


def test_no_heartbeat_no_judgement(launch):
    assert launch("time.sleep(1)", hang_seconds=0.2, compile_seconds=0.2).end()[0] == 0
