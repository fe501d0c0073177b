"""emoji-flux, the model that comes with the package: what is in it, and that it draws what it is told."""
from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import FluxImagePipeline, runtime
from ms_diffsynth.data.images import to_pixels
from ms_diffsynth.evaluate.features import Describer
from ms_diffsynth.formats.weights import open_checkpoint
from ms_diffsynth.hub.bundled import FOLDER, bundled, names

ROOT = Path(__file__).parents[1]
MODEL = FOLDER / "emoji-flux"
CATS, OTHERS = (ROOT / "examples/data" / name for name in ("dreambooth_cat_fluent", "dreambooth_cat_fluent_class"))
MOST_BYTES = 24 * 10**6


def rows(folder):
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def small(path):
    """As examples/emoji_flux/make_images.py makes an image small."""
    return Image.open(path).resize((64, 64), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def pipe():
    runtime.configure("graph", "CPU")
    return FluxImagePipeline.from_pretrained("emoji-flux")


def test_what_is_in_it():
    assert names() == ["emoji-flux"]
    weights = sorted(MODEL.rglob("*.safetensors"))
    assert len(weights) == 4 and sum(file.stat().st_size for file in weights) <= MOST_BYTES
    for file in weights:
        assert {array.dtype for _, array in open_checkpoint(file).tensors()} == {np.dtype(np.float16)}
    assert json.loads((MODEL / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n") and all(name in card for name in ("Noto", "Fluent", "MIT"))
    assert card == (ROOT / "examples/emoji_flux/model_card.md").read_text(encoding="utf-8")
    texts = [file.read_bytes() for file in MODEL.rglob("*.json")]
    assert not any(place in text for text in texts for place in (b"/work", b"/root", b"/tmp"))


def test_a_name_is_a_path_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundled("emoji-flux") == MODEL and bundled("emoji") is None and bundled("") is None
    (tmp_path / "emoji-flux").mkdir()
    assert bundled("emoji-flux") is None


def test_its_vae_gives_back_images_that_it_never_saw(pipe):
    """The nine cats: 27.0 dB; the best linear map with as many numbers gives 25.9 (reconstruct.py)."""
    errors = []
    for row in rows(CATS):
        pixels = to_pixels(small(CATS / row["image"]))[None]
        mean = np.split(pipe.vae.encode(Tensor(pixels))[0].asnumpy(), 2, 1)[0]
        errors.append(((np.clip(pipe.vae.decode(Tensor(mean))[0].asnumpy(), -1, 1) - pixels) ** 2).mean())
    assert 10 * np.log10(4 / np.mean(errors)) > 26.5


def test_it_draws_what_it_is_told(pipe):
    """Of 25 images the one that was asked for looks most like what was drawn: of 9 at least 8 times; of all 25, 24."""
    known, describe = rows(OTHERS), Describer()
    features = describe([small(OTHERS / row["image"]) for row in known]).features
    mean = features.mean(0)
    asked = range(0, 25, 3)
    drawn = [pipe(prompt=known[i]["prompt"], seed=3) for i in asked]
    assert {image.size for image in drawn} == {(64, 64)}  # its own size, steps and guidance
    found = describe(drawn).features - mean
    cosines = found @ (features - mean).T / np.linalg.norm(features - mean, axis=1)
    assert len(drawn) == 9 and (cosines.argmax(1) == asked).sum() >= 8
