"""Saving that goes wrong in a run: killed in its first save, a full disk, a disk with errors, paths laid in its way."""
from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faults import FaultyCalls, Killed
from toy_run import Module, digests, equal, rows, steps_in, toy_model, train

from ms_diffsynth.errors import CheckpointError, OutputError
from ms_diffsynth.storage import files
from ms_diffsynth.storage.checkpoint import latest, save_checkpoint
from ms_diffsynth.training.hooks import checkpoints

pytestmark = pytest.mark.fault

OPTIONS = {"batch_size": 2, "num_epochs": 2, "checkpoint_steps": 2}  # of five rows: six steps, three checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The folder of a run to which nothing happens."""
    path = tmp_path_factory.mktemp("whole")
    train(path, Module(folder), rows(5), **OPTIONS)
    return path


def make_faulty(patch, number, calls):
    """The number-th save of a state goes through these system calls. Returns: the steps of all saves, as they come."""
    made = []

    def save(*given, **how):
        made.append(given[1])
        return save_checkpoint(*given, **how, calls=calls if len(made) == number else files.CALLS)

    patch.setattr(checkpoints, "save_checkpoint", save)
    return made


@pytest.fixture
def faulty(monkeypatch):
    return partial(make_faulty, monkeypatch)


@pytest.fixture(scope="module")
def count(folder, tmp_path_factory):
    """How many system calls the first save makes; the fourth from the end is the rename."""
    calls = FaultyCalls()
    with pytest.MonkeyPatch.context() as patch:
        make_faulty(patch, 1, calls)
        train(tmp_path_factory.mktemp("count"), Module(folder), rows(5), **OPTIONS, max_train_steps=2)
    assert calls.made[-4] == "rename" and len(calls.made) > 30
    return len(calls.made)


@pytest.mark.parametrize("at", [0, 3, 9, 20, -4, -3])
@pytest.mark.few(2)
def test_killed_in_the_first_save_ever(folder, whole, tmp_path, faulty, count, at):
    """There is nothing to go on from until the rename, four calls before the end; ``auto`` starts, a path does not."""
    faulty(1, FaultyCalls(at % count, "kill"))
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(run, Module(folder), rows(5), **OPTIONS)
    faulty(0, None)
    is_there = latest(run / "checkpoints") is not None
    assert is_there == (at == -3)
    if not is_there:
        with pytest.raises(CheckpointError, match=r"step-00000002: there is no such folder"):
            train(run, Module(folder), rows(5), **OPTIONS, resume=str(run / "checkpoints/step-00000002"))
    train(run, Module(folder), rows(5), **OPTIONS, resume="auto")
    left = [name for name in os.listdir(run / "checkpoints") if name != ".lock"]
    assert equal(whole, run) and sorted(left) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("fault, text", [
    (errno.ENOSPC, r"ENOSPC .*; \d+ bytes needed, \d+ bytes free\. Free some space"),
    (errno.EIO, "EIO .* Check the disk"), (errno.EDQUOT, "EDQUOT .* quota"), (errno.EROFS, "EROFS .* mounted for wri")])
@pytest.mark.few(2)
def test_a_save_that_fails_ends_the_run_at_its_step(folder, whole, tmp_path, faulty, fault, text):
    """Saves are not made in the background, so no step is trained that nobody can save."""
    made = faulty(2, FaultyCalls(12, fault))
    run = tmp_path / "run"
    with pytest.raises(OutputError, match=f"checkpoints/step-00000004.* cannot be written: {text}") as error:
        train(run, Module(folder), rows(5), **OPTIONS)
    assert error.value.exit_code == 74 and made == [2, 4] and (run / "loss.csv").read_text().count("\n") == 5
    assert latest(run / "checkpoints").step == 2 and steps_in(run) == ["step-00000002"]
    faulty(0, None)
    train(run, Module(folder), rows(5), **OPTIONS, resume="auto")
    assert equal(whole, run)


def test_a_disk_that_is_nearly_full_is_found_before_anything_is_written(folder, whole, tmp_path, faulty):
    calls = FaultyCalls()
    calls.free = lambda folder: 1000
    faulty(2, calls)
    run = tmp_path / "run"
    with pytest.raises(OutputError, match=r"ENOSPC .*; \d{4,} bytes needed, 1000 bytes free"):
        train(run, Module(folder), rows(5), **OPTIONS)
    assert calls.made == [] and steps_in(run) == ["step-00000002"]
    faulty(0, None)
    train(run, Module(folder), rows(5), **OPTIONS, resume="auto")
    assert equal(whole, run)


def test_weights_that_cannot_be_written_end_the_run_too(folder, whole, tmp_path, monkeypatch):
    real = files.CALLS.open

    def full(path, flags, *mode):
        if flags & os.O_CREAT and (tmp_path / "run/epoch-0.safetensors").exists() and Path(path).parent.name == "run":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, *mode)

    monkeypatch.setattr(files.CALLS, "open", full, raising=False)
    with pytest.raises(OutputError, match="ENOSPC"):
        train(tmp_path / "run", Module(folder), rows(5), **OPTIONS)
    monkeypatch.undo()
    train(tmp_path / "run", Module(folder), rows(5), **OPTIONS, resume="auto")
    assert equal(whole, tmp_path / "run")


@pytest.mark.parametrize("fault", [errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "rename"])
def test_every_kind_of_error_is_named_and_leaves_what_was_there(tmp_path, call, fault):
    save_checkpoint(tmp_path, 1, {"weights": {"w": np.ones(3)}}, {})
    before, probe = digests(tmp_path), FaultyCalls()
    save_checkpoint(tmp_path, 2, {"weights": {"w": np.ones(3)}}, {}, calls=probe)
    shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(OutputError, match=f"step-00000002.* cannot be written: {errno.errorcode[fault]}") as error:
        save_checkpoint(tmp_path, 2, {"weights": {"w": np.ones(3)}}, {},
                        calls=FaultyCalls(probe.made.index(call), fault))
    assert error.value.exit_code == 74 and str(error.value).count(". ") == 1, "one remedy"
    assert digests(tmp_path) == before and latest(tmp_path).step == 1


@pytest.mark.parametrize("kind", ["link", "folder", "file"])
def test_a_stage_whose_name_is_taken(tmp_path, monkeypatch, kind):
    """The name holds the process and 32 random bits; nothing is written through what somebody put there."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    save_checkpoint(root, 1, {"weights": {"w": np.ones(3)}}, {})
    outside.mkdir()
    (outside / "precious").write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0123abcd")
    stage = root / f".tmp-{os.getpid()}-0123abcd"
    if kind == "link":
        stage.symlink_to(outside)
    else:
        stage.mkdir() if kind == "folder" else stage.write_text("x")
    with pytest.raises(OutputError, match="EEXIST"):
        save_checkpoint(root, 2, {"weights": {"w": np.ones(3)}}, {})
    assert digests(outside) and sorted(os.listdir(outside)) == ["precious"] and latest(root).step == 1


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_are_those_of_the_umask_and_never_more(folder, tmp_path, mask):
    """What a run keeps to itself is as readable as what it is for: the umask is the user's word on both."""
    before = os.umask(mask)
    try:
        train(tmp_path / "run", Module(folder), rows(2), save_steps=1)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path / "run").as_posix(): path.stat().st_mode & 0o777
             for path in (tmp_path / "run").rglob("*")}
    assert len(modes) > 15 and {"loss.csv", ".lock", "checkpoints/step-00000002/state.json"} <= modes.keys()
    wrong = [name for name, mode in modes.items()
             if mode != ((0o777 if (tmp_path / "run" / name).is_dir() else 0o666) & ~mask)]
    assert not wrong, wrong
