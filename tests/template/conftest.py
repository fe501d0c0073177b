"""Templates to test with, and a toy pipeline that reads a template cache."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from hub_server import HubServer, only_this_machine
from mindspore import ops
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipelines.toy.pipeline import Denoise, ToyImagePipeline

HEAD = '''
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from ms_diffsynth import no_grad
'''
PLAIN = HEAD + '''
class Plain(nn.Cell):
    def __init__(self):
        super().__init__()
        self.frozen = mint.nn.Linear(1, 4)
        self.mlp = mint.nn.Linear(4, 32)

    @no_grad()
    def process_inputs(self, scale, **kwargs):
        return {"value": self.frozen(Tensor([[float(scale)]]))}

    def forward(self, value, **kwargs):
        vectors = self.mlp(value).reshape(value.shape[0], 2, 2, 8)
        return {"kv_cache": {"double_0": (vectors, ops.sin(vectors))}}


TEMPLATE_MODEL = Plain
'''
BRIGHTNESS = Path(__file__).parents[2] / "examples/flux2/templates/brightness"


class TemplateDenoise(Denoise):
    """The toy's, with what a template gives behind the prompt: tokens of 16 channels."""

    input_params = ("latents", "sigma", "prompt_embeds", "guidance?", "template_cache?")

    def construct(self, latents, sigma, prompt_embeds, guidance=None, template_cache=None):
        if template_cache is not None:
            for k, v in template_cache["kv_cache"].values():
                prompt_embeds = ops.cat((prompt_embeds, k.flatten(start_dim=2), v.flatten(start_dim=2)), 1)
        return super().construct(latents, sigma, prompt_embeds)


class TemplateToy(ToyImagePipeline):
    def build_denoise(self):
        return TemplateDenoise(self.dtype)


@pytest.fixture(scope="session")
def toy_folder(tiny_model):
    return tiny_model("toy")


@pytest.fixture(scope="session")
def flux2_folder(tiny_model):
    return tiny_model("flux2")


@pytest.fixture
def toy(toy_folder):
    """Makes toy pipelines that take templates."""
    return lambda: TemplateToy.from_pretrained(str(toy_folder))


@pytest.fixture
def template(tmp_path):
    """Writes a template: ``template(source, name)`` -> its folder."""
    def write(source=PLAIN, name="plain"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "model.py").write_text(source, encoding="utf-8")
        return folder
    return write


@pytest.fixture
def row():
    """A row of a data set: a picture, a prompt, and the inputs of a template."""
    def make(seed=0, size=(32, 48), **template_inputs):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        return {"image": Image.fromarray(pixels), "prompt": "a cat",
                "template_inputs": template_inputs or {"scale": 0.2 + 0.1 * seed}}
    return make


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine; ``hub.config("owner/name")`` is a ModelConfig that asks it."""
    only_this_machine(monkeypatch)
    with HubServer() as server:
        server.config = lambda name, pattern=None, **how: ModelConfig(
            model_id=name, origin_file_pattern=pattern, endpoint=server.endpoint, cache_dir=tmp_path / "cache", **how)
        yield server


@pytest.fixture(autouse=True)
def eager():
    runtime.configure("pynative", DEVICE)


@pytest.fixture
def plain_source():
    return PLAIN


@pytest.fixture
def head():
    """The imports of a model.py."""
    return HEAD


@pytest.fixture
def brightness():
    return BRIGHTNESS
