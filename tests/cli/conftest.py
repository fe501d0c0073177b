"""A toy model, a small data set and a configuration; the command line in this process."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from PIL import Image

import ms_diffsynth
from ms_diffsynth import runtime
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


@pytest.fixture(autouse=True)
def runtime_restored():
    yield
    runtime.configure("graph", DEVICE)


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


def _environment():
    """Ours, with this package on Python's path."""
    path = [str(Path(ms_diffsynth.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture
def python():
    """``python(word, ...)`` runs Python in a process of its own, with this package on its path."""

    def call(*words):
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=300,
                              env=_environment())

    return call


@pytest.fixture
def begin():
    """``begin(word, ...)`` is ``python`` that does not wait: the process, which is killed in the end if it must be."""
    begun = []

    def call(*words):
        begun.append(subprocess.Popen([sys.executable, *words], text=True, env=_environment(),
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
