"""Checkpoints: what is written, what is refused, which one is found, which are removed."""
from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from faults import FaultyCalls

from ms_diffsynth.errors import CheckpointError, ConfigError, OutputError, WeightError
from ms_diffsynth.storage.cache import digest_of
from ms_diffsynth.storage.checkpoint import (
    MANIFEST,
    differences,
    latest,
    open_checkpoint_folder,
    remove_old_checkpoints,
    save_checkpoint,
)

GROUPS = {
    "weights": {"dit.a": np.arange(300, dtype=np.float32).reshape(20, 15), "dit.b": np.float16([[1, np.inf], [3, 4]]),
                "bf16": np.arange(5).astype(ml_dtypes.bfloat16), "column": np.arange(12.0).reshape(3, 4)[:, 1]},
    "moments": {"step": np.array(7, np.int64), "is_on": np.array([True, False]), "empty": np.zeros((0, 4), np.float32)},
    "ema": {},
}
STATE = {"step": 120, "epoch": 3, "loss_scale": 65536.0, "rate": 0.1 + 0.2, "seed": 2**63, "name": "Ü", "none": None,
         "configuration": {"learning_rate": 1e-4, "sizes": [512, 512]}, "is_done": False}


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def save(root: Path, *steps: int) -> Path:
    """A small checkpoint for each step, told apart by the step in its state."""
    for step in steps:
        path = save_checkpoint(root, step, {"weights": {"w": np.full(100, step, np.float32)}}, {"step": step})
    return path


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir() if path.name.startswith("step-"))


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0] ^ 1 << bit % 8
        stream.seek(bit // 8)
        stream.write(bytes([byte]))


def change_manifest(path: Path, digest: bool = True, **changes) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    del manifest["digest"]
    manifest = {k: v for k, v in manifest.items() if v is not None}
    (path / MANIFEST).write_text(json.dumps(manifest | ({"digest": digest_of(manifest)} if digest else {})))


# -- saving and reading --------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "root", 120, GROUPS, STATE)
    assert path == tmp_path / "new" / "root" / "step-00000120"
    assert {file.name for file in path.iterdir()} == {"weights.safetensors", "moments.safetensors", "ema.safetensors",
                                                      "state.json", MANIFEST}
    for found in (latest(path.parent), open_checkpoint_folder(path), open_checkpoint_folder(os.path.relpath(path))):
        assert (found.path, found.step, found.groups) == (path, 120, ("weights", "moments", "ema"))
        assert found.state == STATE
        for group, arrays in GROUPS.items():
            read = found.read(group)
            assert set(read) == set(arrays)
            for name, array in arrays.items():
                assert read[name].dtype == array.dtype and read[name].shape == array.shape, name
                assert read[name].tobytes() == array.tobytes(), name


def test_the_manifest_is_written_last_and_names_every_file(tmp_path):
    calls = FaultyCalls()
    opened: list[str] = []
    real = calls.open
    calls.open = lambda path, flags, *rest: opened.append(Path(path).name) or real(path, flags, *rest)
    path = save_checkpoint(tmp_path, 1, GROUPS, STATE, calls=calls)
    assert opened[:5] == ["weights.safetensors", "moments.safetensors", "ema.safetensors", "state.json", MANIFEST]
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["format"] == 1 and manifest["step"] == 1
    assert {n: r["bytes"] for n, r in manifest["files"].items()} == {f.name: f.stat().st_size for f in path.iterdir()
                                                                      if f.name != MANIFEST}


@pytest.mark.fault
def test_groups_are_read_when_asked_for(tmp_path):
    found = open_checkpoint_folder(save_checkpoint(tmp_path, 1, GROUPS, STATE))
    with pytest.raises(CheckpointError, match=r"no group 'wights': it has weights, moments, ema\. Did you mean 'wei"):
        found.read("wights")
    os.truncate(found.path / "moments.safetensors", 30)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        found.read("moments")
    assert set(found.read("weights")) == set(GROUPS["weights"])
    weights = found.open("weights")
    os.truncate(found.path / "weights.safetensors", 30)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        weights[next(iter(weights.shapes))]


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, 2)
    save_checkpoint(tmp_path, 2, {"weights": {"w": np.zeros(1)}}, {"is_new": True})
    assert latest(tmp_path).state == {"is_new": True} and steps_in(tmp_path) == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("groups, state, message", [
    ({"../x": {}, "a": {}}, {}, r"the group '\.\./x'\. Expected letters"),
    ({}, {"a": float("nan"), "b": {"c": [0, np.float64(1)]}},
     r"state\.a=nan, state\.b\.c\[1\] of type float64\. Expected"),
    ({}, {"a": {1: 2}, "p": Path("x")}, r"state\.a\[1\], a name of type int, state\.p of type PosixPath"),
])
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, groups, state, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "root", 1, groups, state)
    with pytest.raises(WeightError, match="'x' of complex128"):
        save_checkpoint(tmp_path / "root", 1, {"a": {"x": np.zeros(1, complex)}}, {})
    assert not (tmp_path / "root").exists()


# -- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_latest_is_the_highest_step_that_verifies(tmp_path, caplog):
    assert latest(tmp_path / "none") is None and latest(tmp_path) is None
    save(tmp_path, 5, 123456789, 40, 100)
    (tmp_path / "step-7").mkdir()  # not our spelling
    (tmp_path / "step-120.safetensors").write_bytes(b"")
    assert latest(tmp_path).step == 123456789 and not caplog.messages
    flip(tmp_path / "step-123456789" / "weights.safetensors", 3000)
    (tmp_path / name_of(100) / MANIFEST).unlink()
    assert latest(tmp_path).step == 40
    assert "step-123456789 is damaged: weights.safetensors has another SHA-256" in caplog.messages[0]
    assert "step-00000100 is not a complete checkpoint: MANIFEST.json: No such file" in caplog.messages[1]
    assert len(caplog.messages) == 2
    for step in (5, 40):
        shutil.rmtree(tmp_path / name_of(step))
    assert latest(tmp_path) is None


@pytest.mark.fault
def test_every_flipped_bit_is_found(tmp_path):
    """64 spread over all files, and one in each byte of the manifest."""
    path = save_checkpoint(tmp_path, 1, GROUPS, STATE)
    files = sorted(path.iterdir())
    places = [(file, bit) for file in files for bit in range(8 * file.stat().st_size)]
    spread = [places[at] for at in np.linspace(0, len(places) - 1, 64).astype(int)]
    manifest = [(path / MANIFEST, 8 * byte + byte % 8) for byte in range((path / MANIFEST).stat().st_size)]
    assert len({file for file, _ in spread}) == 5 and len(manifest) > 500
    missed = []
    for file, bit in spread + manifest:
        flip(file, bit)
        try:
            open_checkpoint_folder(path)
            missed.append(f"{file.name} bit {bit}")
        except CheckpointError:
            pass
        flip(file, bit)
    assert not missed, f"{len(missed)} of {len(spread + manifest)} flipped bits were not found: {missed[:5]}"
    assert open_checkpoint_folder(path).step == 1


@pytest.mark.fault
@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", MANIFEST])
def test_a_file_that_was_cut_is_found(tmp_path, caplog, name):
    save(tmp_path, 1)
    path = save_checkpoint(tmp_path, 2, GROUPS, STATE)
    data = (path / name).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little") if name == "weights.safetensors" else len(data) // 3
    lengths = [0, 7, 8, header - 1, header, len(data) // 2, len(data) - 1]
    for length in lengths:
        caplog.clear()
        (path / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint_folder(path)
        assert latest(tmp_path).step == 1, f"{name} cut at {length} of {len(data)}"
        assert name in caplog.messages[0], f"{name} cut at {length} of {len(data)}"
    (path / name).write_bytes(data)
    assert latest(tmp_path).step == 2


@pytest.mark.fault
def test_all_damaged_files_are_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, GROUPS, STATE)
    (path / "ema.safetensors").unlink()
    os.truncate(path / "moments.safetensors", 100)
    flip(path / "state.json", 9)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint_folder(path)
    size = json.loads((path / MANIFEST).read_text())["files"]["moments.safetensors"]["bytes"]
    assert (f"moments.safetensors has 100 bytes, expected {size}, ema.safetensors: No such file or directory, "
            "state.json has another SHA-256") in str(error.value)
    assert error.value.exit_code == 78


@pytest.mark.fault
@pytest.mark.parametrize("change, message", [
    (lambda path: (path / MANIFEST).unlink(), r"MANIFEST\.json: No such file"),
    (lambda path: (path / MANIFEST).write_bytes(b"\xff{"), r"MANIFEST\.json is not UTF-8"),
    (lambda path: (path / MANIFEST).write_text("[" * 100_000), "not a complete checkpoint"),
    (lambda path: (path / MANIFEST).write_text("[]"), r"holds \[\], expected an object"),
    (lambda path: (path / MANIFEST).write_bytes(b" " * 2**21), "2097152 bytes, expected at most 1048576"),
    (lambda path: change_manifest(path, format=2, files=None), r"has format 2, this release reads up to 1\. Resume w"),
    (lambda path: change_manifest(path, step=2), r"holds step 2, unlike its name: .* the name step-00000002"),
    (lambda path: change_manifest(path, step="x"), "lacks a part"),
    (lambda path: change_manifest(path, files={}), "is damaged"),
    (lambda path: change_manifest(path, digest=False), "lacks a part"),
    (lambda path: change_manifest(path, files={"state.json": {"bytes": 1}}), "lacks a part"),
    (lambda path: change_manifest(path, files={"state.json": {"bytes": 1, "sha256": ""},
                                               "../x": {"bytes": 1, "sha256": ""}}), r"\.\./x leads out"),
    (lambda path: path.rename(path.with_name(name_of(3))) and None, "is not there|not a checkpoint"),
])
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, message):
    path = save(tmp_path, 1)
    change(path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint_folder(path)
    assert latest(tmp_path) is None


@pytest.mark.fault
def test_links_and_pipes_are_not_followed(tmp_path, caplog):
    good = save(tmp_path / "elsewhere", 9)
    save(tmp_path / "root", 1)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    link = tmp_path / "root" / name_of(9)
    link.symlink_to(good)
    with pytest.raises(CheckpointError, match="is not a checkpoint, but a link"):
        open_checkpoint_folder(link)
    with pytest.raises(OutputError, match="exists and is not a folder"):
        save(tmp_path / "root", 9)
    assert latest(tmp_path / "root").step == 1 and "a link" in caplog.messages[0]
    remove_old_checkpoints(save(tmp_path / "root", 10, 11, 12))
    assert link.is_symlink() and {file.name: file.read_bytes() for file in good.iterdir()} == before
    for name in ("state.json", MANIFEST):
        path = save(tmp_path / "root", 20)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError, match=f"{name}: expected a regular file"):
            open_checkpoint_folder(path)
        (path / name).unlink()
        (path / name).symlink_to(good / name)
        with pytest.raises(CheckpointError, match=f"{name}: expected a regular file"):
            open_checkpoint_folder(path)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["step-1", "root", "step-00000002", "."])
def test_what_is_no_checkpoint_is_refused(tmp_path, name):
    save(tmp_path / "root", 1)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint, but .* Expected a folder of the name step-0+120"):
        open_checkpoint_folder(tmp_path / name)


# -- retention -----------------------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    assert remove_old_checkpoints(save(tmp_path, 1)) == []
    assert remove_old_checkpoints(save(tmp_path, 2)) == []
    assert remove_old_checkpoints(save(tmp_path, 3)) == [tmp_path / name_of(1)]
    assert steps_in(tmp_path) == [2, 3]
    assert remove_old_checkpoints(save(tmp_path, 4, 5, 6), keep=3) == [tmp_path / name_of(2), tmp_path / name_of(3)]
    assert steps_in(tmp_path) == [4, 5, 6] and len(list(tmp_path.iterdir())) == 3


@pytest.mark.fault
def test_a_damaged_one_never_takes_the_place_of_a_sound_one(tmp_path, caplog):
    saved = save(tmp_path, 1, 2, 3, 4, 5)
    for step in (3, 4):
        flip(tmp_path / name_of(step) / "weights.safetensors", 2000)
    assert remove_old_checkpoints(saved) == [tmp_path / name_of(1)]
    assert steps_in(tmp_path) == [2, 3, 4, 5] and len(caplog.messages) == 2
    flip(saved / "weights.safetensors", 2000)
    assert latest(tmp_path).step == 2
    assert remove_old_checkpoints(save(tmp_path, 6)) == []
    assert remove_old_checkpoints(save(tmp_path, 7)) == [tmp_path / name_of(step) for step in (2, 3, 4, 5)]


def test_what_was_just_saved_is_kept_even_below_others(tmp_path):
    save(tmp_path, 10, 20, 30)
    assert remove_old_checkpoints(save(tmp_path, 5)) == [tmp_path / name_of(step) for step in (10, 20)]
    assert steps_in(tmp_path) == [5, 30]


def test_fewer_than_two_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^1 checkpoints are to be kept: expected at least 2"):
        remove_old_checkpoints(save(tmp_path, 1, 2, 3), keep=1)
    assert steps_in(tmp_path) == [1, 2, 3]


@pytest.mark.fault
@pytest.mark.parametrize("at, left", [(0, [1, 2, 3]), (2, [2, 3]), (4, [2, 3])], ids=["rename", "fsync", "rmtree"])
def test_what_cannot_be_removed_is_a_warning(tmp_path, caplog, at, left):
    calls = FaultyCalls(at, errno.EACCES)
    remove_old_checkpoints(save(tmp_path, 1, 2, 3), calls=calls)
    assert calls.made == ["rename", "open", "fsync", "close", "rmtree"][:max(at + 1, 1)] or at == 2
    assert steps_in(tmp_path) == left
    assert len(caplog.messages) == 1 and "could not be removed" in caplog.messages[0]
    assert caplog.records[0].levelno == logging.WARNING


# -- differences ---------------------------------------------------------------------------------------------------


def test_differences_are_one_readable_line_a_field():
    saved = {"learning_rate": 1e-4, "seed": 42, "sizes": [512, 512], "gone": "x", "same": {"b": 1, "a": 2}}
    now = {"learning_rate": 1e-3, "seed": 42, "sizes": (512, 768), "same": {"a": 2, "b": 1}, "new": None}
    assert differences(saved, now) == [
        "learning_rate: 0.0001 when saved, 0.001 now",
        "sizes: [512, 512] when saved, [512, 768] now",
        'gone: "x" when saved, not set now',
        "new: not set when saved, null now",
    ]
    assert differences(saved, now, accept={"learning_rate", "gone", "seed"}) == [
        "sizes: [512, 512] when saved, [512, 768] now", "new: not set when saved, null now"]
    assert differences(saved, saved) == [] and differences({}, {}) == []
    assert differences({"is_on": True}, {"is_on": 1}) == ["is_on: true when saved, 1 now"]


def test_long_values_are_shown_from_where_they_differ():
    [line] = differences({"rows": "a" * 500 + "b" + "c" * 500}, {"rows": "a" * 500 + "d" + "c" * 500})
    assert len(line) < 250 and "aaab" in line and "aaad" in line and line.count("...") == 4
    [line] = differences({"rows": "a" * 100}, {"rows": "a" * 101})
    assert line.endswith('aaa" when saved, ...' + "a" * 20 + 'a" now')


def test_a_saved_configuration_equals_itself(tmp_path):
    configuration = {"learning_rate": 0.1 + 0.2, "sizes": (1, 2), "prompt": "Ü\ud800", "loss_scale": 2.0**40}
    path = save_checkpoint(tmp_path, 1, {}, {"configuration": configuration})
    assert differences(open_checkpoint_folder(path).state["configuration"], configuration) == []
