"""Weights reach an Ascend once each, in the dtype they are computed in, whatever the files hold."""
from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import pytest

from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.registry import family
from ms_diffsynth.standin import Log

SCRIPT = Path(__file__).parent / "loading.py"


def copied(part: Log) -> Counter[int]:
    """How many copies from the host there were, by their bytes."""
    return Counter(e["bytes"] for e in part.events if e["event"] == "copy" and e["kind"] == "host to device")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.few(1)
def test_each_weight_is_copied_once_in_its_final_dtype(on_standin, tmp_path, stored):
    variables = on_standin(tmp_path / "log.jsonl")
    family("toy").write_tiny(tmp_path / "model", 0)
    if stored == "bfloat16":
        for file in sorted((tmp_path / "model").rglob("*.safetensors")):
            tensors = load_state_dict(file)
            file.unlink()
            save_state_dict(file, {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors.items()})
    shutil.rmtree(tmp_path / "model" / "vae")  # nothing but the network is needed
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "model"], cwd=tmp_path, env=variables, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *sizes, place = done.stdout.splitlines()[-1].split()
    log = Log.read(tmp_path / "log.jsonl")
    loading, first, second = (log.between(f"{n} begins", f"{n} ends")
                              for n in ("loading", "the first call", "the second call"))
    assert not copied(loading) and not loading.kernels()  # they stay on the host until they are used
    weights = Counter(map(int, sizes))
    others = copied(first) - weights  # of another size, or once more
    assert not weights - copied(first) and sum(k * n for k, n in others.items()) < 16  # two numbers of an operator
    assert not copied(second)
    assert first.casts() == second.casts()  # none is one of a weight
    assert place.startswith("Ascend")  # and the memory of the host is free again
