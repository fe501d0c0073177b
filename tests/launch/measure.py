"""How long until everything is gone, what is left, and what the last line says: the table in benchmarks/README.md.

    python tests/launch/measure.py [--patient] [CASE ...]

Most of the time of a case goes into importing MindSpore three times. With --patient what saves has ten minutes for it.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from launched import MARK, processes

WORKER = Path(__file__).with_name("allreduce.py")
ROOT = Path(__file__).parents[2]

# name -> (what rank 1 does by itself at step 5, signal for whom)
CASES = {
    **{f"kill -9 of rank {k % 2} ({k // 2 + 1})": ((), (signal.SIGKILL, f"rank {k % 2}")) for k in range(10)},
    "exception in rank 1": (("raise", "5"), None),
    "rank 1 exits 0 early": (("exit", "5"), None),
    "rank 1 stopped": ((), (signal.SIGSTOP, "rank 1")),
    "rank 1 hangs outside a collective": (("sleep", "5"), None),
    **{f"{number.name} to the launcher": ((), (number, "launcher"))
       for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)},
    "SIGKILL to the supervisor": ((), (signal.SIGKILL, "supervisor")),
}


def find(mark: str, who: str, launcher: int) -> int:
    """The number of the launcher, its supervisor, or a rank."""
    if who == "launcher":
        return launcher
    for pid, variables in processes(mark).items():
        if who == "supervisor" and "MS_ROLE" not in variables and pid != launcher:
            return pid
        if variables.get("MS_ROLE") == "MS_WORKER" and who == f"rank {variables['RANK_ID']}":
            return pid
    raise LookupError(who)


def step_of(path: Path) -> int:
    """The step of a heartbeat, 0 before the first."""
    try:
        return json.loads(path.read_text())["step"]
    except (OSError, ValueError):
        return 0


def measure(name: str, folder: Path, is_patient: bool = False) -> dict[str, object]:
    """Run one case. Returns: seconds until all had ended, processes left after ten minutes, exit code, last line."""
    by_itself, sent = CASES[name]
    flags = ["--grace_seconds", "600"] if is_patient else []
    mark, logs = str(uuid.uuid4()), folder / "logs"
    folder.mkdir()
    with open(folder / "terminal", "w") as terminal:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "ms_diffsynth.cli.main", "launch", "--workers", "2", "--log_dir", str(logs), *flags,
             "--", sys.executable, str(WORKER), "100000", str(folder), *by_itself],
            stdout=terminal, stderr=subprocess.STDOUT, cwd=folder,
            env=os.environ | {MARK: mark, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    while min(step_of(logs / f"worker-{rank}.beat") for rank in (0, 1)) < 5 and launcher.poll() is None:
        time.sleep(0.01)
    if sent:
        time.sleep(0.5)
        os.kill(find(mark, sent[1], launcher.pid), sent[0])
    began = time.monotonic()
    while (left := processes(mark)) and time.monotonic() - began < 600:
        launcher.poll()
        time.sleep(0.05)
    gone = time.monotonic() - began
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return {"code": launcher.wait(), "gone": gone, "left": len(left), "saved": len(list(folder.glob("saved-*"))),
            "line": (folder / "terminal").read_text().splitlines()[-1]}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells ignore it in the background, nohup ignores SIGHUP: so would
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the launcher
    with tempfile.TemporaryDirectory() as folder:
        is_patient, names = "--patient" in sys.argv, [word for word in sys.argv[1:] if word != "--patient"]
        for number, name in enumerate(names or CASES):
            found = measure(name, Path(folder) / str(number), is_patient)
            line = found["line"].replace(str(Path(folder) / str(number)), "...")
            sys.stdout.write(f"| {name} | {found['gone']:.1f} | {found['left']} | {found['saved']} | {found['code']} | "
                             f"{line} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
