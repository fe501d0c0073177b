"""The decoder of a VAE alone: the images of the whole one, to the bit, without the weights of its encoder."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.nn.names import torch_parameters
from ms_diffsynth.registry import FAMILIES, family

NAMES = sorted(name for name in FAMILIES if family(name).takes_prompts)
pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(3)
def test_it_decodes_as_the_whole_does(name, tiny_model):
    pipe = family(name).pipeline.from_pretrained(str(tiny_model(name)))
    size = (5, 64, 48) if pipe.medium == "video" else (64, 48)
    latents = np.random.default_rng(0).standard_normal((1, *pipe.latent_shape(*size))).astype(np.float32)
    pipe.prepared_prompts = {}
    alone = pipe.decode(Tensor(latents))[0]
    assert list(pipe.models) == ["vae.decoder"]
    assert not any("encoder." in key and "decoder" not in key for key in torch_parameters(pipe.models["vae.decoder"]))
    pipe.prepared_prompts = None
    whole = pipe.decode(Tensor(latents))[0]
    assert set(pipe.models) == {"vae", "vae.decoder"} and np.array_equal(np.asarray(alone), np.asarray(whole))
    parts = [len(torch_parameters(pipe.models[model])) for model in ("vae.decoder", "vae")]
    assert 0 < parts[0] < parts[1]
    pipe.unload_models(["vae"])
    assert not pipe.models


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "sdxl" else n for n in NAMES])
def test_prepared_prompts_sample_as_the_prompts_do(name, tiny_model):
    pipe, *_ = pipes = [family(name).pipeline.from_pretrained(str(tiny_model(name))) for _ in range(2)]
    call = {"prompt": "a cat", "negative_prompt": "a dog", "cfg_scale": 2.0, "seed": 0, "height": 64, "width": 48,
            "num_inference_steps": 1} | ({"num_frames": 5} if pipe.medium == "video" else {})
    expected = pipe(**call)
    cut = pipe.sampling_program().cut(pipe.denoise.output_params)
    units, _ = cut.split(["prompt"])
    names = [slot for unit in units for slot in unit.output_params if slot in cut.cache]
    pipes[1].prepared_prompts = {
        prompt: {slot: array[0].asnumpy() for slot, array in pipe.run(units, {"prompt": prompt}).items()
                 if slot in names}
        for prompt in ("a cat", "a dog")}
    assert np.array_equal(np.asarray(pipes[1](**call)), np.asarray(expected))
    assert set(pipes[1].models) == {pipe.network, "vae.decoder"}
