"""What each family of text to image does alike: images, how it is loaded, tokenizers and encoders of others."""
from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from arrays import noise_image
from device import DEVICE

from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_sharded
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.registry import family

pytestmark = pytest.mark.usefixtures("eager")

KLEIN, BASE = "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-base-4B"
QWEN, TURBO = "Qwen/Qwen-Image", "Tongyi-MAI/Z-Image-Turbo"
VAE = "vae/diffusion_pytorch_model.safetensors"
EDIT = {"edit_image": noise_image(32, 32)}
# what an image depends on beside seed and prompt
CHANGES = {
    "flux": ({"embedded_guidance": 1.0}, {"cfg_scale": 3.0, "negative_prompt": "x"}),
    "flux2": ({"cfg_scale": 4.0}, EDIT, {"edit_image": noise_image(32, 32, 1)},
              {"edit_image": [noise_image(32, 32), noise_image(16, 48)]}),
    "qwen_image": ({"cfg_scale": 1.0}, {"negative_prompt": "x"}),
    "sd3": ({"cfg_scale": 4.0},),
    "sdxl": ({"cfg_scale": 1.0}, {"negative_prompt": "x"}, {"negative_prompt": ""}, {"sampler": "ddpm"}),
    "z_image": ({"cfg_scale": 1.0}, {"negative_prompt": "x"}),
}


def pipeline(folder, name, **how):
    return family(name).pipeline.from_pretrained(folder if isinstance(folder, list) else str(folder), **how)


SLOW = {"sdxl": pytest.mark.slow}  # four compilations of a UNet


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in CHANGES])
@pytest.mark.few(1)
def test_images_depend_on_seed_prompt_and_guidance_and_their_size_is_rounded_up(tiny_model, name, caplog):
    pipe = pipeline(tiny_model(name), name)
    pipe.max_sequence_length = 32
    width = pipe.check_resize_height_width(32, 48)[1]

    def image(**changes):
        given = {"prompt": "a cat", "height": 32, "width": width, "seed": 1, "num_inference_steps": 2} | changes
        return np.asarray(pipe(**given), np.int16)

    found = [image(**change) for change in ({}, {"seed": 2}, {"prompt": "a dog"}, *CHANGES[name])]
    assert found[0].shape == (32, width, 3)
    assert all((one != other).any() for k, one in enumerate(found) for other in found[:k])
    np.testing.assert_array_equal(image(cfg_scale=family(name).pipeline.sampling.cfg_scale), found[0])
    with caplog.at_level("WARNING"):
        np.testing.assert_array_equal(image(height=20, width=40), found[0])
    assert f"so 32 x {width} is used" in caplog.text


# family -> (folder of a component -> the repository it comes from, pattern), the tokenizer's repository
DOCUMENTED = {
    "flux2": ([(KLEIN, "text_encoder/*.safetensors"), (BASE, "transformer/*.safetensors"), (KLEIN, VAE)], KLEIN),
    "qwen_image": ([(QWEN, "transformer/diffusion_pytorch_model*.safetensors"),
                    (QWEN, "text_encoder/model*.safetensors"), (QWEN, VAE)], QWEN),
    "z_image": ([(TURBO, "transformer/*.safetensors"), (TURBO, "text_encoder/*.safetensors"), (TURBO, VAE)], TURBO),
}


@pytest.mark.parametrize("name", DOCUMENTED)
@pytest.mark.few(1)
def test_the_documents_way_to_load(tiny_model, name, tmp_path, monkeypatch):
    parts, tokenizer = DOCUMENTED[name]
    for repository in {repository for repository, _ in parts}:
        (tmp_path / repository).parent.mkdir(exist_ok=True)
        (tmp_path / repository).symlink_to(tiny_model(name))
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    loaded = family(name).pipeline.from_pretrained(
        mindspore_dtype=ms.float32, device=DEVICE,
        model_configs=[ModelConfig(model_id=where, origin_file_pattern=pattern) for where, pattern in parts],
        tokenizer_config=ModelConfig(model_id=tokenizer, origin_file_pattern="tokenizer/"))
    assert set(loaded.sources) == set(loaded.model_names) and not loaded.models
    loaded(prompt="a cat", height=32, width=32, num_inference_steps=1, cfg_scale=1.0)
    assert set(loaded.models) == set(loaded.model_names)


@pytest.mark.parametrize("name, words, remedy", [("flux2", ("assistant", "user"), r"FLUX\.2-klein"),
                                                 ("qwen_image", ("system", "user"), "Qwen-Image"),
                                                 ("z_image", ("assistant", "user"), "Z-Image")])
@pytest.mark.few(1)
def test_another_models_tokenizer_is_refused(tiny_model, name, words, remedy, tmp_path):
    copy = shutil.copytree(tiny_model(name) / "tokenizer", tmp_path / "tokenizer")
    vocabulary = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    first, second = words
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copy / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    pipe = pipeline(tiny_model(name), name, tokenizer_config=ModelConfig(str(copy)))
    with pytest.raises(WeightError, match=rf"another model's\. Give the tokenizer/ folder of {remedy}"):
        pipe.condition("a cat")


@pytest.mark.parametrize("name, more", [
    ("flux2", {"lm_head.weight": 3, "model.norm.weight": 32, "model.layers.35.mlp.up_proj.weight": 3}),
    ("z_image", {"lm_head.weight": 3, "model.norm.weight": 32, "model.layers.35.mlp.up_proj.weight": 3}),
    ("qwen_image", {"lm_head.weight": 3, "visual.patch_embed.proj.weight": 4})])
def test_what_an_encoder_does_not_use_is_not_loaded_and_more_is_refused(tiny_model, name, more, tmp_path):
    folder = tiny_model(name) / "text_encoder"
    weights, config = load_state_dict(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    more = {key: np.zeros(size, np.float32) for key, size in more.items()}
    save_sharded(tmp_path / "text_encoder", weights | more, stem="model", config=config)
    encoder = pipeline([ModelConfig(str(tmp_path / "text_encoder"))], name).text_encoder
    assert len(list(encoder.get_parameters())) == len(weights)
    save_sharded(tmp_path / "odd", weights | {"more.weight": np.zeros(3, np.float32)}, stem="model", config=config)
    with pytest.raises(WeightError, match=r"1 superfluous: more\.weight"):
        pipeline([ModelConfig(str(tmp_path / "odd"))], name).text_encoder  # noqa: B018
