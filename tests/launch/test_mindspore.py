"""Real collectives on the CPU: jobs that end as they should, on one machine and on two; some cases of measure.py."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launched import HANGING
from processes import environment

HERE = Path(__file__).parent
SCRIPT = str(HERE / "allreduce.py")
LAUNCH = [sys.executable, "-m", "ms_diffsynth.cli.main", "launch"]

pytestmark = [pytest.mark.slow, pytest.mark.fault]


@pytest.fixture
def start(tmp_path):
    """``start(word, ...)``: a program with this package on its path."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # msrun looks for "python" there

    def call(*words):
        return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env=environment(PATH=programs))

    return call


@pytest.mark.parametrize("case, code, saved, line", [
    ("kill -9 of rank 1 (1)", 75, 0, "rank 1 was killed by SIGKILL in phase 'step' of step"),
    ("exception in rank 1", 1, 0, "rank 1 failed with exit code 1 in phase 'step' of step 5: ValueError: boom"),
    ("rank 1 hangs outside a collective", 75, 0, "rank 1 hung: nothing begun for "),
    ("SIGTERM to the launcher", 143, 2, "stopped by SIGTERM: all workers have ended"),
    ("SIGKILL to the launcher", -9, 2, "stopped by SIGTERM: all workers have ended"),
])
def test_measured(start, case, code, saved, line):
    out = start(sys.executable, str(HERE / "measure.py"), "--patient", case).communicate(timeout=HANGING)[0]
    found = [cell.strip() for cell in out.strip().strip("|").split("|")]
    assert found[0] == case, out
    assert found[2:5] == ["0", str(saved), str(code)] and found[5].startswith(line), out


@pytest.mark.parametrize("command", [
    [*LAUNCH, "--workers", "2", "--", sys.executable, SCRIPT],
    [shutil.which("msrun", path=str(Path(sys.executable).parent)) or "msrun", "--worker_num=2", "--local_worker_num=2",
     "--master_port=8119", "--join=True", "--log_dir=logs", SCRIPT],
], ids=["launch", "msrun"])
def test_one_script_for_both_launchers(start, tmp_path, command):
    process = start(*command, "5", str(tmp_path))
    out = process.communicate(timeout=HANGING)[0]
    assert process.returncode == 0, out
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["5", "5"]


@pytest.fixture
def machines():
    """Two network namespaces with a cable between them: the words to run something in each."""
    names = [f"launch-{os.getpid()}-{k}" for k in (0, 1)]
    commands = [*(f"ip netns add {name}" for name in names),
                f"ip link add l{os.getpid()}a netns {names[0]} type veth peer name l{os.getpid()}b netns {names[1]}"]
    for name, end, number in zip(names, "ab", (1, 2)):
        commands += [f"ip -n {name} addr add 10.99.0.{number}/24 dev l{os.getpid()}{end}",
                     f"ip -n {name} link set l{os.getpid()}{end} up", f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        yield [["ip", "netns", "exec", name] for name in names]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.parametrize("what, codes, told", [
    ([], [0, 0], ["rank 0 step 5", "2 of 4 workers here, scheduler at 10.99.0.1:8118; logs: logs/worker-K.log"]),
    (["raise", "3"], [1, 1], ["worker 2 is the first one timed out",
                              "rank 2 failed with exit code 1 in phase 'step' of step 3: ValueError: boom (log: "]),
], ids=["well", "a rank of the other machine fails"])
def test_two_machines(start, tmp_path, machines, what, codes, told):
    if what:
        what = [*what, "2"]  # the rank
    flags = ["--workers", "2", "--nodes", "2", "--master_address", "10.99.0.1", "--log_dir", "logs", "--node_rank"]
    processes = [start(*inside, *LAUNCH, *flags, str(k), "--", sys.executable, SCRIPT, "5", str(tmp_path), *what)
                 for k, inside in enumerate(machines)]
    found = [process.communicate(timeout=HANGING)[0] for process in processes]
    assert [process.returncode for process in processes] == codes, found
    for text, line in zip(found, told):
        assert line in (text.splitlines()[-1] if what else text), text
    if not what:
        assert len(list(tmp_path.glob("saved-*"))) == 4
