"""One run in an output folder at a time; what dead runs left behind is removed, what belongs to living ones is not."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

from ms_diffsynth.errors import OutputError
from ms_diffsynth.storage.lock import LOCK, lock_folder

HOLD = "import sys, time; from ms_diffsynth.storage.lock import lock_folder\n" \
       "with lock_folder(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def other_run(tmp_path):
    """A process that holds ``tmp_path / "out"``."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], env=environment(), text=True,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def owner(**changes) -> dict:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"pid": 1, "host": socket.gethostname(), "boot_id": boot} | changes


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.fault
@pytest.mark.parametrize("has_flock", [True, False])
def test_a_second_run_is_refused_and_a_dead_one_is_followed(tmp_path, other_run, monkeypatch, caplog, has_flock):
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    where = rf"out is in use by another run: process {other_run.pid} on host {socket.gethostname()}\. Choose another "
    remedy = "output folder, or " + ("wait until" if has_flock else r"delete .*\.lock when")
    with pytest.raises(OutputError, match=where + remedy) as error, lock_folder(tmp_path / "out"):
        pass
    assert error.value.exit_code == 74
    assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == other_run.pid
    stage = tmp_path / "out" / f".tmp-{other_run.pid}-0123abcd"
    stage.mkdir()
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    with lock_folder(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == os.getpid()
    assert not stage.exists()
    assert caplog.messages == [f"{tmp_path / 'out'}: the lock of process {other_run.pid} on host "
                               f"{socket.gethostname()} was left behind and is taken over."]


def test_the_lock_is_given_back_and_is_exclusive_within_a_process(tmp_path, caplog):
    for _ in range(2):
        with pytest.raises(KeyError), lock_folder(tmp_path / "new" / "out"):
            with pytest.raises(OutputError, match=f"process {os.getpid()} on host"), lock_folder(tmp_path / "new/out"):
                pass
            raise KeyError("mine")
    assert caplog.messages == [] and (tmp_path / "new" / "out" / LOCK).read_bytes() == b""


@pytest.mark.fault
@pytest.mark.parametrize("left, is_taken", [
    (owner(), False), (owner(host="elsewhere"), False), (owner(boot_id="another"), True),
    (owner(pid=os.getpid()), True), (owner(pid=-1), True), ({"pid": "x"}, True), ([1], True), ("half of a re", True),
])
def test_without_flock_the_file_decides(tmp_path, monkeypatch, left, is_taken):
    (tmp_path / LOCK).write_text(left if isinstance(left, str) else json.dumps(left))
    with lock_folder(tmp_path):
        pass  # flock knows better than the file
    (tmp_path / LOCK).write_text(left if isinstance(left, str) else json.dumps(left))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    if is_taken:
        with lock_folder(tmp_path):
            pass
    else:
        with pytest.raises(OutputError, match=f"process 1 on host {left['host']}"), lock_folder(tmp_path):
            pass


@pytest.mark.fault
def test_leftovers_of_the_dead_are_removed_and_only_those(tmp_path):
    dead = dead_pid()
    (tmp_path / LOCK).write_text(json.dumps(owner(pid=os.getppid())))  # its number has been given to another process
    gone = [f".tmp-{dead}-0123abcd", f".trash-{dead}-0123abcd", f".tmp-{os.getpid()}-0123abcd",
            f".trash-{os.getppid()}-0123abcd", ".old-step-00000002-0123abcd"]
    kept = [".tmp-1-0123abcd", ".trash-1-0123abcd", f".tmp-{dead}", f"tmp-{dead}-0123abcd", "step-00000002",
            f".tmp-{dead}-0123abcd.txt", f".tmp-99{dead:09}-0123abcd"]
    for name in gone + kept + [".old-step-00000001-0123abcd"]:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_text(name)
    (tmp_path / f".tmp-{dead}-00000000").write_text("a file")
    (tmp_path / "target").mkdir()
    (tmp_path / f".trash-{dead}-00000000").symlink_to(tmp_path / "target")
    with lock_folder(tmp_path):
        found = {path.name for path in tmp_path.iterdir()}
    assert found == {*kept, "step-00000001", "target", LOCK}
    assert (tmp_path / "step-00000001" / "sub" / "f").read_text() == ".old-step-00000001-0123abcd"


@pytest.mark.fault
def test_the_folder_is_synced_before_leftovers_go(tmp_path, monkeypatch):
    stage = tmp_path / f".tmp-{dead_pid()}-0123abcd"
    stage.mkdir()
    was_there = []
    monkeypatch.setattr(os, "fsync", lambda file: was_there.append((os.path.samestat(os.fstat(file), tmp_path.stat()),
                                                                    stage.exists())))
    with lock_folder(tmp_path):
        assert was_there == [(True, True)] and not stage.exists()
    stage.mkdir()
    monkeypatch.setattr(os, "fsync", no_locks)
    with pytest.raises(OutputError, match="cannot be synced: ENOLCK"), lock_folder(tmp_path):
        pass
    assert stage.exists()


@pytest.mark.fault
def test_a_link_is_not_followed_and_impossible_folders_are_explained(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "target")
    for folder, name in (("out", "ELOOP"), ("target", "EEXIST"), ("target/sub", "ENOTDIR")):
        with pytest.raises(OutputError, match=f"cannot be opened for writing: {name}"), lock_folder(tmp_path / folder):
            pass
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.fault
def test_a_full_disk_is_relieved_first(tmp_path, monkeypatch):
    stage = tmp_path / f".tmp-{dead_pid()}-0123abcd"
    stage.mkdir()
    real = os.pwrite

    def full(*args):
        if stage.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    monkeypatch.setattr(os, "pwrite", lambda *_: no_locks())
    with pytest.raises(OutputError, match=r"\.lock cannot be written: ENOLCK .* Free some"), lock_folder(tmp_path):
        pass
