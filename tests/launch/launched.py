"""A launcher in a process of its own, with workers of a few lines that know no MindSpore and no scheduler.

Its supervisor's clock stands until a test moves it: a limit passes when the test says so, however busy the machine is.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import ms_diffsynth

MARK = "LAUNCH_TEST"  # a variable that every process of a job inherits
HANGING = 600.0  # real seconds after which a test is taken to hang
START = """
import json, sys, types
from pathlib import Path
sys.modules["huggingface_hub"] = types.SimpleNamespace(constants=types.SimpleNamespace(HF_TOKEN_PATH=""))
from ms_diffsynth.launch import supervise
from ms_diffsynth.launch.job import Job
given, limits = map(json.loads, sys.argv[1:])
supervise.time = types.SimpleNamespace(monotonic=lambda: float(Path("clock").read_text()))
supervise.SUSPENDED_SECONDS, supervise.LOOK_SECONDS = float("inf"), 0.05
supervise.KILL_SECONDS = supervise.TERMINAL_SECONDS = 600.0
vars(supervise).update(limits)
sys.exit(supervise.launch(Job(**given | {"log_dir": Path(given["log_dir"])})))
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
def until_there_is(name):
    while not Path(name).exists():
        time.sleep(0.01)
"""


def state(pid: int) -> str:
    """R, S (asleep), T (stopped), Z (ended) ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def processes(mark: str) -> dict[int, dict[str, str]]:
    """The processes with that mark that are alive, by number, with their variables."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            data = (folder / "environ").read_bytes() if folder.name.isdigit() else b""
            variables = dict(pair.partition("=")[::2] for pair in data.decode(errors="replace").split("\0"))
            if variables.get(MARK) == mark and state(int(folder.name)) != "Z":
                found[int(folder.name)] = variables
        except OSError:  # it ended this moment
            continue
    return found


def until(condition):
    """Wait for something, and return it."""
    end = time.monotonic() + HANGING
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


class Launched:
    """A launcher that runs."""

    until = staticmethod(until)

    def __init__(self, worker, workers=2, limits=None, stdout=None, **settings):
        self.folder, self.mark, self.now = Path.cwd(), str(uuid.uuid4()), 0.0
        self.logs = self.folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self.pass_time(0)
        job = {"command": [sys.executable, "-c", WORKER + worker], "workers": workers, "log_dir": str(self.logs),
               "master_address": "127.0.0.1", "master_port": 20000, "scheduler": ["true"]} | settings
        path = [str(Path(ms_diffsynth.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with open("out", "wb") as out, open("err", "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, json.dumps(job), json.dumps(limits or {})], stdout=stdout or out,
                stderr=err, start_new_session=True,
                env=os.environ | {MARK: self.mark, "PYTHONPATH": os.pathsep.join(path)})

    def pass_time(self, seconds=1000.0):
        """Move the supervisor's clock."""
        self.now += seconds
        Path("clock.new").write_text(str(self.now))
        os.replace("clock.new", "clock")

    def pid(self, who):
        """The number of rank K, or of the supervisor; None when it has ended."""
        for pid, variables in processes(self.mark).items():
            is_worker = variables.get("MS_ROLE") == "MS_WORKER" and f"rank {variables['RANK_ID']}" == who
            if is_worker or (who == "supervisor" and "MS_ROLE" not in variables and pid != self.process.pid):
                return pid
        return None

    def begun(self, word="step"):
        """Wait until all ranks have beaten, and are asleep."""
        for rank in (0, 1):
            beat = self.logs / f"worker-{rank}.beat"
            until(lambda beat=beat: beat.is_file() and word.encode() in beat.read_bytes())
            until(lambda rank=rank: (pid := self.pid(f"rank {rank}")) is None or state(pid) == "S")

    def end(self, is_passing=False):
        """Wait until nothing is left, while time passes for the supervisor or stands.

        Returns: exit code, stdout, stderr.
        """
        def is_gone():
            if is_passing:
                self.pass_time()
            return self.process.poll() is not None and not processes(self.mark)

        until(is_gone)
        return self.process.returncode, Path("out").read_text(), Path("err").read_text()

    def saved(self):
        return sorted(p.name for p in self.folder.glob("saved-*"))
