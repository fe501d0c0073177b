"""A group of a checkpoint in one file a rank: whole again when it is read, and never half."""
from __future__ import annotations

import contextlib
import errno
import os

import numpy as np
import pytest
from faults import FaultyCalls, Killed

from ms_diffsynth.errors import CheckpointError, OutputError
from ms_diffsynth.storage.checkpoint import latest, open_checkpoint_folder, save_checkpoint
from ms_diffsynth.storage.lock import lock_folder
from ms_diffsynth.storage.rank_files import write_part

WHOLE = {"m.a": np.arange(300, dtype=np.float32).reshape(20, 15), "m.b": np.arange(7, dtype=np.float32),
         "step": np.array(7, np.int32)}
SHAPES = {name: array.shape for name, array in WHOLE.items()}


def pieces(rank, ranks=2):
    """Every array but the count in equal parts."""
    cut = {name: np.array_split(array.reshape(-1), ranks)[rank] for name, array in WHOLE.items() if array.size > 1}
    return cut | ({"step": WHOLE["step"].reshape(1)} if rank == 0 else {})


def save(root, ranks=2, step=3, **calls):
    parts = [write_part(root, pieces(rank, ranks), SHAPES) for rank in range(ranks)]
    return save_checkpoint(root, step, {"weights": {"w": np.zeros(3, np.float32)}}, {"step": step}, {"moments": parts},
                           **calls)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_read_as_a_whole(tmp_path, ranks):
    found = open_checkpoint_folder(save(tmp_path, ranks))
    assert found.groups == ("weights", "moments")
    read = found.read("moments")
    assert read.keys() == WHOLE.keys()
    for name, array in WHOLE.items():
        assert read[name].dtype == array.dtype and np.array_equal(read[name], array) and read[name].shape == array.shape
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003"]


def test_each_flipped_bit_of_a_part_is_found(tmp_path):
    path = save(tmp_path)
    for file in sorted(path.glob("moments-*")):
        whole = file.read_bytes()
        for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 16).tolist():
            file.write_bytes(whole[:bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1:])
            with pytest.raises(CheckpointError, match=file.name):
                open_checkpoint_folder(path)
        file.write_bytes(whole)
    open_checkpoint_folder(path)


def test_a_part_that_is_gone_is_named(tmp_path):
    path = save(tmp_path)
    found = open_checkpoint_folder(path)
    (path / "moments-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 files of moments"):
        found.read("moments")
    with pytest.raises(CheckpointError, match=r"moments-00001-of-00002\.safetensors"):
        open_checkpoint_folder(path)


@pytest.mark.fault
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "kill"])
def test_every_call_of_a_save_interrupted(tmp_path, fault):
    """The checkpoint before stays, the new one is whole or not there; leftovers go with the next run."""
    save(tmp_path, step=3)
    number, calls = 0, None
    while calls is None or len(calls.made) > calls.at:
        calls = FaultyCalls(number, fault)
        with contextlib.suppress(OutputError, Killed):
            save(tmp_path, step=4, calls=calls)
        kept = latest(tmp_path)
        assert kept.step in (3, 4) and np.array_equal(kept.read("moments")["m.a"], WHOLE["m.a"])
        with lock_folder(tmp_path):
            pass
        assert {p.name for p in tmp_path.iterdir()} - {".lock"} <= {"step-00000003", "step-00000004"}
        number += 1
    assert number > 30


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path):
    number, calls = 0, None
    while calls is None or len(calls.made) > calls.at:
        calls, root = FaultyCalls(number, errno.ENOSPC), tmp_path / str(number)
        try:
            written = write_part(root, pieces(0), SHAPES, calls=calls)
            assert [p.name for p in root.iterdir()] == [written.file]
        except OutputError as error:
            assert "ENOSPC" in str(error) and (not root.exists() or not os.listdir(root))
        number += 1
    assert number > 6
