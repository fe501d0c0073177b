"""The commit protocol under faults: every call, one after the other, fails or is the last of the process."""
from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from faults import FaultyCalls, Killed

from ms_diffsynth.errors import OutputError
from ms_diffsynth.storage.files import CALLS, append_line, remove_folder, sha256_of, stage_folder, write_file

OLD, NEW = b"old" * 1000, b"new content" * 700
FAULTS = (errno.ENOSPC, errno.EIO, "kill")
OLD_FOLDER = {"a": b"old a", "sub/b": b"old b", "gone": b"x"}
NEW_FOLDER = {"a": b"new a", "sub/b": b"new b" * 100, "sub/deep/c": b""}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save_folder(path: Path, calls: FaultyCalls = CALLS, replace: bool = True) -> None:
    with stage_folder(path, replace=replace, calls=calls) as stage:
        for name, data in NEW_FOLDER.items():
            stage.write(name, data)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def calls_of(action) -> int:
    calls = FaultyCalls()
    action(calls)
    return len(calls.made)


@pytest.mark.fault
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("old", [OLD, None], ids=["old", "none"])
def test_write_file_is_old_or_new_whatever_call_fails(tmp_path, fault, old):
    count = calls_of(lambda calls: write_file(tmp_path / "count" / "f", NEW, calls=calls))
    assert count >= 8
    for at in range(count):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        path = folder / "f"
        if old is not None:
            path.write_bytes(old)
        calls = FaultyCalls(at, fault)
        try:
            write_file(path, NEW, calls=calls)
        except (OutputError, Killed):
            pass
        found = path.read_bytes() if path.exists() else None
        assert found in (old, NEW), calls.made
        has_failed_to_unlink = calls.made[at:at + 1] == ["unlink"]
        assert fault == "kill" or has_failed_to_unlink or not leftovers(folder), calls.made


@pytest.mark.fault
@pytest.mark.parametrize("fault", FAULTS)
def test_write_file_reports_every_fault(tmp_path, fault):
    for at in range(calls_of(lambda calls: write_file(tmp_path / "count", NEW, calls=calls))):
        with pytest.raises(Killed if fault == "kill" else OutputError):
            write_file(tmp_path / "f", NEW, calls=FaultyCalls(at, fault))


def test_write_file_syncs_the_data_before_and_the_folder_after_the_rename(tmp_path):
    calls = FaultyCalls()
    write_file(tmp_path / "f", NEW, calls=calls)
    assert calls.made == ["free", "open", "write", "fsync", "close", "rename", "open", "fsync", "close"]


@pytest.mark.fault
def test_write_file_makes_folders_and_takes_short_writes_and_views(tmp_path):
    path = tmp_path / "a" / "b" / "f"
    write_file(path, [memoryview(OLD), memoryview(b""), memoryview(NEW)], calls=FaultyCalls(most=7))
    assert path.read_bytes() == OLD + NEW
    write_file(path, b"")
    assert path.read_bytes() == b""


@pytest.mark.fault
def test_write_file_follows_no_link(tmp_path):
    (tmp_path / "target").write_bytes(OLD)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_file(tmp_path / "link", NEW)
    assert (tmp_path / "target").read_bytes() == OLD
    assert (tmp_path / "link").read_bytes() == NEW


@pytest.mark.fault
def test_write_file_checks_the_space_first(tmp_path):
    calls = FaultyCalls()
    calls.free = lambda folder: 100
    with pytest.raises(OutputError, match=r"f cannot be written: ENOSPC .*; 7700 bytes needed, 100 bytes free\. Free"):
        write_file(tmp_path / "f", NEW, calls=calls)
    assert "open" not in calls.made
    calls.free = lambda folder: None
    write_file(tmp_path / "f", NEW, calls=calls)


@pytest.mark.fault
@pytest.mark.parametrize("number, text", [
    (errno.EACCES, r"EACCES .* Choose a folder this user may write to\."), (errno.EROFS, "EROFS"),
    (errno.EDQUOT, "EDQUOT .* quota"), (errno.EIO, "EIO .* Check the disk"),
])
def test_errors_name_the_errno_and_the_remedy(tmp_path, number, text):
    with pytest.raises(OutputError, match=text):
        write_file(tmp_path / "f", NEW, calls=FaultyCalls(1, number))


@pytest.mark.fault
def test_impossible_paths_are_explained(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="ENOTDIR"):
        write_file(tmp_path / "file" / "f", NEW)
    with pytest.raises(OutputError, match="EISDIR"):
        write_file(tmp_path / "folder", NEW)
    with pytest.raises(OutputError, match="ENAMETOOLONG"):
        write_file(tmp_path / ("f" * 300), NEW)
    assert leftovers(tmp_path) == []


@pytest.mark.fault
@pytest.mark.parametrize("has_exchange", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("is_new", [True, False])
def test_stage_folder_is_old_or_new_whatever_call_fails(tmp_path, fault, is_new, has_exchange):
    def prepare(folder: Path) -> Path:
        folder.mkdir()
        for name, data in {} if is_new else OLD_FOLDER.items():
            write_file(folder / "out" / name, data)
        return folder / "out"

    probe = FaultyCalls(has_exchange=has_exchange)
    save_folder(prepare(tmp_path / "count"), probe)
    assert tree(tmp_path / "count" / "out") == NEW_FOLDER and leftovers(tmp_path / "count") == []
    assert len(probe.made) > 20
    for at in range(len(probe.made)):
        path = prepare(tmp_path / f"{at}")
        calls = FaultyCalls(at, fault, has_exchange=has_exchange)
        try:
            save_folder(path, calls)
        except (OutputError, Killed):
            pass
        if not path.exists() and not is_new and fault == "kill" and not has_exchange:
            aside = next(path.parent.glob(".old-out-*"))  # the one moment of a swap in two steps: nothing is lost
            assert tree(aside) == OLD_FOLDER
            continue
        old = {} if is_new else OLD_FOLDER
        assert (tree(path) if path.exists() else {}) in (old, NEW_FOLDER), calls.made
        has_failed_to_remove = "rmtree" in calls.made[at:at + 1]
        if "exchange" in calls.made[:at]:  # in place, and perhaps not on the disk: both are needed
            assert has_failed_to_remove or OLD_FOLDER in [tree(p) for p in path.parent.iterdir()], calls.made
        elif fault != "kill" and not has_failed_to_remove:
            assert not [n for n in leftovers(path.parent) if n.startswith(".tmp")], calls.made


def test_stage_folder_syncs_every_file_and_folder_even_those_written_by_others(tmp_path):
    calls = FaultyCalls()
    opened = []
    real = calls.open
    calls.open = lambda path, *rest: opened.append(Path(path).name) or real(path, *rest)
    with stage_folder(tmp_path / "out", calls=calls) as stage:
        (Path(stage) / "sub").mkdir()
        (Path(stage) / "sub" / "foreign").write_bytes(NEW)
    assert opened[:2] == ["foreign", "sub"] and opened[2].startswith(".tmp-") and opened[3] == tmp_path.name
    assert calls.made.index("rename") > 3 * 3  # open, fsync, close for each of the three, before the rename
    assert tree(tmp_path / "out") == {"sub/foreign": NEW}


@pytest.mark.fault
def test_stage_folder_refuses_what_is_there(tmp_path):
    write_file(tmp_path / "out" / "f", OLD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_folder(tmp_path / "out", replace=False)
    for name in ("out/f", "link"):
        with pytest.raises(OutputError, match="not a folder"):
            save_folder(tmp_path / name)
    save_folder(tmp_path / "empty", replace=False)
    assert tree(tmp_path / "empty") == NEW_FOLDER
    assert tree(tmp_path / "out") == {"f": OLD}


def test_stage_folder_checks_the_space_that_is_asked_for(tmp_path):
    calls = FaultyCalls()
    calls.free = lambda folder: 100
    with (pytest.raises(OutputError, match=r"out cannot be written: ENOSPC .*; 101 bytes needed, 100 bytes free\."),
          stage_folder(tmp_path / "out", needed=101, calls=calls)):
        pass
    assert calls.made == [] and list(tmp_path.iterdir()) == []
    with stage_folder(tmp_path / "out", needed=100, calls=calls):
        pass


@pytest.mark.fault
@pytest.mark.parametrize("fault", FAULTS)
def test_remove_folder_leaves_it_whole_or_gone(tmp_path, caplog, fault):
    names = ["rename", "open", "fsync", "close", "rmtree"]
    for at in range(len(names) + 1):
        path = tmp_path / f"{at}" / "out"
        save_folder(path)
        calls = FaultyCalls(at, fault)
        caplog.clear()
        try:
            assert remove_folder(path, calls=calls) is not path.exists()
            assert len(caplog.messages) == (at < len(names)), f"fault {fault} in call {at}"
        except Killed:
            pass
        assert "rmtree" not in calls.made or at >= names.index("rmtree"), f"fault {fault} in call {at}"
        assert path.exists() == (at == 0), f"fault {fault} in call {at}"
        assert at or tree(path) == NEW_FOLDER
        assert leftovers(path.parent) == [] or 0 < at < len(names)


def test_stage_folder_is_removed_when_the_block_fails(tmp_path):
    with pytest.raises(KeyError), stage_folder(tmp_path / "out") as stage:
        stage.write("f", NEW)
        raise KeyError("mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../f", "/f", "a/../../f", ""])
def test_stage_refuses_names_that_lead_out(tmp_path, name):
    with pytest.raises(OutputError, match="leads out of the folder"), stage_folder(tmp_path / "out") as stage:
        stage.write(name, NEW)


def test_stage_refuses_a_name_twice(tmp_path):
    with pytest.raises(OutputError, match="EEXIST"), stage_folder(tmp_path / "out") as stage:
        stage.write("f", NEW)
        stage.write("f", NEW)


@pytest.mark.fault
def test_append_line_ends_a_torn_line_and_takes_back_a_half_one(tmp_path):
    path = tmp_path / "log"
    append_line(path, "one")
    append_line(path, "zwei ü", calls=FaultyCalls(most=2))
    assert path.read_text() == "one\nzwei ü\n"
    for number in (errno.ENOSPC, errno.EIO):
        with pytest.raises(OutputError, match=errno.errorcode[number]):
            append_line(path, "three", calls=FaultyCalls(1, number))
        assert path.read_text() == "one\nzwei ü\n"
    with pytest.raises(Killed):
        append_line(path, "three", calls=FaultyCalls(1, "kill"))
    append_line(path, "four")
    assert path.read_text() == "one\nzwei ü\nthr\nfour\n"
    with pytest.raises(ValueError, match="one line"):
        append_line(path, "a\nb")


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(NEW * 500)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(NEW * 500).hexdigest()


@pytest.mark.fault
def test_files_obey_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "f", NEW)
        save_folder(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
