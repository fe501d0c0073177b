"""mindone's code is adapted in memory: the right calls, the same lines, and nothing on disk."""
from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from reference import STRICT

from ms_diffsynth.ops.cpu.source import adapt, cpu_clone, cpu_nonzero, cpu_split

ADAPTED = [
    ("a, b = x.chunk(2, dim=-1)\n", "a, b = cpu_chunk((x), 2, dim=-1)\n"),
    ("y = f(x).clone().chunk(2)\n", "y = cpu_chunk((cpu_clone((f(x)))), 2)\n"),
    ("y = (x + x.clone()).chunk(\n    2,\n    1)\n", "y = cpu_chunk(((x + cpu_clone((x)))), \n    2,\n    1)\n"),
    ("é = (\n    x\n    .repeat_interleave(2)\n)\n", "é = (\n    cpu_repeat_interleave((x\n    ), 2)\n)\n"),
    ("y = [a.chunk(2) for a in b.chunk(3)]\n", "y = [cpu_chunk((a), 2) for a in cpu_chunk((b), 3)]\n"),
]
UNTOUCHED = ["mint.chunk(x, 2)\n", "ms.ops.chunk(x, 2)\n", "x.clone(prefix='a', init='zeros')\n", "chunk(x)\n",
             "'x.chunk(2)'\n", "# x.chunk(2)\n", "x.chunk\n"]


@pytest.mark.parametrize("before, after", ADAPTED)
def test_method_calls_become_functions_on_the_same_lines(before, after):
    assert adapt(before) == after
    compile(after, "adapted", "exec")


@pytest.mark.parametrize("source", UNTOUCHED)
def test_what_is_no_tensor_method_stays(source):
    assert adapt(source) == source


def test_the_graph_compiler_reads_the_adapted_text():
    from mindone.diffusers.models import normalization
    lines, _ = inspect.getsourcelines(normalization.AdaLayerNormZero.construct)
    assert "cpu_chunk((" in "".join(lines)
    on_disk = Path(normalization.__file__).read_text()
    assert "cpu_chunk" not in on_disk and ".chunk(6, dim=1)" in on_disk
    byte_code = Path(importlib.util.cache_from_source(normalization.__file__))
    assert not byte_code.exists() or b"cpu_chunk" not in byte_code.read_bytes()
    line = inspect.getsourcelines(normalization.AdaLayerNormZero)[1]
    assert on_disk.splitlines()[line - 1].startswith("class AdaLayerNormZero")


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_clone_and_split_equal_numpy(compiled):
    def both(x, taken):
        return cpu_clone(x), cpu_clone(taken), cpu_split(x, (1, 2), dim=1)[1]
    x, taken = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False])
    found = (ms.jit(both, **STRICT) if compiled else both)(Tensor(x), Tensor(taken))
    for a, b in zip(found, (x, taken, x[:, 1:])):
        assert np.array_equal(a.asnumpy(), b)


def test_nonzero_equals_numpy():
    x = np.array([[0, 3, 0], [-1, 0, 2]], np.float32)
    assert np.array_equal(cpu_nonzero(Tensor(x)).asnumpy(), np.argwhere(x))
    found = cpu_nonzero(Tensor(x == 2), as_tuple=True)
    assert [int(index[0]) for index in found] == [1, 2]


def test_what_is_no_tensor_keeps_its_own_methods():
    class Config:
        def clone(self):
            return "cloned"
    assert cpu_clone(Config()) == "cloned" and cpu_split("a.b", ".") == ["a", "b"]
