"""Files that cannot be what they are given as: headers, LoRAs, states of checkpoints. Nothing of them is loaded."""
from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from toy_run import Module, digests, rows, table, toy_model, train

from ms_diffsynth.errors import CheckpointError, WeightError
from ms_diffsynth.formats.lora import load_lora
from ms_diffsynth.formats.weights import load_state_dict, open_checkpoint, save_state_dict
from ms_diffsynth.storage.checkpoint import latest, save_checkpoint

pytestmark = pytest.mark.fault

ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


# -- headers of safetensors files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("header, length, tail", [
    (b"{}", 2**63, 0), (b"{}", 2**64 - 1, 0), (b"{}" + b" " * (101 << 20), None, 0),
    (b'{"__metadata__":{"a":"' + b"x" * (101 << 20) + b'"}}', None, 0),
    (b'{"a":%b,"b":%b}' % (ENTRY, ENTRY.replace(b"[0,4]", b"[2,6]")), None, 6),
    (b'{"a":%b,"b":%b}' % (ENTRY, ENTRY.replace(b"[0,4]", b"[8,12]")), None, 12),
    (b'{"a":%b,"a":%b}' % (ENTRY, ENTRY), None, 4),
    (b'{"a":%b,"a":%b}' % (ENTRY, ENTRY.replace(b"[0,4]", b"[4,8]")), None, 8),
    (b'{"__metadata__":{"a":"b","a":"c"},"a":%b}' % ENTRY, None, 4),
    (b'{"a":%b}' % ENTRY.replace(b"[1]", b"[NaN]"), None, 4), (b'{"a":NaN}', None, 0),
    (b'{"a":%b}' % ENTRY.replace(b"[1]", b"[4611686018427387904,4]").replace(b"[0,4]", b"[0,0]"), None, 0),
    (b'{"a":%b,"\xff":1}' % ENTRY, None, 4), (b'{"\\ud800":%b}' % ENTRY, None, 4), (b'{"a":null}', None, 0),
    (b"[" * 200_000, None, 0), (b'{"__metadata__":{"a":1}}', None, 0), (b'{"a":%b}' % ENTRY, None, 5), (b"{", None, 8),
    (b"[]", None, 8), (b"\xff\xfe", None, 8), (b'{"a":%b}' % ENTRY.replace(b"[1]", b"[2]"), None, 4),
    (b'{"a":%b}' % ENTRY.replace(b"[1]", b"[-1]"), None, 4), (b'{"a":%b}' % ENTRY.replace(b"F32", b"X9"), None, 4),
], ids=["2^63", "2^64-1", "101 MB", "101 MB of metadata", "overlap", "gap", "twice", "twice, apart", "metadata twice",
        "NaN in a shape", "NaN", "overflow", "no UTF-8", "half a surrogate", "null", "deep", "a number as metadata",
        "one byte more", "half", "a list", "no text", "another shape", "a negative shape", "an unknown dtype"])
def test_a_header_that_lies_is_refused_at_once_and_without_memory(tmp_path, header, length, tail):
    file = tmp_path / "f.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(tail))
    size = file.stat().st_size
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(WeightError, match=rf"f\.safetensors \({size} bytes\) is not a complete safetensors file: "):
            open_checkpoint(file)
        seconds, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 1 and peak < 50e6, (seconds, peak)


# -- LoRAs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    """The tensors of a LoRA that fits: rank 2, two layers."""
    path = tmp_path_factory.mktemp("lora") / "run"
    train(path, Module(folder), rows(1))
    found = load_state_dict(path / "epoch-0.safetensors")
    assert len(found) == 4
    return found


def first(lora, side):
    return next(name for name in lora if name.endswith(f".lora_{side}.weight"))


def changed(side, change):
    """The LoRA with one tensor changed."""
    return lambda lora: lora | {first(lora, side): change(lora[first(lora, side)])}


def nothing_in(lora):
    return {name.replace("layer_", "block_"): array for name, array in lora.items()}


DEFECTS = {
    "dtype": (changed("A", lambda a: a.astype(np.int8)), "A is int8, expected float64"),
    "shape": (changed("A", lambda a: a[:, 1:]), r"do not fit the model: .* expected A \(2, "),
    "rank of one": (changed("A", lambda a: a[:1]), r"A \(1, \d+\) and B \(\d+, 2\) are not a pair"),
    "rank of all": (lambda lora: {n: a[:1] if "lora_A" in n else a[:, :1] for n, a in lora.items()},
                    r"do not fit the model: .*lora_rank"),
    "missing key": (lambda lora: {n: a for n, a in lora.items() if n != first(lora, "B")}, "has no B"),
    "missing layer": (lambda lora: dict(list(lora.items())[:2]), "not in the file|has no"),
    "extra key": (lambda lora: lora | {"transformer.layer_1.dora_scale": np.ones(1, np.float32)}, "are not a triple"),
    "extra layer": (lambda lora: lora | {f"transformer.layer_9.lora_{s}.weight": np.ones((2, 2), np.float32)
                                         for s in "AB"}, "layer_9 is not a module of the model"),
    "other base model": (nothing_in, "none of its 2 layers is a module of the model"),
    "transposed": (lambda lora: {n: a.T.copy() for n, a in lora.items()}, r"A \(16, 2\), B \(2, 16\), expected A"),
    "sides exchanged": (lambda lora: {n.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x.", "lora_B."): a
                                      for n, a in lora.items()}, "are not a pair|do not fit"),
    "no matching key": (lambda lora: {f"unknown.{n}": a for n, a in lora.items()}, "none of its 2 layers is a module"),
    "empty": (lambda lora: {}, "holds no LoRA"),
    "NaN": (changed("A", lambda a: np.where(a == a[0, 0], np.nan, a).astype(np.float32)), "numbers that are not fin"),
    "infinity in bfloat16": (changed("B", lambda b: np.full(b.shape, np.inf, ml_dtypes.bfloat16)), "not finite"),
    "alpha of NaN": (lambda lora: lora | {first(lora, "A").replace("lora_A.weight", "alpha"): np.float32([np.nan])},
                     "alpha is nan, expected a number up to"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_lora_that_does_not_fit_is_refused_whole(folder, lora, tmp_path, name):
    change, expected = DEFECTS[name]
    save_state_dict(tmp_path / "lora.safetensors", change(lora))
    with pytest.raises(WeightError, match=expected) as error:
        Module(folder, lora_base_model="dit", lora_rank=2, lora_checkpoint=str(tmp_path / "lora.safetensors"))
    assert error.value.exit_code == 66


@pytest.mark.parametrize("settings", ['{"lora_alpha": "8"}', '{"lora_alpha": NaN}', '{"lora_alpha": [8]}',
                                      '{"alpha_pattern": 3}', '{"alpha_pattern": {"layer_1": "8"}}', "[]x", "[1, 2]"])
def test_metadata_of_a_lora_that_make_no_sense_are_refused(tmp_path, lora, settings):
    save_state_dict(tmp_path / "f.safetensors", lora, {"lora_adapter_metadata": settings})
    with pytest.raises(WeightError, match=r"f\.safetensors: the metadata 'lora_adapter_metadata' (says|holds|is not)"):
        load_lora(tmp_path / "f.safetensors")


class Opens:
    """An object whose pickle, read, makes a file."""

    def __reduce__(self):
        return open, ("canary", "w")


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.ckpt", "lora.pth", "lora.bin", "lora"])
def test_a_pickle_given_as_a_lora_is_not_read(folder, name):
    Path(name).write_bytes(pickle.dumps(Opens()))
    with pytest.raises(WeightError):
        Module(folder, lora_base_model="dit", lora_rank=2, lora_checkpoint=name)
    assert not Path("canary").exists()
    pickle.loads(Path(name).read_bytes()).close()
    assert Path("canary").exists(), "otherwise this says nothing"


# -- states of checkpoints -----------------------------------------------------------------------------------------


def forged(run, change):
    """The last checkpoint of a run, saved again with other arrays."""
    found = latest(run / "checkpoints")
    groups = {name: found.read(name) for name in found.groups}
    change(groups)
    return save_checkpoint(run / "checkpoints", found.step, groups, found.state)


def with_nan(group):
    def change(groups):
        name = next(n for n, a in groups[group].items() if a.dtype == np.float32 and a.size > 1)
        groups[group][name].flat[0] = np.nan
    return change


def of_others(groups):
    groups["moments"] = {name.replace("layer_", "block_"): array for name, array in groups["moments"].items()}


def of_another_shape(groups):
    groups["moments"] = {name: np.zeros((3, *array.shape), array.dtype) for name, array in groups["moments"].items()}


def without_one(groups):
    groups["weights"].popitem()


def without_moments(groups):
    del groups["moments"]


@pytest.mark.parametrize("change, error, expected", [
    (with_nan("weights"), CheckpointError, r"step-00000002 holds numbers in weights that are not finite: \S*lora_A"),
    (with_nan("moments"), CheckpointError, "numbers in moments that are not finite"),
    (with_nan("ema"), CheckpointError, "numbers in ema that are not finite"),
    (of_others, WeightError, "missing: .*layer_.*superfluous: .*block_"),
    (of_another_shape, WeightError, r"shape: .* \(3, .*expected"), (without_one, WeightError, "missing: "),
    (without_moments, CheckpointError, "has no moments: it has "),
], ids=["NaN in weights", "NaN in moments", "NaN in the average", "moments of others", "moments of another shape",
        "a weight less", "no moments"])
@pytest.mark.few(3)
def test_a_sound_checkpoint_with_a_state_that_cannot_be_trained_on(folder, tmp_path, change, error, expected):
    run = tmp_path / "run"
    train(run, Module(folder), rows(2), use_ema=True)
    forged(run, change)
    before = digests(run / "checkpoints")
    with pytest.raises(error, match=expected) as caught:
        train(run, Module(folder), rows(2), use_ema=True, num_epochs=2, resume="auto")
    assert caught.value.exit_code == {CheckpointError: 78, WeightError: 66}[error]
    assert len(table(run)) == 3 and digests(run / "checkpoints") == before, "no step was made"
