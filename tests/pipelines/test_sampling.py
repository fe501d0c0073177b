"""Sampling: without a module of training, and under guidance nothing is prepared twice that both branches share."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from arrays import noise_image
from processes import run_python

import ms_diffsynth
from ms_diffsynth.errors import ProgramError
from ms_diffsynth.pipelines.flux.pipeline import FluxImagePipeline
from ms_diffsynth.pipelines.flux2 import units
from ms_diffsynth.pipelines.flux2.pipeline import Flux2ImagePipeline

ROOT = Path(ms_diffsynth.__file__).parents[1]
SIZE = {"height": 32, "width": 32, "seed": 1, "num_inference_steps": 2}


pytestmark = pytest.mark.usefixtures("eager")


SAMPLE = """
import sys
from ms_diffsynth import runtime
from ms_diffsynth.registry import FAMILIES, family
runtime.configure("graph", "CPU")
for name in FAMILIES:
    family(name)
from ms_diffsynth.cli.main import main
assert main(["sample", sys.argv[1], sys.argv[2], "--prompt", "a cat", "--height", "32", "--width", "32", "--mode",
             "pynative", "--num_inference_steps", "2", "--cfg_scale", "2", "--device", "CPU"]) == 0
found = [name for name in sys.modules if name.startswith("ms_diffsynth.train")]
sys.exit(f"sampling imports {found}" if found else 0)
"""


@pytest.mark.parametrize("name", ["toy", pytest.param("flux", marks=pytest.mark.slow)])
def test_no_family_imports_training_to_sample(name, tiny_model, tmp_path):
    done = run_python("-c", SAMPLE, name, tiny_model(name), timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def calls(monkeypatch):
    """Names of FLUX.2's units of the host in the order in which they run."""
    found = []
    for cls in (units.TokenizePrompt, units.EncodeEditImage):
        def process(self, pipe, _process=cls.process, **inputs):
            found.append(self.name)
            return _process(self, pipe, **inputs)

        monkeypatch.setattr(cls, "process", process)
    return found


def test_an_edit_image_is_encoded_once_under_guidance(tiny_flux2, calls):
    pipe = Flux2ImagePipeline.from_pretrained(str(tiny_flux2))
    edit = noise_image(48, 32)
    found = pipe(prompt="a cat", negative_prompt="blurred", cfg_scale=2.0, edit_image=edit, **SIZE)
    assert calls == ["encode_edit_image", "tokenize_prompt", "tokenize_prompt"]
    # the same from two conditions that share nothing
    calls.clear()
    positive, negative = (pipe.condition(prompt, edit_image=edit) for prompt in ("a cat", "blurred"))
    assert calls.count("encode_edit_image") == 2
    shape = pipe.latent_shape(32, 32)
    noise = ms_diffsynth.Draws(1).normal("latents", np.array([0]), shape)
    (wanted,) = pipe.generate(positive, negative, noise, pipe.sampling_sigmas(2, shape), 2.0)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_another_edit_image_of_the_negative_branch_is_encoded_too(tiny_flux2, calls):
    pipe = Flux2ImagePipeline.from_pretrained(str(tiny_flux2))
    both = {"prompt": "a cat", "negative_prompt": "blurred", "cfg_scale": 2.0, **SIZE}
    both["edit_image"] = noise_image(48, 32)
    shared = pipe(**both)
    calls.clear()
    found = pipe(**both, negative_edit_image=noise_image(48, 32, 1))
    assert calls.count("encode_edit_image") == 2 and (np.asarray(found) != np.asarray(shared)).any()
    calls.clear()
    without = {name: value for name, value in both.items() if name != "edit_image"}
    pipe(**without, negative_edit_image=noise_image(48, 32, 1))  # only one branch has any
    assert calls.count("encode_edit_image") == 1 and calls.count("tokenize_prompt") == 2


def test_a_network_without_embedded_guidance_asks_for_none(tiny_flux, tiny_flux2, monkeypatch):
    klein = Flux2ImagePipeline.from_pretrained(str(tiny_flux2))
    assert not klein.takes_guidance and "guidance" not in klein.condition("a cat")
    dev = FluxImagePipeline.from_pretrained(str(tiny_flux))
    assert dev.takes_guidance
    with pytest.raises(ProgramError, match=r"condition\(\) needs guidance: pass guidance=Tensor"):
        dev.condition("a cat")
    config = dev.store.config("dit") | {"guidance_embeds": False}
    schnell = FluxImagePipeline.from_pretrained(str(tiny_flux))
    monkeypatch.setattr(schnell.store, "config", lambda name, own=schnell.store.config:
                        config if name == "dit" else own(name))
    assert set(schnell.condition("a cat")) == {"prompt_embeds", "pooled_prompt_embeds"}
