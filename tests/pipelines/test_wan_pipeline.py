"""Wan: what a model takes, prompts, given frames, experts, how its transformer is called."""
from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, DataError, WeightError
from ms_diffsynth.formats.lora import TRAINED_MODELS, save_lora
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.pipelines.wan import FAMILY
from ms_diffsynth.pipelines.wan.denoise import Denoise, DenoiseLittle, from_patches, to_patches
from ms_diffsynth.pipelines.wan.pipeline import WanVideoPipeline
from ms_diffsynth.pipelines.wan.published import PUBLISHED
from ms_diffsynth.pipelines.wan.units import cleaned, given_mask, squashed
from ms_diffsynth.training.module import DiffusionTrainingModule

pytestmark = pytest.mark.usefixtures("eager")
SIZE = {"num_frames": 5, "height": 32, "width": 64}
RED = Image.new("RGB", (90, 50), (200, 30, 30))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by name, written when they are first asked for."""
    root, made = tmp_path_factory.mktemp("wan"), {}

    def model(name):
        if name not in made:
            {"t2v": FAMILY.write_tiny, **FAMILY.tiny_variants}[name](root / name, 0)
            made[name] = root / name
        return made[name]

    return model


@pytest.fixture
def pipe_of(models):
    return lambda name: WanVideoPipeline.from_pretrained(str(models(name)))


def film(frames=5, height=32, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.mark.parametrize("name, factor, rate, inputs, cfg", [
    ("t2v", 16, 16, [], 5.0), ("i2v", 16, 16, ["input_image", "end_image"], 5.0), ("a14b", 16, 16, [], 4.0),
    ("i2v-a14b", 16, 16, ["input_image", "end_image"], 3.5), ("ti2v", 32, 24, ["input_image"], 5.0)])
def test_what_a_model_takes_is_read_from_its_files(pipe_of, name, factor, rate, inputs, cfg):
    pipe = pipe_of(name)
    assert (pipe.division_factor, pipe.frame_rate, list(pipe.optional_units)) == (factor, rate, inputs)
    assert pipe.sampling.cfg_scale == cfg
    assert pipe.latent_shape(17, 64, 96) == ((48, 5, 4, 6) if name == "ti2v" else (16, 5, 8, 12))


def test_prompts_are_cleaned_as_in_diffusers():
    assert cleaned("  A &amp;amp; B\n\t Cat  ") == "A & B Cat"


def test_a_prompt_is_encoded_in_its_length_and_its_padding_is_zero(pipe_of):
    pipe = pipe_of("t2v")
    slots = pipe.run(pipe.units[:2], {"prompt": "a cat runs"})
    ids, embeds = slots["prompt_ids"].asnumpy(), slots["prompt_embeds"].asnumpy()
    padded = Tensor(np.pad(ids, ((0, 0), (0, 9))))
    wide = pipe.run(pipe.units[1:2], {"prompt_ids": padded})["prompt_embeds"].asnumpy()
    assert ids[0, -1] == 1 and embeds.shape == wide.shape == (1, 512, 32)
    assert np.abs(wide[:, ids.shape[1]:]).max() == np.abs(embeds[:, ids.shape[1]:]).max() == 0
    np.testing.assert_allclose(wide, embeds, rtol=0, atol=5e-6)


def test_the_tokenizer_of_another_model_is_refused(pipe_of, models, tmp_path):
    folder = shutil.copytree(models("t2v"), tmp_path / "model")
    file = folder / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 256384}))
    with pytest.raises(WeightError, match="the tokenizer knows 32100 tokens and the text encoder 256384"):
        WanVideoPipeline.from_pretrained(str(folder)).condition("a cat")


def test_patches_have_the_channel_first_and_come_back_with_it_last():
    """Source: diffusers 0.39, WanTransformer3DModel: a Conv3d in front, an unpatch with the channel last behind."""
    latents = np.arange(2 * 3 * 2 * 4 * 6, dtype=np.float32).reshape(2, 3, 2, 4, 6)
    patches = to_patches(Tensor(latents)).asnumpy()
    np.testing.assert_array_equal(patches[1, 6 + 3 + 2].reshape(3, 2, 2), latents[1, :, 1, 2:4, 4:6])
    back = patches.reshape(2, 12, 3, 4).swapaxes(2, 3).reshape(2, 12, 12)
    np.testing.assert_array_equal(from_patches(Tensor(back), 2, 4, 6).asnumpy(), latents)


def test_which_frames_are_given():
    first, both = (given_mask(3, has_end).asnumpy()[0, :, :, 0, 0] for has_end in (False, True))
    np.testing.assert_array_equal(first, [[1, 0, 0]] * 4)
    np.testing.assert_array_equal(both, [[1, 0, 0]] * 3 + [[1, 0, 1]])


def test_texts_and_frames_are_encoded_as_pytorch_does_it(pipe_of, golden):
    """transformers 4.57 and diffusers 0.39 on the same weights (tests/golden/make_wan_encoders.py); the last prompt is
    longer than the distances that UMT5 tells apart."""
    pipe, expected = pipe_of("i2v"), load_state_dict(golden / "wan_encoders/expected.safetensors")
    for k, prompt in enumerate(PROMPTS):
        slots = pipe.run(pipe.units[:2], {"prompt": prompt})
        np.testing.assert_array_equal(slots["prompt_ids"].asnumpy(), expected[f"ids.{k}"])
        wanted = expected[f"embeds.{k}"]
        found = slots["prompt_embeds"].asnumpy()[:, :wanted.shape[1]]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    frame, wanted = expected["frame"], expected["image_embeds"]
    # PyTorch has places between pixels in float32
    np.testing.assert_allclose(squashed(frame, 224)[:, ::32], expected["squashed"], rtol=0, atol=6e-6)
    tokens = pipe.optional_units["input_image"][2].process(pipe, Tensor(frame[None, :, None]))["image_embeds"].asnumpy()
    assert tokens.shape == (1, 257, 32)
    np.testing.assert_allclose(tokens[:, ::8], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


PROMPTS = ("", "a red cat", "A  cat &amp;amp; a dog\n run " + "through the long wet grass of a meadow " * 16)


def test_given_frames_are_those_of_the_film_in_training_and_cropped_images_in_sampling(pipe_of):
    pipe = pipe_of("i2v")
    load = pipe.optional_units["input_image"][0]
    own = load.process(pipe, None, None, film(), 5, 32, 64)
    np.testing.assert_allclose(own["given_pixels"].asnumpy()[0, :, 0], film()[0].transpose(2, 0, 1) / 127.5 - 1,
                               rtol=0, atol=1e-6)
    assert np.abs(own["given_pixels"].asnumpy()[:, :, 1:]).max() == 0
    both = load.process(pipe, RED, RED, None, 5, 32, 64)
    assert both["first_pixels"].shape == (1, 3, 2, 32, 64)
    np.testing.assert_array_equal(both["given_pixels"].asnumpy()[:, :, 0], both["given_pixels"].asnumpy()[:, :, -1])
    pipe.use_input("input_image")
    with pytest.raises(DataError, match="one frame, and input_image gives the first frame"):
        load.process(pipe, None, None, film(1), 1, 32, 64)
    with pytest.raises(ConfigError, match=r"num_frames=1: .* Raise num_frames\.$"):
        load.process(pipe, RED, None, None, 1, 32, 64)
    with pytest.raises(ConfigError, match="given the first frame alone"):
        pipe_of("ti2v").optional_units["input_image"][0].process(pipe_of("ti2v"), RED, RED, None, 5, 32, 64)


@pytest.mark.parametrize("name", ["t2v", "i2v", "a14b", "ti2v"])
@pytest.mark.few(1)
def test_films_are_sampled(pipe_of, name):
    pipe = pipe_of(name)
    given = {"input_image": RED} if pipe.optional_units else {}
    steps = []
    found = pipe("a cat", seed=1, num_inference_steps=3, on_step=lambda *step: steps.append(step), **SIZE, **given)
    assert found.dtype == np.uint8 and found.shape == (5, 32, 64, 3) and steps[-1] == (3, 3)
    again = pipe("a cat", seed=1, num_inference_steps=3, **SIZE, **given)
    np.testing.assert_array_equal(found, again)


def test_a_completed_film_begins_with_the_frame_that_was_given(pipe_of):
    pipe = pipe_of("ti2v")
    condition = pipe.condition("a cat", input_image=RED, **SIZE)
    latents = np.random.default_rng(0).standard_normal((1, 48, 2, 2, 4)).astype(np.float32)
    found = pipe.integrate(condition, None, latents, np.array([1, 0.5, 0], np.float32))
    np.testing.assert_array_equal(found.asnumpy()[:, :, :1], condition["given_latents"].asnumpy())
    other = latents.copy()
    other[:, :, 0] = 7  # what stands there does not matter
    np.testing.assert_array_equal(pipe.integrate(condition, None, other, np.array([1, 0.5, 0], np.float32)).asnumpy(),
                                  found.asnumpy())


def test_experts_take_over_at_the_boundary_each_with_its_guidance(pipe_of, monkeypatch):
    pipe = pipe_of("a14b")
    seen = []

    def guided(self, positive, negative, cfg_scale, unit=None):
        def denoise(latents, sigma):
            seen.append((unit.onload_model_names[0], round(float(sigma.asnumpy()[0]), 4), cfg_scale))
            return latents * 0

        return denoise

    monkeypatch.setattr(WanVideoPipeline.__mro__[2], "guided", guided)
    for cfg_scale in (4.0, 2.0):
        pipe.integrate({}, {}, np.zeros((1, 16, 1, 2, 2), np.float32), np.array([1, 0.875, 0.874, 0], np.float32),
                       cfg_scale)
    assert seen == [("dit", 1.0, 4.0), ("dit", 0.875, 4.0), ("dit2", 0.874, 3.0),
                    ("dit", 1.0, 2.0), ("dit", 0.875, 2.0), ("dit2", 0.874, 2.0)]


def test_a_lora_goes_to_the_expert_that_its_header_or_the_caller_names(pipe_of, tmp_path):
    """The files of both have the same names in every program."""
    pipe, files = pipe_of("a14b"), {"told": {TRAINED_MODELS: "dit2"}, "untold": {}}
    for name, header in files.items():
        pairs = {"blocks.0.self_attn.q": (np.ones((2, 96), np.float32), np.ones((96, 2), np.float32))}
        save_lora(tmp_path / name, pairs, 1, "diffusion_model", header)
    before = {name: getattr(pipe, name).blocks[0].attn1.to_q.weight.asnumpy().copy() for name in ("dit", "dit2")}

    def changed():
        found = [name for name, weight in before.items()
                 if (getattr(pipe, name).blocks[0].attn1.to_q.weight.asnumpy() != weight).any()]
        pipe.clear_lora()
        return found

    assert pipe.load_lora(None, tmp_path / "told") == 1 and changed() == ["dit2"]
    with pytest.raises(ConfigError, match="both experts have the same names"):
        pipe.load_lora(None, tmp_path / "untold")
    for name in before:
        assert pipe.load_lora(name, tmp_path / "untold") == 1 and changed() == [name]
    assert pipe.load_lora(pipe.dit2, tmp_path / "untold") == 1 and changed() == ["dit2"]
    assert pipe_of("t2v").load_lora(None, tmp_path / "told") == 1  # which has one network


@pytest.mark.parametrize("name, trained, expert, expected", [
    ("t2v", "dit", None, None), ("a14b", "dit", None, (0, 417)), ("a14b", "dit2", None, (417, 1000)),
    ("i2v-a14b", "dit", None, (0, 358)), ("t2v", "dit", "low_noise", (417, 1000)),
    ("t2v", "dit", "high_noise", (0, 417))])
def test_an_expert_is_trained_on_its_own_noise_levels(pipe_of, name, trained, expert, expected):
    """417 and 358 of 1000: DiffSynth-Studio's boundaries, of its grid."""
    pipe, module = pipe_of(name), DiffusionTrainingModule()
    module.pipe, pipe.expert = pipe, expert
    extra = "input_image" if pipe.has_condition else None
    module.switch_pipe_to_training_mode(pipe, lora_base_model=trained, lora_rank=2, extra_inputs=extra)
    assert pipe.network == trained and pipe.objective.index_range == expected
    index = pipe.objective.timestep_index(np.array([0.0, 0.5, 0.99999], np.float32), 1000)
    first, end = expected or (0, 1000)
    assert index.min() == first and index.max() == end - 1 and index.dtype == np.int32


def test_what_cannot_be_trained_is_said(pipe_of):
    module = DiffusionTrainingModule()
    with pytest.raises(ConfigError, match="Set extra_inputs to input_image"):
        module.switch_pipe_to_training_mode(pipe_of("i2v"), lora_base_model="dit")
    with pytest.raises(ConfigError, match="a run trains one expert"):
        module.switch_pipe_to_training_mode(pipe_of("a14b"), trainable_models="dit,dit2")
    pipe = pipe_of("a14b")
    pipe.expert = "low_noise"
    with pytest.raises(ConfigError, match="Train dit2, or remove expert"):
        module.switch_pipe_to_training_mode(pipe, lora_base_model="dit")


def test_a_film_must_have_more_than_the_frame_that_is_given(pipe_of):
    needs, may = pipe_of("i2v"), pipe_of("ti2v")
    assert needs.film_problem(5, ["input_image"]) == may.film_problem(1, ["prompt"]) == ""
    assert needs.film_problem(1, ["input_image"]).endswith("Train on longer films alone")
    assert may.film_problem(1, ["input_image"]).endswith("or take input_image out of extra_inputs")


def test_a_model_of_images_needs_one(pipe_of):
    with pytest.raises(ConfigError, match="input_image is missing: this model makes videos of images"):
        pipe_of("i2v-a14b")("a cat", **SIZE)
    with pytest.raises(ConfigError, match="WanVideoPipeline has no input input_image"):
        pipe_of("t2v")("a cat", input_image=RED, **SIZE)


def test_the_levels_of_the_published_files(pipe_of):
    """diffusers 0.39: UniPCMultistepScheduler with flow sigmas, 3 steps, shift 5."""
    sigmas = pipe_of("t2v").sampling_sigmas(3, (16, 2, 4, 8))
    alphas = np.linspace(1, 1e-3, 4)[:-1]
    np.testing.assert_allclose(sigmas, [*(5 * alphas / (1 + 4 * alphas)), 0], rtol=0, atol=1e-6)


def test_published_models_are_known_by_their_shapes():
    assert PUBLISHED["Wan2.2-TI2V-5B"]["dit"]["in_channels"] == 48 and Objective(index_range=(0, 417)).index_range
    assert (Denoise.onload_model_names, DenoiseLittle.onload_model_names) == (("dit",), ("dit2",))
    assert ms.float32
