"""One process: it ends with its parent, its number stays its own, its children go with it."""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from launched import HANGING, until
from processes import run_python

from ms_diffsynth.launch.process import Process


@pytest.fixture
def start(tmp_path):
    started = []

    def call(code):
        started.append(Process("rank 0", (sys.executable, "-c", code), dict(os.environ), tmp_path / "log"))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.reap(HANGING)


def ended(process):
    until(lambda: process.code is not None)
    return process.code


@pytest.mark.parametrize("code, expected", [("pass", 0), ("raise SystemExit(7)", 7),
                                            ("import os; os.kill(os.getpid(), 9)", -9)])
def test_how_it_ended(start, code, expected):
    process = start(code)
    assert ended(process) == expected
    assert Path(f"/proc/{process.pid}").exists(), "its number is kept"
    process.kill()
    assert process.reap(HANGING) and process.code == expected
    process.kill()  # no process is meant any more


def test_it_leads_a_session_of_its_own(start):
    assert ended(start("import os; raise SystemExit(os.getsid(0) != os.getpid())")) == 0


def test_a_parent_that_has_ended_before_it_could_be_told():
    code = ("import os, signal, time\nfrom ms_diffsynth.launch.process import end_with_parent\n"
            "end_with_parent(os.getppid() + 1, signal.SIGKILL)\ntime.sleep(3600)")
    done = run_python("-c", code, timeout=HANGING)
    assert done.returncode == -signal.SIGKILL


def test_stopped_and_asked(start):
    process = start("import time; print(1, flush=True); time.sleep(3600)")
    until(lambda: process.log.read_text().endswith("1\n"))
    assert not process.is_stopped
    os.kill(process.pid, signal.SIGSTOP)
    until(lambda: process.is_stopped)
    process.ask_to_end()
    assert ended(process) == -signal.SIGTERM


def test_aborted_without_a_core(start, tmp_path):
    process = start("import resource, time; resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit("
                    "resource.RLIMIT_CORE)[1],) * 2); print(1, flush=True); time.sleep(3600)")
    until(lambda: process.log.read_text().endswith("1\n"))
    process.abort()
    assert ended(process) == -signal.SIGABRT and [p.name for p in tmp_path.iterdir()] == ["log"]
