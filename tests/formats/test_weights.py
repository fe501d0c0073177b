"""Weights: what goes in comes out, and whatever is wrong with a file is named."""
from __future__ import annotations

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from ms_diffsynth.errors import OutputError, WeightError
from ms_diffsynth.formats.weights import (
    DTYPES,
    cast,
    load_state_dict,
    match,
    open_checkpoint,
    save_sharded,
    save_state_dict,
    serialize,
)

BF16 = ml_dtypes.bfloat16


def tensors(count: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"blocks.{k}.weight": generator.standard_normal((4, k + 1)).astype(np.float32) for k in range(count)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def sharded(folder, **kwargs):
    save_sharded(folder, tensors(), max_shard_bytes=50, config={"a": 1}, **kwargs)
    return folder


def test_every_dtype_survives_and_the_reference_library_agrees(tmp_path):
    values = {tag: np.arange(6).reshape(2, 3).astype(dtype) for tag, dtype in DTYPES.items()}
    values |= {"scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 4), BF16)}
    values["strided"] = tensors()["blocks.3.weight"].T
    before = {name: array.copy() for name, array in values.items()}
    save_state_dict(tmp_path / "f.safetensors", values, {"who": "ü", "format": "np"})
    assert_same(load_state_dict(tmp_path / "f.safetensors"), before)
    assert_same(values, before)
    known = {k: v for k, v in before.items() if not k.startswith("F8")}  # safetensors 0.8 reads no float8 into NumPy
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        # its bfloat16 need not be the type of ml_dtypes
        assert {name: file.get_tensor(name).tobytes() for name in known} == {n: a.tobytes() for n, a in known.items()}
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert file.metadata() == {"who": "ü", "format": "pt"}


def test_files_of_the_reference_library_are_read(tmp_path):
    values = tensors() | {"half": np.ones((3, 2), BF16)}
    safetensors.numpy.save_file(values, tmp_path / "f.safetensors", {"k": "v"})
    checkpoint = open_checkpoint(tmp_path / "f.safetensors")
    assert_same(dict(checkpoint.tensors()), values)
    assert checkpoint.metadata == {"k": "v"} and len(checkpoint) == 7 and "half" in checkpoint
    assert checkpoint.shapes["half"] == (3, 2) and checkpoint.entries["half"].dtype == BF16
    assert checkpoint["half"].flags.writeable
    with pytest.raises(WeightError, match=r"tensor 'hall' is not in f.safetensors. Did you mean 'half'"):
        checkpoint["hall"]


def test_the_bfloat16_of_mindspore_is_bfloat16(tmp_path):
    foreign = pytest.importorskip("mindspore.common.np_dtype").bfloat16
    array = np.array([1.5, -2.0], np.float32).astype(foreign)
    assert array.dtype != BF16
    save_state_dict(tmp_path / "f.safetensors", {"w": array})
    assert_same(load_state_dict(tmp_path / "f.safetensors"), {"w": np.array([1.5, -2.0], BF16)})
    assert_same({"w": cast(array, np.dtype(np.float32), "w")}, {"w": np.array([1.5, -2.0], np.float32)})


def test_metadata_never_touches_the_callers(tmp_path):
    metadata = {"a": "b"}
    save_state_dict(tmp_path / "f.safetensors", tensors(1), metadata)
    assert metadata == {"a": "b"}


def test_tensors_are_aligned_to_their_width():
    header = serialize({"a": np.ones(3, np.uint8), "b": np.ones(1, np.float64), "c": np.ones(3, BF16)})[0].tobytes()
    entries = json.loads(header[8:])
    assert len(header) % 8 == 0
    assert [entries[n]["data_offsets"][0] for n in "bca"] == [0, 8, 14]


@pytest.mark.parametrize("metadata, values, text", [
    ({"a": 1}, {}, "metadata a=1 is not text"),
    ({}, {"x": np.ones(2, complex)}, "tensor 'x' of complex128"),
    ({}, {"x": [1.0]}, "tensor 'x' is list"),
])
def test_what_the_format_cannot_hold_is_named(tmp_path, metadata, values, text):
    with pytest.raises(WeightError, match=text):
        save_state_dict(tmp_path / "f", values, metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", BF16, np.dtype(BF16), "BFloat16"])
def test_floats_are_cast_and_integers_are_not(tmp_path, dtype):
    save_state_dict(tmp_path / "f.safetensors", {"w": np.array([1.00390625], np.float32), "ids": np.arange(3)})
    found = load_state_dict(str(tmp_path / "f.safetensors"), torch_dtype=dtype, device="cpu")
    assert found["w"].dtype == BF16 and found["ids"].dtype == np.int64


@pytest.mark.fault
def test_a_cast_that_overflows_is_refused(tmp_path):
    save_state_dict(tmp_path / "f.safetensors", {"w": np.array([1e5, np.inf, 1.0], np.float32)})
    with pytest.raises(WeightError, match=r"tensor 'w' holds 100000.0, too large for float16"):
        load_state_dict(tmp_path / "f.safetensors", "float16")
    assert load_state_dict(tmp_path / "f.safetensors", "bfloat16")["w"][1] == np.inf


def test_wrong_dtype_and_device_are_named(tmp_path):
    with pytest.raises(WeightError, match=r"dtype bfloat61: expected one of .* Did you mean 'bfloat16'"):
        load_state_dict(tmp_path / "f.safetensors", "bfloat61")
    with pytest.raises(WeightError, match="device='cuda'"):
        load_state_dict(tmp_path / "f.safetensors", device="cuda")


# -- folders, shards, indices


def test_shards_have_the_layout_of_diffusers(tmp_path):
    folder = sharded(tmp_path / "dit")
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert shards == [f"diffusion_pytorch_model-0000{k}-of-00005.safetensors" for k in range(1, 6)]
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in tensors().values())}
    assert set(index["weight_map"]) == set(tensors()) and set(index["weight_map"].values()) == set(shards)
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}
    with safe_open(folder / shards[0], "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("source", [
    ".", "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model*.safetensors", "*.safetensors",
    ["diffusion_pytorch_model-0000[1-3]*.safetensors", "diffusion_pytorch_model-0000[45]*.safetensors"],
])
def test_all_ways_to_name_shards(tmp_path, source):
    folder = sharded(tmp_path / "dit")
    path = [str(folder / s) for s in source] if isinstance(source, list) else folder / source
    assert_same(load_state_dict(path), tensors())


def test_one_file_has_no_index_and_a_folder_is_not_overwritten(tmp_path):
    save_sharded(tmp_path / "vae", tensors(), stem="model")
    assert [p.name for p in (tmp_path / "vae").iterdir()] == ["model.safetensors"]
    with pytest.raises(OutputError, match="not empty"):
        save_sharded(tmp_path / "vae", tensors())
    save_sharded(tmp_path / "vae", tensors(1), replace=True)
    assert_same(load_state_dict(tmp_path / "vae"), tensors(1))


def test_one_shard_by_name_is_just_that(tmp_path):
    folder = sharded(tmp_path / "dit")
    assert list(load_state_dict(folder / "diffusion_pytorch_model-00001-of-00005.safetensors")) == [
        "blocks.0.weight", "blocks.1.weight"]


@pytest.mark.fault
@pytest.mark.parametrize("source", [".", "*.safetensors"])
def test_a_missing_shard_is_named_with_its_tensors(tmp_path, source):
    folder = sharded(tmp_path / "dit")
    (folder / "diffusion_pytorch_model-00001-of-00005.safetensors").unlink()
    with pytest.raises(WeightError, match=r"dit/diffusion_pytorch_model-00001-of-00005.safetensors is missing; it "
                                          r"holds 2 tensors: blocks.0.weight, blocks.1.weight"):
        open_checkpoint(folder / source)


def test_a_shard_that_was_not_given_is_named(tmp_path):
    folder = sharded(tmp_path / "dit")
    with pytest.raises(WeightError, match=r"00002-of-00005.safetensors was not given; it holds 1 tensors: blocks\.2"):
        open_checkpoint(sorted(folder.glob("*-0000[1345]-*.safetensors")))


@pytest.mark.fault
def test_a_missing_shard_without_an_index_is_named(tmp_path):
    folder = sharded(tmp_path / "dit")
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "diffusion_pytorch_model-00004-of-00005.safetensors").unlink()
    with pytest.raises(WeightError, match=r"1 of the numbered files are missing: .*-00004-of-00005.safetensors\."):
        open_checkpoint(folder)


@pytest.mark.fault
def test_a_shard_without_the_tensor_the_index_promises(tmp_path):
    folder = sharded(tmp_path / "dit")
    save_state_dict(folder / "diffusion_pytorch_model-00002-of-00005.safetensors", {"other": np.ones(1, np.float32)})
    with pytest.raises(WeightError, match=r"names 1 tensors that its files do not hold: blocks.2.weight"):
        open_checkpoint(folder)


@pytest.mark.fault
def test_a_name_in_two_files_is_refused(tmp_path):
    save_state_dict(tmp_path / "a.safetensors", tensors(2))
    save_state_dict(tmp_path / "b.safetensors", tensors(1))
    with pytest.raises(WeightError, match=r"1 tensors are in two files: blocks.0.weight \(in a.safetensors and b"):
        open_checkpoint(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize("text, message", [
    ("{", "index.json is not JSON"), ("[]", r"index.json holds \[\], expected an object"),
    ("{}", "not an index of shards: its weight_map is null"), ('{"weight_map": {"a": 1}}', "not an index of shards"),
    ('{"weight_map": [1]}', "not an index of shards"), ("[" * 100_000, "nested deeper than 100 brackets"),
    ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "names a twice"),
    ('{"weight_map": {"a": "../x.safetensors"}}', r"names files outside its folder: \.\./x"),
    ('{"weight_map": {"a": "/x.safetensors"}}', "names files outside its folder: /x"),
])
def test_a_bad_index_is_named(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightError, match=message):
        open_checkpoint(tmp_path)


def test_two_indices_are_ambiguous(tmp_path):
    for stem in ("a", "b"):
        (tmp_path / f"{stem}.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightError, match=r"2 indices: a.safetensors.index.json, b"):
        open_checkpoint(tmp_path)


def test_nothing_there_says_what_is(tmp_path):
    save_state_dict(tmp_path / "model.safetensors", tensors(1))
    with pytest.raises(WeightError, match=r"no safetensors file found\. .* holds model.safetensors. Did you mean 'mo"):
        open_checkpoint(tmp_path / "modle.safetensors")
    with pytest.raises(WeightError, match="no safetensors file found"):
        open_checkpoint(tmp_path / "gone" / "*.safetensors")
    with pytest.raises(WeightError, match="empty list"):
        open_checkpoint([])


# -- broken and foreign files


class Bomb:
    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".bin", ".pth", ".ckpt", ".pt", ".safetensors"])
def test_pickles_are_refused_whatever_they_are_called(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"model{suffix}").write_bytes(pickle.dumps(Bomb()))
    for source in (tmp_path, tmp_path / f"model{suffix}", [tmp_path / f"model{suffix}"]):
        text = "not a complete safetensors" if suffix == ".safetensors" else "pickled weights are not read"
        with pytest.raises(WeightError, match=text):
            open_checkpoint(source)
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault
def test_a_file_cut_anywhere_is_named(tmp_path):
    path = tmp_path / "f.safetensors"
    save_state_dict(path, tensors(2))
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, header // 2, header - 1, header, (header + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        named = rf"f\.safetensors (\({size} bytes\) is not a complete safetensors file|has zero bytes)"
        with pytest.raises(WeightError, match=named):
            load_state_dict(path)


# -- match


@pytest.mark.fault
def test_match_lists_every_difference():
    match({"a": (1, 2)}, {"a": [1, 2]})
    expected = {f"blocks.{k}.to_q.weight": (4, 4) for k in range(12)} | {"norm.weight": (4,)}
    found = {f"blocks.{k}.to_k.bias": (4, 4) for k in range(11)} | {"norm.weight": (5,)}
    with pytest.raises(WeightError) as caught:
        match(expected, found, where="dit/")
    text = str(caught.value)
    assert text.startswith("dit/ does not fit the model (13 tensors expected, 12 found): 12 missing: "
                           "blocks.0.to_q.weight (near: blocks.0.to_k.bias), ")
    assert "and 2 more (12 in all); 11 superfluous: blocks.0.to_k.bias, " in text
    assert "and 1 more (11 in all); 1 of the wrong shape: norm.weight (5,), expected (4,). Give" in text
    assert "blocks.11.to_q" not in text
