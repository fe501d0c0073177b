"""Scripts of others, ported by their imports alone: what was built or computed before does not matter."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ms_diffsynth

STEP = """
class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embed = TimestepEmbedding(4, 8)
    def construct(self, x):
        return self.embed(x)
net = Net()
x = Tensor(np.ones((2, 4), np.float32)) * 2  # the device is in use
class Step(TrainStep):
    def __init__(self, net, optimizer):
        super().__init__(net, optimizer)
        self.net = net
    def forward(self, x):
        LINE
        return self.scale_loss(ops.mean(mint.square(self.net(x) - mint.arange(8).to(ms.float32)))), x
step = Step(net, nn.AdamWeightDecay(net.trainable_params(), learning_rate=1e-2))
losses = [float(step(x)[0]) for _ in range(3)]
assert losses[2] < losses[0], losses
from ms_diffsynth import runtime
print(runtime.current().mode, step.compilations)
"""
OURS = "from ms_diffsynth import TrainStep\n"
THEIRS = ("import mindspore as ms\nimport numpy as np\nfrom mindspore import Tensor, mint, nn, ops\n"
          "from mindone.diffusers.models.embeddings import TimestepEmbedding\n")


def script(text: str, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(text)  # compiled code is read from a file
    return subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
                          timeout=900, env=os.environ | {"PYTHONPATH": str(Path(ms_diffsynth.__file__).parents[1])})


@pytest.mark.parametrize("before, mode", [
    (OURS + THEIRS, "graph 1"), ("import ms_diffsynth\n" + THEIRS + OURS, "graph 1"),
    (OURS + THEIRS + "ms.set_context(mode=ms.PYNATIVE_MODE)\n", "pynative 0"),
    ("import mindspore\nmindspore.set_context(mode=mindspore.GRAPH_MODE)\n" + OURS + THEIRS, "graph 1")])
@pytest.mark.few(1)
def test_it_trains_whatever_was_built_first(before, mode, tmp_path):
    done = script(before + STEP.replace("LINE", "pass"), tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == mode, done.stderr[-2000:]


def test_where_the_order_matters_the_error_says_so(tmp_path):
    done = script(THEIRS + OURS + STEP.replace("LINE", "pass"), tmp_path)
    assert done.returncode and "Expected 'import ms_diffsynth' first: put it above the first import from mindone." in (
        done.stderr.splitlines()[-1])


def test_a_breakpoint_in_compiled_code_is_told_where_it_works(tmp_path):
    done = script(OURS + THEIRS + STEP.replace("LINE", "breakpoint()"), tmp_path)
    assert done.returncode and "breakpoint() in code that is compiled" in done.stderr
    assert "--mode pynative" in done.stderr.splitlines()[-1]
