"""Document 004, mindone's tutorial "Train a diffusion model": its cells run in order (ddpm_tutorial.py)."""
from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from huggingface_hub import constants, hf_api
from PIL import Image
from processes import environment, run_python
from published_run import without_a_login
from upload_server import UploadServer

from ms_diffsynth import UnconditionalImagePipeline, runtime

TUTORIAL = Path(__file__).parent / "ddpm_tutorial.py"
SMALLER = {
    "image_size = 128": "image_size = 32", "train_batch_size = 16": "train_batch_size = 4",
    "num_epochs = 50": "num_epochs = 2", "lr_warmup_steps = 500": "lr_warmup_steps = 1",
    "(128, 128, 256, 256, 512, 512)": "(32, 32, 32, 32, 32, 32)", "layers_per_block=2": "layers_per_block=1",
    "save_image_epochs = 10": "save_image_epochs = 2", "<your-username>/<my-awesome-model>": "writer/butterflies",
    "        batch_size=config.eval_batch_size,": "        batch_size=config.eval_batch_size, num_inference_steps=2,",
}


@pytest.fixture
def script(tmp_path):
    """The tutorial with smaller sizes, beside four images of different sizes."""
    (tmp_path / "data").mkdir()
    for k in range(4):
        pixels = np.random.default_rng(k).integers(0, 256, (40 + k, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{k}.png")
    text = TUTORIAL.read_text()
    for large, small in SMALLER.items():
        assert text.count(large) == 1, large
        text = text.replace(large, small)
    (tmp_path / "cells.py").write_text(text)
    return tmp_path / "cells.py"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    without_a_login(monkeypatch, tmp_path)
    with UploadServer() as server:
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server
    runtime.configure("graph", DEVICE)


def left(hub):
    """What a run leaves: a grid of samples and a model, which is a pipeline of this package, here and on the hub."""
    folder = Path("ddpm-butterflies-128")
    assert Image.open(folder / "samples/0001.png").size == (4 * 32, 4 * 32)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= names
    assert set(hub.files("writer/butterflies")) - {".gitattributes"} == names - {
        name for name in names if name.startswith(".cache")}
    assert hub.messages == ["Epoch 1"]
    assert UnconditionalImagePipeline.from_pretrained(str(folder)).unet is not None


def in_mode(mode, script, hub, monkeypatch):
    runtime.configure(mode, DEVICE)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.delitem(sys.modules, "cells", raising=False)
    cells = importlib.import_module("cells")
    assert cells.train_step.compilations == (1 if mode == "graph" else 0)
    assert [row["step"] for row in cells.history] == [0, 1]
    assert all(np.isfinite(row["loss"]) and 0 < row["loss"] < 3 for row in cells.history)
    assert cells.history[0]["lr"] == 0 and cells.history[1]["lr"] == pytest.approx(1e-4)  # of the list: the warm-up
    assert cells.sample_image.shape == (1, 3, 32, 32) == cells.noise_pred.shape
    left(hub)


def test_it_runs_eagerly(script, hub, monkeypatch):
    in_mode("pynative", script, hub, monkeypatch)


@pytest.mark.slow
def test_it_runs_compiled(script, hub, monkeypatch):
    in_mode("graph", script, hub, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import ms_diffsynth\n", "import mindspore\nimport ms_diffsynth\n",
                                   "from ms_diffsynth import TrainStep\n"])
def test_it_runs_as_a_script_wherever_its_imports_are_above_mindones(first, script, hub):
    text = script.read_text().replace("import ms_diffsynth  # isort: skip", first + "#")
    script.write_text(text)
    done = run_python(script, env=environment(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0"), cwd=script.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    left(hub)
