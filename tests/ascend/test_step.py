"""What an Ascend launches in one training step of FLUX.1, counted on the stand-in: a LoRA in bfloat16, mode graph."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth.cli.main import main
from ms_diffsynth.standin import Log

SCRIPT = Path(__file__).parent / "trainings.py"
BLOCKS = 6  # of the tiny model, 2 double and 4 single


def step_two(run, on_standin, folder):
    """What a run launches in its second step."""
    variables = on_standin(folder / "log.jsonl")
    assert main(["tiny", "flux", str(folder / "model")]) == 0
    done = subprocess.run([sys.executable, SCRIPT, folder, "flux", run], cwd=folder, env=variables, text=True,
                          capture_output=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    log = Log.read(folder / "log.jsonl")
    assert not log.errors()
    log = log.between("the training step 2 begins", "the training step 2 ends")
    # nothing waits: the run itself does once, before the mark at the end, and reads its results later, at once
    assert log.synchronisations() == 1
    assert log.copies()["host to device"] == log.copies()["device to host"] == 0
    assert log.counts("aclop") == {"Assign": 1}  # of the LoRA, new at the end
    return log


@pytest.fixture(scope="module")
def plain(on_standin, tmp_path_factory):
    return step_two("Ascend:bfloat16:graph", on_standin, tmp_path_factory.mktemp("flux"))


def test_kernels_are_few_and_of_the_new_path(plain):
    assert plain.casts() < 20 and plain.transposes() < 5  # 154 and 131 with a Parameter a matrix and mindone's blocks
    assert len(plain.kernels()) < 800  # 755 (2026-11-29), 2000 before


def test_the_optimizer_is_a_handful(plain):
    """All LoRA matrices are one Parameter: what follows the last gradient does not depend on their number."""
    kernels = [kernel.name for kernel in plain.kernels()]
    last_product = max(k for k, name in enumerate(kernels) if name in ("aclnnMm", "aclnnMatmul", "aclnnAddmm"))
    assert len(kernels) - last_product < 50 and kernels.count("aclnnIsFinite") == 2


def test_fused_kernels_are_used(plain):
    counts = plain.counts()
    for name in ("aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad"):
        assert counts[name] == BLOCKS
    assert counts["aclnnRotaryPositionEmbedding"] == counts["aclnnRotaryPositionEmbeddingGrad"] == 2 * BLOCKS
    assert counts["aclnnRmsNorm"] == counts["aclnnRmsNormGrad"] > 0


@pytest.mark.slow
def test_recompute_computes_every_block_again(plain, on_standin, tmp_path):
    recomputed = step_two("Ascend:bfloat16:graph:recompute", on_standin, tmp_path).counts()
    plain = plain.counts()
    norms_outside = 1
    assert recomputed["aclnnFlashAttentionScore"] == 2 * plain["aclnnFlashAttentionScore"]
    assert recomputed["aclnnRotaryPositionEmbedding"] == 2 * plain["aclnnRotaryPositionEmbedding"]
    assert recomputed["aclnnRmsNorm"] == 2 * plain["aclnnRmsNorm"]
    # of the four in single blocks no gradient needs the result: nothing trains on what they go into
    assert recomputed["aclnnGeluV2"] == 2 * plain["aclnnGeluV2"] - 4
    assert recomputed["aclnnLayerNorm"] == 2 * plain["aclnnLayerNorm"] - norms_outside
    assert recomputed["aclnnFlashAttentionScoreGrad"] == plain["aclnnFlashAttentionScoreGrad"]
