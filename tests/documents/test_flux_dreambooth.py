"""Document 003, mindone's "FLUX.1 DreamBooth LoRA": the class as it is written there trains (dreambooth.py)."""
from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE

from ms_diffsynth import runtime
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.errors import TrainingError
from ms_diffsynth.launch.ports import free_port

sys.path.insert(0, str(Path(__file__).parent))
import dreambooth

SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")


@pytest.fixture(scope="module")
def folder(tiny_model):
    yield tiny_model("flux")
    runtime.configure("graph", DEVICE)


def trains(folder, mode, **settings):
    """Four steps on the same two images: the weights of the LoRA move, and the document's two values come back."""
    runtime.configure(mode, DEVICE)
    step = dreambooth.make_step(folder, 2, **settings)
    before = [p.asnumpy().copy() for p in step.weights]
    found = [step(dreambooth.pictures(0, 2)) for _ in range(2)]
    assert all(loss.shape == () and np.isfinite(float(loss)) for loss, _ in found)
    rows = 1 if settings.get("with_prior_preservation") else 2  # of the instances
    assert all(model_pred.shape == (rows, 16, 4, 4) for _, model_pred in found)
    assert all(np.abs(a - p.asnumpy()).max() > 0 for a, p in zip(before, step.weights))
    assert step.compilations == (1 if mode == "graph" else 0)


def test_it_takes_the_ten_arguments_of_the_document():
    names = [name for name in inspect.signature(dreambooth.TrainStepForFluxDevDB.__init__).parameters if name != "self"]
    assert names == ["vae", "transformer", "optimizer", "noise_scheduler", "weight_dtype", "length_of_dataloader",
                     "args", "prompt_embeds", "pooled_prompt_embeds", "text_ids"]
    ours = inspect.signature(dreambooth.ms_diffsynth.TrainStepForFluxDevDB.__init__).parameters
    assert [name for name in ours if name not in ("self", "options")] == names


@pytest.mark.parametrize("scheme, has_prior", [("logit_normal", False), ("mode", True)])
def test_it_trains_eagerly(folder, scheme, has_prior):
    trains(folder, "pynative", weighting_scheme=scheme, with_prior_preservation=has_prior)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_trains_in_both_modes_by_every_scheme(folder, scheme, has_prior, mode):
    trains(folder, mode, weighting_scheme=scheme, with_prior_preservation=has_prior)


def test_get_sigmas_by_index(folder):
    runtime.configure("pynative", DEVICE)
    for kind in (dreambooth.TrainStepForFluxDevDB, dreambooth.ms_diffsynth.TrainStepForFluxDevDB):
        step = dreambooth.make_step(folder, 2, kind)
        sigmas = step.get_sigmas(ms.Tensor([0, 999], ms.int32), n_dim=3, dtype=ms.float16)
        assert sigmas.shape == (2, 1, 1) and sigmas.dtype == ms.float16 and float(sigmas[0, 0, 0]) == 1.0
        assert step.get_sigmas(indices=ms.Tensor([3], ms.int32)).shape == (1, 1, 1, 1)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    return lambda forward: module(tmp_path, monkeypatch, forward)


def module(tmp_path, monkeypatch, forward):
    """A step over one weight, compiled: what ``forward`` says of ``args``."""
    (tmp_path / "asked.py").write_text(
        "from mindspore import Parameter, Tensor, nn\n"
        "from ms_diffsynth import AdamW, AttrJitWrapper, TrainStep\n"
        "class Net(nn.Cell):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = Parameter(Tensor([2.0]), name='w')\n"
        "    def construct(self, x):\n"
        "        return self.w * x\n"
        "class Step(TrainStep):\n"
        "    def __init__(self, net, **args):\n"
        "        super().__init__(net, AdamW(net.trainable_params(), learning_rate=1e-2), mode='graph')\n"
        "        self.net, self.args = net, AttrJitWrapper(**args)\n"
        "        self.flag = args['flag']\n"
        "    def forward(self, x):\n" + "".join(f"        {line}\n" for line in forward.splitlines()))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "asked", raising=False)
    found = importlib.import_module("asked")
    return lambda **args: float(found.Step(found.Net(), **args)(ms.Tensor([3.0]))[0])


BRANCHES = """loss = self.net(x).mean()
FIRST
if CONDITION:
    prior_loss = loss * 3
if CONDITION:
    loss = loss + self.args.weight * prior_loss
return loss, x"""


@pytest.mark.parametrize("first, condition", [("prior_loss = 0.0", "self.args.flag"), ("pass", "self.flag")])
def test_what_porting_says_of_conditions_compiles(first, condition, compiled):
    step = compiled(BRANCHES.replace("FIRST", first).replace("CONDITION", condition))
    assert step(flag=True, weight=0.5) == pytest.approx(6 + 9) and step(flag=False, weight=0.5) == pytest.approx(6)


@pytest.mark.parametrize("condition", ["self.args.flag", "args.flag"])
def test_what_does_not_compile_says_what_does(condition, compiled):
    step = compiled(BRANCHES.replace("FIRST", "pass").replace("CONDITION", condition))
    with pytest.raises(TrainingError, match=r"cannot be compiled: .*give it one before the 'if'.*becomes an attribute"):
        step(flag=False, weight=0.5)


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_the_posterior_is_sampled_anew_at_every_step(folder, mode, tmp_path):
    """mindone's own sample is of NumPy, which compiled code asks once."""
    runtime.configure(mode, DEVICE)
    step = dreambooth.make_step(folder, 2)
    parameters = ms.Tensor(np.zeros((1, 8, 2, 2), np.float32))
    sample = CompiledStep(step.vae.diag_gauss_dist.sample, "the sample", mode)
    found = [sample(parameters).asnumpy() for _ in range(2)]
    assert found[0].shape == (1, 4, 2, 2) and np.abs(found[0] - found[1]).max() > 0.1
    given = [step.vae.diag_gauss_dist.sample(parameters, np.random.default_rng(3)).asnumpy() for _ in range(2)]
    assert np.array_equal(*given)


@pytest.mark.slow
def test_two_ranks_train_as_one_and_draw_noise_of_their_own(folder, tmp_path):
    """The package's step: two ranks of batch 1 (2 with prior preservation) have the losses of one rank of 2 (4).

    The document's own step draws inside ``forward``: from other seeds on each rank, though both set the same one.
    """
    batch = 2
    command = [Path(sys.executable).with_name("msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True",
               f"--master_port={free_port('127.0.0.1')}", f"--log_dir={tmp_path / 'logs'}", dreambooth.__file__,
               folder, tmp_path, str(batch)]
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=os.environ | path, text=True, capture_output=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = dreambooth.main(folder, tmp_path, 2 * batch)
    ranks = [np.load(tmp_path / f"rank-{rank}-of-2.npz") for rank in range(2)]
    for name in ("losses False", "losses True"):
        assert np.array_equal(ranks[0][name], ranks[1][name])  # the mean of all
        np.testing.assert_allclose(ranks[0][name], alone[name], rtol=1e-5)
    first, second = (rank["predictions"] for rank in ranks)
    assert np.abs(first[0] - second[0]).max() > 0.1  # of the same image, by the same weights
