"""A family trained on the stand-in for an Ascend: the losses and gradient norms are the CPU's.

What runs is the graph that an Ascend would run: MindSpore's mint functions and flash attention, none of our CPU
functions. All are slow (``pytest -m slow tests/ascend``); test_step.py has the step of FLUX.1.
"""
from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from trainings import FAMILIES, VARIANTS, base_of

from ms_diffsynth.cli.main import main
from ms_diffsynth.standin import Log

SCRIPT = Path(__file__).parent / "trainings.py"
STEPS = 3
# Float32: other orders of sums and other polynomials for exp and tanh. Bfloat16: 2 ** -8 for one rounding; thousands
# of values of random sign are averaged in a loss or a norm, so that a good deal less is left of it (at most 0.07 % of a
# loss and 0.3 % of a norm, 2026-11-29).
TOLERANCE = {"float32": {"loss": 1e-5, "grad_norm": 1e-4}, "bfloat16": {"loss": 2e-3, "grad_norm": 1e-2}}
# The tiny sd3's pooled text, 40 numbers, is 0.8 % off after CLIP's layers in bfloat16, as FLUX.1's is. It changes all
# tokens of all blocks alike, so nothing of it is averaged: alone it takes 0.13 % of the loss, with everything else at
# most 0.23 % (ten batches; the moments and the text tokens 0.02 % and 0.01 %, the transformer 0.08 %; 2026-11-29).
# A ControlNet is trained whole, at 2e-3: each update moves all of its weights, which bfloat16 rounds. The first loss of
# the tiny FLUX.1's is 0.19 % off, the third 0.46 % (2026-11-30).
WIDER = {("sd3", "bfloat16"): {"loss": 4e-3}, ("flux_controlnet", "bfloat16"): {"loss": 1e-2},
         ("sdxl", "bfloat16"): {"grad_norm": 2e-2}}  # its UNet is deep: PyTorch's own gradients are 4.5e-2 off


@pytest.fixture(scope="module")
def variables(on_standin, tmp_path_factory):
    return on_standin(tmp_path_factory.mktemp("log") / "log.jsonl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by family, with a tiny model in each, and in time the CPU's run."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            variant = ["--variant", VARIANTS[family]] if family in VARIANTS else []
            assert main(["tiny", base_of(family), str(made[family] / "model"), *variant]) == 0
        return made[family]

    return folder


def log_of(folder: Path, run: str) -> Path:
    return folder / f"{run.replace(':', '-')}.jsonl"


def train(folder: Path, family: str, run: str, variables: dict[str, str]) -> dict[str, np.ndarray]:
    """The columns of a run's loss.csv; ``run`` is device:dtype:mode. A run that is there is not repeated."""
    table = folder / run.replace(":", "-") / "loss.csv"
    if not table.is_file():
        if "MS_DIFFSYNTH_STANDIN_LOG" in variables:
            variables = variables | {"MS_DIFFSYNTH_STANDIN_LOG": str(log_of(folder, run))}
        done = subprocess.run([sys.executable, SCRIPT, folder, family, run], cwd=folder, env=variables, text=True,
                              capture_output=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in ("loss", "grad_norm")}


def compare(folder: Path, family: str, dtype: str, mode: str, variables: dict[str, str]) -> None:
    expected = train(folder, family, "CPU:float32:graph", dict(os.environ))
    found = train(folder, family, f"Ascend:{dtype}:{mode}", variables)
    for name, tolerance in (TOLERANCE[dtype] | WIDER.get((family, dtype), {})).items():
        assert len(found[name]) == STEPS
        error = np.abs(found[name] / expected[name] - 1).max()
        assert error < tolerance, f"{name}: {found[name]}, the CPU's {expected[name]}"
        assert dtype == "float32" or error > 2e-6, f"{name}: equal to the last digits, was it float32?"
    assert len(Log.read(log_of(folder, f"Ascend:{dtype}:{mode}")).kernels()) > 100


def step_of(folder: Path, run: str, number: int = 2) -> Log:
    """What one step of a run asked of the device."""
    log = Log.read(log_of(folder, run))
    assert not log.errors()
    return log.between(f"the training step {number} begins", f"the training step {number} ends")


# blocks with attention, norms of queries and keys, of the tiny models; kernels of a step (2026-11-29)
COUNTED = [("qwen_image", 2, 8, 500), ("flux2", 4, 12, 567)]


@pytest.mark.slow
@pytest.mark.parametrize("family, attentions, norms, kernels", COUNTED)
def test_a_lora_step_in_bfloat16_is_the_cpus_and_counts_its_kernels(folders, variables, family, attentions, norms,
                                                                    kernels):
    folder = folders(family)
    compare(folder, family, "bfloat16", "graph", variables)
    step = step_of(folder, "Ascend:bfloat16:graph")
    counts = step.counts()
    for name, number in {"FlashAttentionScore": attentions, "RmsNorm": norms, "RotaryPositionEmbedding": 2 * attentions,
                         "SwiGlu": 6 * (family == "flux2")}.items():
        assert counts[f"aclnn{name}"] == counts[f"aclnn{name}Grad"] == number, name
    assert counts["aclnnSoftmax"] == 0 and all("float16" not in k.dtypes() for k in step.kernels())
    assert step.counts("aclop") == {"Assign": 1}  # of the LoRA, by the optimizer
    # latents become tokens, and tokens a velocity, whose gradient becomes tokens: none is in a block
    assert step.transposes() == 3
    assert len(step.kernels()) <= 1.05 * kernels


# kernels of a step of others (2026-11-30)
LAUNCHED = {"wan": 374, "wan_ti2v": 382, "flux_controlnet": 962, "sdxl": 3991}

CASES = [pytest.param(family, dtype, mode, id=f"{family}-{dtype}-{mode}")
         for family in FAMILIES
         for dtype in ("float32", "bfloat16") for mode in ("graph", "pynative")
         if family not in [row[0] for row in COUNTED] or (dtype, mode) != ("bfloat16", "graph")]


@pytest.mark.slow
@pytest.mark.parametrize("family, dtype, mode", CASES)
def test_losses_and_gradient_norms_are_the_cpus(folders, variables, family, dtype, mode):
    compare(folders(family), family, dtype, mode, variables)
    whole = Log.read(log_of(folders(family), f"Ascend:{dtype}:{mode}"))  # what prepares, too
    assert all("float16" not in kernel.dtypes() for kernel in whole.kernels())
    if mode == "graph" and family != "sdxl":  # whose text encoders are trained too, and are mindone's
        assert step_of(folders(family), f"Ascend:{dtype}:{mode}").counts("aclop")["StridedSlice"] == 0
    if (dtype, mode) == ("bfloat16", "graph") and family in LAUNCHED:
        step = step_of(folders(family), f"Ascend:{dtype}:{mode}", STEPS)  # both shapes of the films are compiled by now
        assert step.synchronisations() == 1, "but for that of the mark"
        assert set(step.copies()) <= {"device to device"}
        assert len(step.kernels()) <= 1.05 * LAUNCHED[family]
    if family not in ("ddpm_unet", "toy"):  # attention of mindone's, and none
        counts = step_of(folders(family), f"Ascend:{dtype}:{mode}").counts()
        assert (counts["aclnnFlashAttentionScore"] > 0) == (dtype == "bfloat16")
        assert family == "sdxl" or (counts["aclnnSoftmax"] > 0) == (dtype == "float32")
