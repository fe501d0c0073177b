"""A toy model, a small data set and a configuration; the command line in this process."""
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from processes import environment

from ms_diffsynth.cli.main import main

CONFIG = """\
model:
  family: toy
  model_paths: {model}
  lora_rank: 2
data:
  dataset_base_path: {data}
  dataset_metadata_path: {data}/metadata.csv
  height: 16
  width: 16
optimizer:
  learning_rate: 1e-2
run:
  max_train_steps: 4
  save_steps: 2
  batch_size: 2
  output_path: out
  sample_prompts: [a red square, a blue square]
  num_inference_steps: 2
"""


@pytest.fixture(scope="session")
def toy_model(tiny_model):
    return tiny_model("toy")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    lines = ["image,prompt"]
    for k, name in enumerate(("red", "green", "blue")):
        pixels = np.full((20, 24, 3), 40, np.uint8)
        pixels[..., k] = 220
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} square")
        lines.append(f"{name}.png,a {name} square")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def config(tmp_path, toy_model, pictures):
    """A configuration file of four steps on three pictures; the tests run in ``tmp_path``."""
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG.format(model=toy_model, data=pictures))
    return path


@pytest.fixture
def begin():
    """``begin(word, ...)`` is ``python`` that does not wait: the process, which is killed in the end if it must be."""
    begun = []

    def call(*words):
        begun.append(subprocess.Popen([sys.executable, *words], text=True, env=environment(),
                                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def run(capsys):
    """``run(word, ...)`` runs the command and returns (exit code, what it printed, what it complained of)."""

    def call(*words):
        code = main([str(word) for word in words])
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return code, found.out, found.err

    return call
