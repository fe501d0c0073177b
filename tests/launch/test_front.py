"""Signals to the launcher: workers save, nothing is left, the exit code says which signal."""
from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from launched import state

pytestmark = pytest.mark.fault

SAVES = "save_on_sigterm()\nbeat(1)\ntime.sleep(3600)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nbeat(1)\ntime.sleep(3600)"


def last_line(text):
    return text.rstrip("\n").splitlines()[-1]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_ends(launch, number, code):
    job = launch(SAVES)
    job.begun()
    job.process.send_signal(number)
    found, _, err = job.end()
    assert found == code and job.saved() == ["saved-0", "saved-1"]
    assert last_line(err) == f"stopped by {number.name}: all workers have ended"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_killed_launcher_saves_too(launch, number):
    job = launch(SAVES)
    job.begun()
    job.process.send_signal(number)
    assert job.end()[0] == -number and job.saved() == ["saved-0", "saved-1"]


def test_a_killed_launcher_whose_workers_are_deaf_or_stopped(launch):
    job = launch(DEAF)
    job.begun()
    os.kill(job.pid("rank 1"), signal.SIGSTOP)
    job.process.kill()
    assert job.end(is_passing=True)[0] == -signal.SIGKILL


def test_a_killed_supervisor_takes_all_with_it(launch):
    job = launch(DEAF)
    job.begun()
    os.kill(job.pid("supervisor"), signal.SIGKILL)
    code, _, err = job.end()
    assert code == 75 and "the launcher's supervisor was killed by SIGKILL" in last_line(err)


def test_both_killed(launch):
    job = launch(DEAF)
    job.begun()
    supervisor = job.pid("supervisor")
    job.process.kill()
    os.kill(supervisor, signal.SIGKILL)
    job.end()


def test_who_has_not_ended_after_the_grace_period_is_killed(launch):
    job = launch("save_on_sigterm()\nif rank: signal.signal(signal.SIGTERM, signal.SIG_IGN)\nbeat(1)\n"
                 "time.sleep(3600)", grace_seconds=7)
    job.begun()
    job.process.terminate()
    job.until(lambda: job.pid("rank 0") is None)
    code, _, err = job.end(is_passing=True)
    assert code == 75 and job.saved() == ["saved-0"]
    assert last_line(err).startswith("rank 1 had not ended 7 s after SIGTERM") and "--grace_seconds" in err


def test_a_second_signal_kills(launch):
    job = launch(DEAF, grace_seconds=1e9)
    job.begun()
    job.process.terminate()
    job.until(lambda: "SIGTERM" in Path("err").read_text())
    supervisor = job.pid("supervisor")

    def interrupted():  # the first ones may be taken for the first signal, on another way
        job.pass_time(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGINT)
        return job.process.poll() is not None

    job.until(interrupted)
    code, _, err = job.end()
    assert code == 130 and last_line(err) == "SIGINT again: rank 0, rank 1 killed"


def test_one_signal_on_two_ways_is_one(launch):
    """As from systemd, which sends SIGTERM to every process of a service."""
    job = launch(SAVES.replace("()", "(seconds=rank * 1.5)", 1))
    job.begun()
    pids = [job.pid(who) for who in ("rank 0", "rank 1", "supervisor")]
    for pid in (*pids, job.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert job.end()[0] == 143 and job.saved() == ["saved-0", "saved-1"]


def test_a_save_that_fails_is_told(launch):
    job = launch(SAVES.replace("()", "(code=74 if rank else 143)", 1))
    job.begun()
    job.process.terminate()
    code, _, err = job.end()
    assert code == 74 and last_line(err) == ("rank 1 failed with exit code 74 in phase 'step' of step 1 "
                                             f"(log: {job.logs}/worker-1.log)")


def test_a_signal_before_the_workers_know_it(launch):
    job = launch("time.sleep(3600)")
    job.until(lambda: job.pid("rank 1"))
    job.process.terminate()
    assert job.end()[0] == 143


def test_ctrl_c_and_ctrl_z_reach_the_supervisor_through_its_parent_only(launch):
    job = launch(SAVES)
    job.begun()
    os.killpg(job.process.pid, signal.SIGSTOP)
    job.until(lambda: state(job.process.pid) == "T")
    assert state(job.pid("supervisor")) != "T"
    os.killpg(job.process.pid, signal.SIGCONT)
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end()[0] == 130 and job.saved() == ["saved-0", "saved-1"]


def test_nohup(launch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = launch("beat(1)\nuntil_there_is('an end')")
    finally:
        signal.signal(signal.SIGHUP, before)
    job.begun()
    job.process.send_signal(signal.SIGHUP)
    os.kill(job.pid("supervisor"), signal.SIGHUP)
    Path("an end").touch()
    assert job.end()[0] == 0
