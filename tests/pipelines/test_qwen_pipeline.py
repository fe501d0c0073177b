"""Qwen-Image: what diffusers computes, text of any length, the prompt, the VAE, settings of later networks."""
from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from arrays import relative
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import QwenImagePipeline
from ms_diffsynth.diffusion.samplers import euler
from ms_diffsynth.errors import DataError, WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_sharded
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipelines.qwen_image.units import PREFIX, TEMPLATE
from ms_diffsynth.units import run_unit

pytestmark = pytest.mark.usefixtures("eager")

PROMPT = "a red cat by the sea, in the style of an old photograph"


@pytest.fixture(scope="module")
def pipe(tiny_qwen):
    return QwenImagePipeline.from_pretrained(str(tiny_qwen))


def test_text_to_image_is_that_of_diffusers(pipe, golden):
    """Recorded from diffusers 0.35.2 and transformers 4.57.1 on the same weights, float32; they differ elsewhere, see
    docs/families/qwen_image.md."""
    wanted = load_state_dict(golden / "qwen_image_sampling/expected.safetensors")
    positive, negative = pipe.condition(PROMPT), pipe.condition("blurry")
    for slots, name in ((positive, "prompt_embeds"), (negative, "negative_prompt_embeds")):
        tokens = wanted[name].shape[1]
        assert slots["prompt_embeds"].shape[1] == 64 and slots["prompt_mask"].asnumpy().sum() == tokens
        assert relative(slots["prompt_embeds"][:, :tokens], wanted[name]) < 1e-5
    sigmas = pipe.sampling_sigmas(4, (16, 8, 6))
    assert relative(sigmas, wanted["sigmas"]) < 2e-7
    denoise = pipe.guidance_rule(pipe.denoiser(positive), pipe.denoiser(negative), pipe.sampling.cfg_scale)
    latents = euler(denoise, Tensor(wanted["noise"]), sigmas)
    assert relative(latents, wanted["latents"]) < 1e-5
    pixels = run_unit(pipe.build_decode(), pipe, {"latents": latents})["pixels"].asnumpy() / 2 + 0.5
    assert relative(pixels.clip(0, 1), wanted["pixels"]) < 2e-5


def test_sigmas_of_four_steps(pipe):
    # DiffSynth-Studio's dynamic shift at 4096 tokens
    np.testing.assert_allclose(pipe.sampling_sigmas(4, (16, 128, 128)), [1, 0.766709, 0.455614, 0.02, 0], atol=1e-6)
    assert pipe.training_schedule("sft").sigmas[[0, -1]].tolist() == pytest.approx([1, 0.02], abs=1e-7)


def test_a_broken_prediction_is_no_black_image(pipe):
    with pytest.raises(DataError, match="pixel values are not finite"):
        pipe.decode(Tensor(np.full((1, 16, 2, 2), np.nan, np.float32)))


# -- text of any length ----------------------------------------------------------------------------------------------


def slots_of(pipe, tokens, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"latents": (batch, 16, 6, 4), "prompt_embeds": (batch, tokens, 32)}
    slots = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return slots | {"sigma": np.linspace(0.3, 0.8, batch, dtype=np.float32)}


def padded(slots, length):
    """Padding is zeros in a run; here it is large, so that a single leak is seen."""
    tokens = slots["prompt_embeds"].shape[1]
    rest = [(0, 0), (0, length - tokens), (0, 0)]
    mask = np.pad(np.ones(slots["prompt_embeds"].shape[:2], np.float32), rest[:2])
    return slots | {"prompt_embeds": np.pad(slots["prompt_embeds"], rest, constant_values=30.0), "prompt_mask": mask}


def velocity_and_gradients(pipe, slots):
    """Velocity; gradients for the latents, the text and every weight, of a fixed random sum of it."""
    unit = pipe.denoise
    unit.attach(pipe)
    weights = list(pipe.dit.get_parameters())
    for weight in weights:
        weight.requires_grad = True
    inputs = [Tensor(slots[n]) for n in ("latents", "sigma", "prompt_embeds", "prompt_mask") if n in slots]
    direction = Tensor(np.random.default_rng(9).standard_normal(slots["latents"].shape).astype(np.float32))

    def forward(*x):
        velocity = unit(*x)[0]
        return (velocity * direction).sum(), velocity

    function = ms.value_and_grad(forward, (0, 2), ms.ParameterTuple(weights), has_aux=True)
    (_, velocity), (inner, outer) = function(*inputs)
    return velocity.asnumpy(), [g.asnumpy() for g in (*inner, *outer)]


def test_padding_changes_neither_value_nor_gradient(pipe):
    slots = slots_of(pipe, 11)
    velocity, (latents, text, *weights) = velocity_and_gradients(pipe, slots)
    padded_velocity, (padded_latents, padded_text, *padded_weights) = velocity_and_gradients(pipe, padded(slots, 64))
    assert relative(padded_velocity, velocity) < 2e-6
    assert relative(padded_latents, latents) < 2e-6 and relative(padded_text[:, :11], text) < 2e-6
    assert not padded_text[:, 11:].any()
    size = max(np.abs(g).max() for g in weights)
    for found, wanted in zip(padded_weights, weights):
        assert np.abs(found - wanted).max() < 2e-6 * size  # float32; sums over five times as many tokens
    gradients = dict(zip([p.name for p in pipe.dit.get_parameters()], weights))
    for layer in ("to_q", "to_k", "add_q_proj", "add_k_proj"):  # where mindone's rotary positions let none through
        assert gradients[f"transformer_blocks.0.attn.{layer}.weight"].any()


def test_prompts_of_two_lengths_share_a_batch(pipe):
    singles = [slots_of(pipe, tokens, seed=tokens) for tokens in (7, 20)]
    both = [padded(s, 64) for s in singles]
    batch = {name: Tensor(np.concatenate([s[name] for s in both])) for name in both[0]}
    together = pipe.model_fn(**batch).asnumpy()
    for k, single in enumerate(singles):
        alone = pipe.model_fn(**{n: Tensor(v) for n, v in single.items()}).asnumpy()
        assert relative(together[k:k + 1], alone) < 2e-6


def test_padded_token_ids_leave_the_hidden_states_before_them(pipe):
    ids = pipe.tokenizer(TEMPLATE.format(PROMPT)).input_ids[len(PREFIX):]
    encode = pipe.units[1]
    wanted = run_unit(encode, pipe, {"prompt_ids": Tensor([ids], ms.int32)})["prompt_embeds"].asnumpy()
    more = run_unit(encode, pipe, {"prompt_ids": Tensor([ids + [0] * 40], ms.int32)})["prompt_embeds"]
    assert relative(more[:, :len(ids)], wanted) < 2e-6


# -- the prompt ------------------------------------------------------------------------------------------------------


def test_the_prompt_is_tokenized_in_its_template_and_its_prefix_dropped(pipe):
    slots = run_unit(pipe.units[0], pipe, {"prompt": "a photo of sks dog"})
    end = [151645, 198, 151644, 77091, 198]
    assert slots["prompt_ids"].asnumpy().tolist() == [[64, 6548, 315, 1901, 82, 5562, *end]]
    assert slots["prompt_mask"].asnumpy().tolist() == [[1.0] * 11] and len(PREFIX) == 34
    assert pipe.tokenizer.decode(PREFIX) + "{}" == TEMPLATE[:TEMPLATE.index("{}") + 2]
    slots = run_unit(pipe.units[0], pipe, {"prompt": ""})
    assert slots["prompt_ids"].asnumpy().tolist() == [end]


def test_a_long_prompt_is_cut_and_said(pipe, caplog, monkeypatch):
    monkeypatch.setattr(pipe, "max_sequence_length", 16)
    with caplog.at_level("WARNING"):
        slots = run_unit(pipe.units[0], pipe, {"prompt": "one two " * 20})
    assert slots["prompt_ids"].shape == (1, 16) and "prompt of 46 tokens is cut to 16" in caplog.text


# -- the picture -----------------------------------------------------------------------------------------------------


def test_one_frame_needs_no_cache(pipe):
    """EncodeImage and Decode leave out mindone's walk along a film; on one frame it gives the same."""
    rng = np.random.default_rng(2)
    pixels = Tensor(rng.uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32))
    moments = run_unit(pipe.units[3], pipe, {"pixels": pixels})["moments"]
    assert moments.shape == (2, 32, 4, 6)
    assert relative(moments.expand_dims(2), pipe.vae.encode(pixels.expand_dims(2))[0].asnumpy()) < 1e-6
    latents = Tensor(rng.standard_normal((2, 16, 4, 6)).astype(np.float32))
    mean, std = (np.array(pipe.config("vae")[n], np.float32).reshape(1, -1, 1, 1, 1)
                 for n in ("latents_mean", "latents_std"))
    wanted = pipe.vae.decode(latents.expand_dims(2) * Tensor(std) + Tensor(mean))[0].asnumpy()
    found = run_unit(pipe.build_decode(), pipe, {"latents": latents})["pixels"]
    assert relative(found.expand_dims(2), wanted) < 1e-6
    slots = pipe.run(pipe.units[4:], {"moments": moments})
    assert relative(slots["input_latents"], (moments.asnumpy()[:, :16] - mean[:, :, 0]) / std[:, :, 0]) < 1e-6


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting, accepted", [({"zero_cond_t": True}, True), ({"use_layer3d_rope": True}, False)])
def test_settings_of_later_networks(tiny_qwen, tmp_path, setting, accepted):
    config = json.loads((tiny_qwen / "transformer/config.json").read_text()) | setting
    weights = load_state_dict(tiny_qwen / "transformer/diffusion_pytorch_model.safetensors")
    save_sharded(tmp_path / "transformer", weights, config=config)
    loaded = QwenImagePipeline.from_pretrained(ModelConfig(str(tmp_path / "transformer")))
    if accepted:
        assert loaded.dit.proj_out.weight.shape[0] == 64
    else:
        with pytest.raises(WeightError, match="use_layer3d_rope"):
            loaded.dit  # noqa: B018


def test_a_row_is_prepared_in_its_real_length(pipe):
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    slots = pipe.run(pipe.units, {"prompt": PROMPT, "input_image": image})
    assert slots["prompt_embeds"].shape == (1, 19, 32) and slots["prompt_mask"].shape == (1, 19)
    assert slots["prompt_embeds"].dtype == slots["prompt_mask"].dtype == ms.float32
