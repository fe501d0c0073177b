"""A launcher in a process of its own, with workers of a few lines that know no MindSpore and no scheduler."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import ms_diffsynth

MARK = "LAUNCH_TEST"  # a variable that every process of a job inherits
START = """
import json, sys, types
from pathlib import Path
sys.modules["huggingface_hub"] = types.SimpleNamespace(get_token=lambda: None)  # takes 0.4 s to import
from ms_diffsynth.launch import diagnosis, pulse, supervise
from ms_diffsynth.launch.front import launch
from ms_diffsynth.launch.job import Job
given = json.loads(sys.argv[1])
diagnosis.STOPPED_SECONDS = supervise._FAILED_SECONDS = 1.0
supervise._SCREEN_SECONDS, supervise._LOOK_SECONDS, supervise._SUSPENDED_SECONDS, pulse.SLACK = 2.0, 0.1, 0.5, 3.0
sys.exit(launch(Job(**given | {"log_dir": Path(given["log_dir"])})))
"""
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from ms_diffsynth.launch.worker import beat
rank = int(os.environ["RANK_ID"])
def save_on_sigterm(code=143, seconds=0):
    def save(*_):
        time.sleep(seconds)
        Path(f"saved-{rank}").touch()
        sys.exit(code)
    signal.signal(signal.SIGTERM, save)
"""


def processes(mark: str) -> dict[int, dict[str, str]]:
    """The processes with that mark that are alive, by number, with their variables."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            data = (folder / "environ").read_bytes() if folder.name.isdigit() else b""
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0] if data else "Z"
        except OSError:  # it ended this moment
            continue
        variables = dict(pair.partition("=")[::2] for pair in data.decode(errors="replace").split("\0"))
        if variables.get(MARK) == mark and state != "Z":
            found[int(folder.name)] = variables
    return found


def until(condition, seconds=8.0):
    """Wait for something; fail when it does not come."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


class Launched:
    """A launcher that runs."""

    until = staticmethod(until)

    def __init__(self, worker, workers=2, streams=None, **settings):
        self.folder, self.mark = Path.cwd(), str(uuid.uuid4())
        self.logs = self.folder / "logs"
        self.logs.mkdir(exist_ok=True)
        job = {"command": [sys.executable, "-c", WORKER + worker], "workers": workers, "log_dir": str(self.logs),
               "master_address": "127.0.0.1", "master_port": 20000, "scheduler": ["true"]} | settings
        path = [str(Path(ms_diffsynth.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(job)], text=True, start_new_session=True,
            env=os.environ | {MARK: self.mark, "PYTHONPATH": os.pathsep.join(path)},
            **streams or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE})

    def pid(self, who):
        """The number of rank K, or of the supervisor."""
        for pid, variables in processes(self.mark).items():
            is_worker = variables.get("MS_ROLE") == "MS_WORKER" and f"rank {variables['RANK_ID']}" == who
            if is_worker or (who == "supervisor" and "MS_ROLE" not in variables and pid != self.process.pid):
                return pid
        return None

    def begun(self, *ranks):
        """Wait until ranks have beaten."""
        for rank in ranks or (0, 1):
            until(lambda rank=rank: (self.logs / f"worker-{rank}.beat").is_file()
                  and b"step" in (self.logs / f"worker-{rank}.beat").read_bytes())

    def end(self, seconds=9.0):
        """Wait for the end. Returns: exit code, what was printed, what was complained of. Nothing may be left."""
        out, err = self.process.communicate(timeout=seconds)
        until(lambda: not processes(self.mark), 2)
        return self.process.returncode, out, err

    def saved(self):
        return sorted(p.name for p in self.folder.glob("saved-*"))


@pytest.fixture
def launch(request):
    """``launch(code of a worker, setting=value ...)``"""
    started = []

    def start(*words, **settings):
        started.append(Launched(*words, **settings))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        for pid in processes(launched.mark):
            os.kill(pid, 9)
