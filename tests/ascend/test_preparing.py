"""What prepares many rows is compiled on an Ascend, with equal results; models that are unloaded leave the device."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth.registry import family

# MindSpore 2.10 holds on to the last inputs of each operator of its older path (aclop): CLIP's table of tokens.
KEPT = {"flux": 49408 * 32 * 4}
SCRIPT = Path(__file__).parent / "preparing.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_rows_are_prepared_by_compiled_units_of_the_same_values(on_standin, tmp_path, name):
    variables = on_standin(tmp_path / "log.jsonl")
    family(name).write_tiny(tmp_path / "model", 0)
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "model", name], cwd=tmp_path, env=variables, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differences"] and max(found["differences"].values()) < 1e-5, found
    assert found["compilations"] == {"encode_prompt": 1, "encode_image": 1}, "two prompts, of two lengths"
    with_models, unloaded = found["held"]
    assert with_models > 10_000_000 and unloaded < KEPT.get(name, 0) + 100_000, found
