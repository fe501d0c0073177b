"""Sound inputs of every kind, made once: what `cases` breaks, one thing at a time."""
from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FAMILIES = ("toy", "flux", "flux2", "qwen_image", "sd3", "sdxl", "wan", "z_image", "ddpm_unet")
CONFIG = """model:
  family: toy
  model_paths: models/toy
  lora_rank: 4
data:
  dataset_base_path: data
  height: 32
  width: 32
run:
  max_train_steps: 1
  num_inference_steps: 1
  mode: pynative
  output_path: runs/x
"""
TEMPLATE = """import mindspore as ms
from mindspore import Parameter, Tensor, nn


class Model(nn.Cell):
    def __init__(self):
        super().__init__()
        self.gain = Parameter(Tensor([0.5], ms.float32), name="gain")

    def process_inputs(self, scale=1.0, **kwargs):
        return {"scale": scale}

    def forward(self, scale, **kwargs):
        return {}


TEMPLATE_MODEL = Model
TEMPLATE_MODEL_PATH = None
"""


def make_world(folder: Path) -> None:
    """Models of all families, data, metadata, a run with checkpoints, a cache, a LoRA, a template, parity cases.

    Everything is made by the commands themselves. Changes into ``folder``.
    """
    import os

    from ms_diffsynth.cli.main import main
    from ms_diffsynth.debug.parity import CASES

    folder.mkdir(parents=True)
    os.chdir(folder)
    random = np.random.default_rng(0)
    for name in ("data", "classes"):
        Path(name).mkdir()
        for k in range(3):
            Image.fromarray(random.integers(0, 255, (40, 48, 3), np.uint8)).save(f"{name}/{k:03d}.png")
            Path(name, f"{k:03d}.txt").write_text(f"a cat number {k}")
    Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save("data/000.jpg")
    Path("data/000.jpg").rename("photo.jpg")
    rows = "".join(f"{k:03d}.png,a cat number {k}\n" for k in range(3))
    Path("rows.csv").write_text("image,prompt\n" + rows)
    Path("rows.json").write_text('[{"image": "000.png", "prompt": "a cat"}, {"image": "001.png", "prompt": "a dog"}]\n')
    Path("rows.jsonl").write_text('{"image": "000.png", "prompt": "a cat"}\n{"image": "001.png", "prompt": "a dog"}\n')
    Path("toy.yaml").write_text(CONFIG)
    for family in FAMILIES:
        run(main, "tiny", family, f"models/{family}")
    for suffix, words in (("run", []), ("dora", ["--adapter", "dora"]), ("full", ["--trainable_models", "dit"])):
        run(main, "train", "toy.yaml", "--output_path", f"runs/{suffix}", "--max_train_steps", "3", "--save_steps", "1",
            *words)
    run(main, "train", "toy.yaml", "--output_path", "runs/cached", "--cache_dir", "cache")
    run(main, "train", "toy.yaml", "--family", "flux", "--model_paths", "models/flux", "--trainable_models",
        "dit.x_embedder", "--output_path", "runs/whole")
    run(main, "convert", "models/flux/transformer", "single/f.safetensors", "--to", "original")
    run(main, "convert", "models/flux", "whole.safetensors", "--to", "original")
    shutil.copy("models/flux/transformer/config.json", "single/config.json")
    shutil.copy("runs/run/step-3.safetensors", "lora.safetensors")
    shutil.copy("runs/dora/step-3.safetensors", "dora.safetensors")
    shutil.copy("runs/full/step-3.safetensors", "full.safetensors")
    Path("template").mkdir()
    Path("template/model.py").write_text(TEMPLATE)
    for case in ("ddpm_unet", "flux"):
        shutil.copytree(CASES / case, f"cases/{case}")


def run(main, *words: str) -> None:
    code = main(list(words))
    if code:
        sys.exit(f"{' '.join(words)} ended with {code}: the world of broken inputs cannot be made")
