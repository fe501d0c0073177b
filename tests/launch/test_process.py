"""One process: it ends with its parent, its number stays its own, its children go with it."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ms_diffsynth
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
        process.reap(5)


def ended(process):
    until = time.monotonic() + 10
    while process.code is None and time.monotonic() < until:
        time.sleep(0.01)
    return process.code


@pytest.mark.parametrize("code, expected", [("pass", 0), ("raise SystemExit(7)", 7),
                                            ("import os; os.kill(os.getpid(), 9)", -9)])
def test_how_it_ended(start, code, expected):
    process = start(code)
    assert ended(process) == expected
    assert Path(f"/proc/{process.pid}").exists(), "its number is kept"
    process.kill()
    assert process.reap(1) and process.code == expected
    process.kill()  # nobody is meant any more


def test_it_leads_a_session_of_its_own(start):
    process = start("import os; raise SystemExit(os.getsid(0) != os.getpid())")
    assert ended(process) == 0


def test_a_parent_that_has_ended_before_it_could_be_told():
    code = ("import os, signal, time\nfrom ms_diffsynth.launch.process import end_with_parent\n"
            "end_with_parent(os.getppid() + 1, signal.SIGKILL)\ntime.sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=20,
                          env=os.environ | {"PYTHONPATH": str(Path(ms_diffsynth.__file__).parents[1])})
    assert done.returncode == -signal.SIGKILL


def test_stopped_and_asked(start):
    process = start("import time; print(1, flush=True); time.sleep(60)")
    while not process.log.read_text().endswith("1\n"):
        time.sleep(0.01)
    assert not process.is_stopped
    os.kill(process.pid, signal.SIGSTOP)
    while not process.is_stopped:
        time.sleep(0.01)
    process.ask_to_end()
    assert ended(process) == -signal.SIGTERM


def test_aborted_without_a_core(start, tmp_path):
    process = start("import resource, time; resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit("
                    "resource.RLIMIT_CORE)[1],) * 2); print(1, flush=True); time.sleep(60)")
    while not process.log.read_text().endswith("1\n"):
        time.sleep(0.01)
    process.abort()
    assert ended(process) == -signal.SIGABRT and [p.name for p in tmp_path.iterdir()] == ["log"]
