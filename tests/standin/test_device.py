"""MindSpore on the stand-in: a cell's value and gradients in both modes, what the log counts, and what goes wrong."""
from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ms_diffsynth.standin import FOLDER, Log, active, mark

COMMAND = [sys.executable, "-m", "ms_diffsynth.standin", "--"]
CELL = Path(__file__).parent / "cell.py"


@pytest.fixture(scope="module")
def runs(standin, tmp_path_factory):
    """The results of `cell.py` on the CPU and on the stand-in, and the stand-in's log and messages."""
    folder = tmp_path_factory.mktemp("runs")
    on_cpu = subprocess.run([sys.executable, CELL, "CPU", folder / "cpu.npz"], cwd=folder, capture_output=True,
                            text=True, check=False)
    assert on_cpu.returncode == 0, on_cpu.stderr
    done = standin(CELL, "Ascend", folder / "ascend.npz", log=folder / "log.jsonl")
    assert done.returncode == 0, done.stderr
    return np.load(folder / "cpu.npz"), np.load(folder / "ascend.npz"), Log.read(folder / "log.jsonl"), done.stderr


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.few(1)
def test_float32_equals_the_cpu(runs, mode):
    cpu, ascend, _, _ = runs
    for name in ("loss", *"qkvo"):
        expected, found = (x[f"Float32/{mode}/{name}"] for x in (cpu, ascend))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_bfloat16_is_as_near_as_its_eight_bits(runs, mode):
    cpu, ascend, _, _ = runs
    for name in ("loss", *"qkvo"):
        expected, found = cpu[f"Float32/{mode}/{name}"], ascend[f"BFloat16/{mode}/{name}"]
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < 10 * 2 ** -8, name  # about ten roundings lie between a weight and the loss, 2 ** -8 each at most
        assert error > 1e-5, "that was float32"


def test_the_log_counts_the_kernels_of_a_call(runs):
    log = runs[2]
    waits = log.between("nothing begins", "nothing ends").synchronisations()  # what one synchronize() is
    for mode in ("graph", "pynative"):
        part = log.between(f"BFloat16/{mode} begins", f"BFloat16/{mode} ends")
        products = [k for k in part.kernels() if k.name in ("aclnnMatmul", "aclnnMm", "aclnnBatchMatMul")]
        # 6 forwards; backwards 4 of weights, 4 of scores and values, 1 of what the last weight is applied to
        assert len(products) == 15
        assert {k.dtypes() for k in products} == {("bfloat16",) * 3}
        assert part.counts()["aclnnSoftmax"] == part.counts()["aclnnSoftmaxBackward"] == 1
        assert part.casts() == 2  # to float32 before the mean, and its gradient back
        # a compiled function copies x, which is on the host, again, and waits before and after that
        assert part.synchronisations() == waits + (2 if mode == "graph" else 0)
        assert part.copies()["device to host"] == 0


def test_blocking_launches_wait_for_every_kernel(runs):
    log = runs[2]
    part = log.between("blocking begins", "blocking ends")
    waits = log.between("nothing begins", "nothing ends").synchronisations()
    assert part.synchronisations() == len(part.kernels()) + waits > 40


def test_the_log_knows_shapes_strides_and_memory(runs):
    log = runs[2]
    attention = next(k for k in log.kernels("aclnn") if k.name == "aclnnSoftmax")
    assert [t["shape"] for t in attention.tensors()] == [[8, 8], [8, 8]]
    assert all(t.get("offset", 0) >= 0 for k in log.kernels() for t in k.tensors())
    assert log.allocated_peak() > 0
    assert not log.errors()
    assert set(log.summary()) >= {"aclnn", "aclop", "casts", "transposes", "synchronisations", "copies"}
    with pytest.raises(KeyError, match="no mark 'nothing'"):
        log.between("nothing", "nothing")


def test_fused_operators_are_what_they_fuse(standin, tmp_path):
    done = standin(CELL.with_name("fused.py"), log=tmp_path / "log.jsonl")
    assert done.returncode == 0, done.stderr
    assert set(Log.read(tmp_path / "log.jsonl").counts("aclnn")) >= {
        "aclnnRmsNorm", "aclnnRmsNormGrad", "aclnnRotaryPositionEmbedding", "aclnnRotaryPositionEmbeddingGrad",
        "aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad", "aclnnApplyAdamWV2"}


def test_it_says_that_it_is_a_stand_in(runs):
    assert "a stand-in on the CPU (NumPy), for tests and planning, not for training" in runs[3]


def test_a_mark_does_nothing_where_it_is_not_active(monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    assert not active()
    mark("nowhere")


SCRIPT = """
import mindspore as ms, numpy as np, sys
from mindspore import Tensor, ops, mint
ms.set_device("Ascend")
"""


def test_a_missing_operator_fails_with_what_to_write(standin, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "print(mint.lgamma(Tensor(np.ones(3, np.float32))) if hasattr(mint, 'lgamma')"
                               " else mint.asinh(Tensor(np.ones(3, np.float32))))")
    done = standin(script, log=tmp_path / "log.jsonl")
    assert done.returncode != 0
    assert "is not computed by the stand-in; it was called with (float32[3]" in done.stderr
    assert Log.read(tmp_path / "log.jsonl").errors()


def test_more_memory_than_the_device_has_is_an_error_and_less_is_not_touched(standin, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "x = ops.zeros((int(sys.argv[1]), 2 ** 28), ms.float32)\n"
                               "y = x + 1\nms.runtime.synchronize()\nprint(ms.runtime.max_memory_allocated())")
    fits = standin(script, 24, memory=60, shapes_only=True)  # twice 24 GiB, on a machine that may have less
    assert fits.returncode == 0, fits.stderr
    assert int(fits.stdout) >= 48 * 2 ** 30
    assert "kernels are recorded, not computed" in fits.stderr
    too_large = standin(script, 40, memory=60, shapes_only=True)
    assert too_large.returncode != 0
    assert "memory" in too_large.stderr.lower()


@pytest.mark.slow
def test_one_rank_joins_itself_and_reduces(standin, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from mindspore import communication\n" + SCRIPT + "communication.init()\n"
                      "print(ops.AllReduce()(Tensor(np.ones(3, np.float32))), communication.get_group_size())")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run([*COMMAND, "msrun", "--worker_num=1", "--local_worker_num=1", f"--master_port={port}",
                           "--join=True", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1. 1. 1.] 1" in (tmp_path / "worker_0.log").read_text()


def test_the_command_runs_another(standin, tmp_path):
    command = [*COMMAND[:-1], "--log", str(tmp_path / "log.jsonl"), "--"]
    done = subprocess.run([*command, "python", "-c", "from ms_diffsynth.standin import mark; mark('here')"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Log.read(tmp_path / "log.jsonl").marks() == ["here"]
    done = subprocess.run([*command, "no-such-program"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'no-such-program' is not a program on PATH" in done.stderr
