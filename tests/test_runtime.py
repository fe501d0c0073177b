"""Device, mode and dtype: what is chosen, what is refused, what falls back and says so."""
from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import pytest

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, DeviceError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    yield
    monkeypatch.undo()
    runtime.configure("graph", "CPU")


def test_the_process_stays_eager_in_either_mode():
    for mode in runtime.MODES:
        assert runtime.configure(mode, "cpu") == runtime.current()
        assert (runtime.current().mode, runtime.current().device) == (mode, "CPU")
        assert ms.get_context("mode") == ms.PYNATIVE_MODE and ms.get_context("device_target") == "CPU"


def test_reports_and_checkpoints_say_which_kernels_compute(monkeypatch):
    from ms_diffsynth.ops.cpu.native import build
    from ms_diffsynth.training import state

    for library, kernels in ((None, "composed"), (Path("kernels-0123.so"), "native 0123")):
        monkeypatch.setattr(build, "library", lambda library=library: library)
        assert runtime.versions()["kernels"] == state.versions()["kernels"] == kernels


def test_a_rank_without_its_launcher_is_refused(monkeypatch):
    assert (runtime.configure().rank, runtime.configure().world_size) == (0, 1)
    monkeypatch.setenv("MS_NODE_TIMEOUT", "30")
    monkeypatch.setenv("RANK_ID", "3")
    monkeypatch.setenv("RANK_SIZE", "8")
    with pytest.raises(DeviceError, match=r"rank 3 of 8 cannot join the others.*by msrun or ms-diffsynth launch"):
        runtime.configure("pynative", "CPU")


def test_names_that_are_not_there():
    with pytest.raises(ConfigError, match=r"mode='grap': expected one of graph, pynative\. Did you mean 'graph'"):
        runtime.configure("grap")
    with pytest.raises(ConfigError, match="device='cuda': expected one of CPU, Ascend"):
        runtime.configure("graph", "cuda")
    with pytest.raises(ConfigError, match=r"dtype='bfloat': .*Did you mean 'bfloat16'"):
        runtime.compute_dtype("bfloat")


def test_a_device_that_is_not_there_is_named_with_the_way_out(monkeypatch):
    def refuse(device):
        raise RuntimeError("libge_runner.so: cannot open shared object file\nand more")

    monkeypatch.setattr(ms, "set_device", refuse)
    before = runtime.current()
    with pytest.raises(DeviceError) as error:
        runtime.configure("graph", "Ascend")
    assert "device='Ascend' cannot be used on this machine" in str(error.value)
    assert "libge_runner.so: cannot open" in str(error.value) and "run with --device CPU" in str(error.value)
    assert runtime.current() is before


def test_the_cpu_computes_in_float32_and_says_so(caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        assert runtime.compute_dtype(None) == runtime.compute_dtype("float32") == ms.float32
        assert not caplog.records
        assert runtime.compute_dtype("bfloat16") == ms.float32
    assert "the CPU has no bfloat16 matrix product" in caplog.text
    npu = runtime.Runtime(device="Ascend", mode="graph", rank=0, world_size=1)
    monkeypatch.setattr(runtime, "_current", npu)
    assert runtime.compute_dtype(None) == ms.bfloat16 and runtime.compute_dtype("float16") == ms.float16


def test_the_environment(monkeypatch):
    monkeypatch.delenv("MS_DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    assert runtime.model_base_path() is None
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", "/models")
    assert runtime.model_base_path() == "/models"
    assert 50 << 20 < runtime.peak_memory_bytes() < 1 << 40


def test_a_compile_cache_is_refused(monkeypatch):
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    with pytest.raises(ConfigError, match="Unset MS_COMPILER_CACHE_ENABLE"):
        runtime.configure("graph", "CPU")


STALE = """
import sys
import ms_diffsynth
import numpy as np, mindspore as ms
ms.set_context(mode=ms.GRAPH_MODE)

class Times(ms.nn.Cell):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def construct(self, x):
        return ms.ops.mul(x, self.factor)

print(Times(float(sys.argv[1]))(ms.Tensor(np.ones(1, np.float32)))[0])
"""


@pytest.mark.slow
def test_why_it_is_refused(tmp_path):
    """Once this fails, a MindSpore compares constants too: see decision 68."""
    script = tmp_path / "times.py"
    script.write_text(STALE)
    environment = os.environ | {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(tmp_path / "cache")}
    found = [float(subprocess.run([sys.executable, str(script), factor], env=environment, cwd=tmp_path, check=True,
                                  capture_output=True, text=True).stdout) for factor in ("2", "3")]
    assert found == [2, 2]  # and not 2, 3
