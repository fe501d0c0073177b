"""FLUX.2: what mindone's network computes, the prompt, latents in patches, editing."""
from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from arrays import noise_image, relative
from mindspore import Tensor, mint
from PIL import Image

from ms_diffsynth import DataError, Flux2ImagePipeline
from ms_diffsynth.formats.weights import load_state_dict, save_sharded
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipelines.flux2.prompt import BEFORE, BEHIND, TEMPLATE
from ms_diffsynth.pipelines.flux2.rotary import edit_places, edit_table, image_places, image_table, text_places
from ms_diffsynth.pipelines.shared.rotary import pairs_table
from ms_diffsynth.units import run_unit

pytestmark = pytest.mark.usefixtures("eager")

PROMPT = "a red cat by the sea"
GUIDANCE = Tensor(np.float32([4.0]))


def with_statistics(folder, seed=4):
    """Give a tiny VAE a batch norm with statistics of its own."""
    file, rng = folder / "vae/diffusion_pytorch_model.safetensors", np.random.default_rng(seed)
    weights = {name: np.array(value) for name, value in load_state_dict(file).items()}
    weights["bn.running_mean"] = rng.standard_normal(128).astype(np.float32)
    weights["bn.running_var"] = rng.uniform(0.3, 3, 128).astype(np.float32)
    config = json.loads((folder / "vae/config.json").read_text())
    shutil.rmtree(folder / "vae")
    save_sharded(folder / "vae", weights, config=config)


@pytest.fixture(scope="module")
def folder(tiny_flux2, tmp_path_factory):
    folder = shutil.copytree(tiny_flux2, tmp_path_factory.mktemp("model") / "flux2")
    with_statistics(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = Flux2ImagePipeline.from_pretrained(str(folder))
    pipe.max_sequence_length = 32
    return pipe


# -- the transformer -------------------------------------------------------------------------------------------------


def dev_config(folder):
    return json.loads((folder / "transformer/config.json").read_text()) | {"guidance_embeds": True}


def test_the_network_is_mindones_own_and_edit_pictures_are_tokens_with_other_places(folder):
    """Eager, where mindone's own ``construct`` runs; with guidance, without which it does not."""
    from mindone.diffusers.models.transformers import transformer_flux2 as mindone

    from ms_diffsynth.pipelines.flux2.transformer import build_transformer

    config = {k: v for k, v in dev_config(folder).items() if not k.startswith("_")}
    dit, rng = build_transformer(config), np.random.default_rng(1)
    for parameter in dit.get_parameters():
        size = np.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 1
        parameter.set_data(Tensor((rng.standard_normal(parameter.shape) / size).astype(np.float32)))
    pipe = Flux2ImagePipeline(models={"dit": dit}, dtype=ms.float32)
    latents, text = (Tensor(rng.standard_normal(s).astype(np.float32)) for s in ((1, 128, 3, 2), (1, 5, 96)))
    edit = Tensor(rng.standard_normal((1, 4 + 6, 128)).astype(np.float32))
    sigma = Tensor(np.float32([0.4]))
    found = pipe.model_fn(latents=latents, sigma=sigma, prompt_embeds=text, guidance=GUIDANCE, edit_latents=edit,
                          edit_places=Tensor(edit_places([(2, 2), (2, 3)])[None]))
    places = [image_places(3, 2), image_places(2, 2, 10), image_places(2, 3, 20)]
    tokens = mint.cat((latents.reshape(1, 128, 6).swapaxes(1, 2), edit), 1)
    dit.__class__ = mindone.Flux2Transformer2DModel
    for block in (*dit.transformer_blocks, *dit.single_transformer_blocks):
        block.__class__ = type(block).__mro__[1]
    wanted = dit(tokens, text, sigma, Tensor(np.concatenate(places).astype(np.float32)),
                 Tensor(text_places(5).astype(np.float32)), GUIDANCE, return_dict=False)[0]
    assert relative(found.reshape(1, 128, 6), wanted[:, :6].swapaxes(1, 2)) < 3e-6


def test_klein_has_no_guidance_and_dev_has(pipe, folder):
    from ms_diffsynth.pipelines.flux2.transformer import build_transformer

    slots = {"latents": Tensor(np.ones((1, 128, 2, 2), np.float32)), "sigma": Tensor(np.float32([0.4])),
             "prompt_embeds": Tensor(np.ones((1, 3, 96), np.float32))}
    first = pipe.model_fn(**slots, guidance=GUIDANCE).asnumpy()
    assert np.array_equal(pipe.model_fn(**slots, guidance=GUIDANCE * 2).asnumpy(), first)
    assert not any("guidance_embedder" in p.name for p in pipe.dit.get_parameters())
    dev = Flux2ImagePipeline(models={"dit": build_transformer(
        {k: v for k, v in dev_config(folder).items() if k[0] != "_"})}, dtype=ms.float32)
    assert sum("guidance_embedder" in p.name for p in dev.dit.get_parameters()) == 2
    first = dev.model_fn(**slots, guidance=GUIDANCE).asnumpy()
    assert not np.array_equal(dev.model_fn(**slots, guidance=GUIDANCE * 2).asnumpy(), first)
    old = {k: v for k, v in dev_config(folder).items() if k[0] != "_" and k != "guidance_embeds"}
    assert build_transformer(old).config["guidance_embeds"] is True


def test_positions_are_rounded_once_from_float64():
    found = pairs_table(np.array([[10.0, 37, 63, 0], [0, 0, 0, 511]]), (32, 32, 32, 32), 2000.0)
    assert found.shape == (2, 2, 128) and found.dtype == np.float32
    assert (found[..., ::2] == found[..., 1::2]).all(), "a pair of channels has one angle"
    found = found[..., ::2]
    for axis, place in enumerate((10, 37, 63)):
        angles = [place / 2000 ** (i / 16) for i in range(16)]
        np.testing.assert_array_equal(found[0, 0, 16 * axis:16 * axis + 16], np.cos(angles).astype(np.float32))
        np.testing.assert_array_equal(found[1, 0, 16 * axis:16 * axis + 16], np.sin(angles).astype(np.float32))
    np.testing.assert_allclose(found[:, 1, 48], [np.cos(511), np.sin(511)], rtol=1e-7)
    whole = np.stack([x.asnumpy() for x in image_table(3, 2, 4, (4, 4, 4, 4), 2000.0)])
    assert whole.shape == (2, 1, 3 + 8, 16)
    whole = whole[..., ::2]
    np.testing.assert_allclose(whole[1, 0, :, 6], np.sin([0, 1, 2] + 8 * [0]), rtol=1e-7)  # text: axis l
    np.testing.assert_allclose(whole[1, 0, :, 2], np.sin(3 * [0] + 4 * [0] + 4 * [1]), rtol=1e-7)  # rows
    np.testing.assert_allclose(whole[1, 0, :, 4], np.sin(3 * [0] + 2 * [0, 1, 2, 3]), rtol=1e-7)  # columns


def test_sigmas_of_four_steps(pipe):
    # DiffSynth-Studio's dynamic shift at 4096 tokens
    wanted = [1, 0.967384, 0.908144, 0.767200, 0]
    np.testing.assert_allclose(pipe.sampling_sigmas(4, (128, 64, 64)), wanted, atol=1e-6)
    mu = 0.00016927 * 5000 + 0.45666666  # of long sequences it does not depend on the number of steps
    assert pipe.sampling_sigmas(2, (128, 50, 100))[1] == pytest.approx(np.exp(mu) / (np.exp(mu) + 1), rel=1e-6)
    assert pipe.training_schedule("sft").sigmas[[500, -1]].tolist() == pytest.approx([0.689974, 0.002223], abs=1e-6)


# -- the prompt ------------------------------------------------------------------------------------------------------


def test_the_prompt_is_tokenized_in_its_template(pipe):
    slots = run_unit(pipe.units[0], pipe, {"prompt": "a photo of sks dog"})
    ids = [*BEFORE, 64, 6548, 315, 1901, 82, 5562, *BEHIND]
    assert slots["prompt_ids"].asnumpy().tolist() == [ids + [151643] * (32 - len(ids))]
    assert slots["prompt_mask"].asnumpy().tolist() == [[1.0] * len(ids) + [0.0] * (32 - len(ids))]
    assert pipe.tokenizer.decode([*BEFORE, *BEHIND]) == TEMPLATE.format("")


def test_kleins_own_tokenizer_knows_the_later_tokens_already(pipe, folder, tmp_path):
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = Flux2ImagePipeline.from_pretrained(str(folder), tokenizer_config=ModelConfig(str(tmp_path / "tokenizer")))
    own.max_sequence_length = 32
    found, wanted = (run_unit(p.units[0], p, {"prompt": PROMPT})["prompt_ids"].asnumpy() for p in (own, pipe))
    assert np.array_equal(found, wanted) and len(own.tokenizer) == len(pipe.tokenizer) == 151669


def test_a_long_prompt_is_cut_and_said(pipe, caplog):
    with caplog.at_level("WARNING"):
        slots = run_unit(pipe.units[0], pipe, {"prompt": "one two " * 20})
    assert slots["prompt_ids"].shape == (1, 32) and slots["prompt_mask"].asnumpy().all()
    assert "prompt of 53 tokens, template included, is cut to 32" in caplog.text


# -- the picture -----------------------------------------------------------------------------------------------------


def patches(z):
    """2x2 patches into channels, in a loop."""
    return np.stack([z[:, c, i::2, j::2] for c in range(z.shape[1]) for i in range(2) for j in range(2)], 1)


def test_latents_are_patches_normalised_by_the_batch_norm(pipe):
    statistics = pipe.vae.bn.running_mean, pipe.vae.bn.running_var
    mean, variance = (value.asnumpy()[:, None, None] for value in statistics)
    variance = variance + 1e-4
    pixels = pipe.preprocess_image(noise_image(32, 48))
    posterior = pipe.vae._encode(pixels).asnumpy()
    slots = pipe.run(pipe.units[3:], {"pixels": pixels})
    assert slots["moments"].shape == (1, 256, 2, 3)
    wanted = (patches(posterior[:, :32]) - mean) / np.sqrt(variance)
    assert relative(slots["input_latents"], wanted) < 2e-6
    spread = np.exp(slots["moments"].asnumpy()[:, 128:] / 2) * np.sqrt(variance)
    assert relative(spread, patches(np.exp(posterior[:, 32:] / 2))) < 2e-6


def test_decoding_undoes_the_normalisation(pipe):
    pixels = pipe.preprocess_image(noise_image(32, 48))
    latents = pipe.run(pipe.units[3:], {"pixels": pixels})["input_latents"]
    wanted = pipe.vae.decode(pipe.vae._encode(pixels)[:, :32], return_dict=False)[0]
    assert relative(run_unit(pipe.build_decode(), pipe, {"latents": latents})["pixels"], wanted) < 1e-5
    assert pipe.latent_shape(32, 48) == (128, 2, 3) == latents.shape[1:]


# -- editing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def editing(folder):
    pipe = Flux2ImagePipeline.from_pretrained(str(folder))
    pipe.max_sequence_length = 32
    pipe.use_input("edit_image")
    pipe.use_input("edit_image")  # a second time changes nothing
    return pipe


def test_edit_pictures_are_prepared_each_in_its_size(editing):
    edit = [noise_image(32, 40), noise_image(16, 48)]
    row = {"prompt": PROMPT, "input_image": noise_image(32, 32), "edit_image": edit}
    slots = editing.run(editing.units, row)
    assert slots["edit_latents"].shape == (1, 2 * 2 + 1 * 3, 128) and slots["edit_places"].shape == (1, 7, 4)
    first = editing.run(editing.units[5:6], {"pixels": editing.preprocess_image(edit[1])})["moments"][:, :128]
    assert relative(slots["edit_latents"][:, 4:], first.reshape(1, 128, 3).swapaxes(1, 2)) < 1e-6
    np.testing.assert_array_equal(slots["edit_places"].asnumpy()[0, :, 0], [10] * 4 + [20] * 3)
    looked_up = np.stack([x.asnumpy() for x in edit_table(slots["edit_places"], (8, 8, 8, 8), 2000)])
    wanted = pairs_table(slots["edit_places"].asnumpy()[0].astype(float), (8, 8, 8, 8), 2000)
    np.testing.assert_array_equal(looked_up[:, 0], wanted)


def test_transparency_of_an_edit_image_is_laid_over_white(editing):
    """As `data.images.read_image` does with files; what lies below transparent pixels is not seen."""
    hidden = np.asarray(noise_image(32, 32))
    alpha = np.zeros((32, 32), np.uint8)
    alpha[:, 16:] = 255
    white = hidden.copy()
    white[:, :16] = 255
    row = {"prompt": PROMPT, "input_image": noise_image(32, 32)}
    images = [Image.fromarray(a) for a in (np.dstack([hidden, alpha]), white, hidden)]
    found, wanted, below = (editing.run(editing.units, row | {"edit_image": i})["edit_latents"] for i in images)
    assert np.array_equal(found.asnumpy(), wanted.asnumpy()) and relative(found, below.asnumpy()) > 1e-3


def test_training_reads_edit_pictures_once_told_to(editing, pipe):
    objective = pipe.objective
    sigmas = pipe.training_schedule("sft").sigmas
    plain, edit = (p.training_program(objective, sigmas).cut(("loss",), ("dit",)) for p in (pipe, editing))
    assert set(edit.cache) - set(plain.cache) == {"edit_latents", "edit_places"}
    assert edit.models("step") == ("dit",) and "edit_image" in edit.inputs and "edit_image" not in plain.inputs


def test_two_rows_with_edit_pictures_of_two_shapes_share_a_batch(editing):
    rng = np.random.default_rng(0)
    shapes = {"latents": (128, 2, 2), "prompt_embeds": (5, 96), "edit_latents": (4, 128)}
    slots = {name: rng.standard_normal((2, *shape)).astype(np.float32) for name, shape in shapes.items()}
    slots["sigma"] = np.float32([0.3, 0.8])
    slots["edit_places"] = np.stack([edit_places([side]) for side in ((2, 2), (1, 4))])
    both = editing.model_fn(**{n: Tensor(v) for n, v in slots.items()}).asnumpy()
    for k in range(2):
        alone = editing.model_fn(**{n: Tensor(v[k:k + 1]) for n, v in slots.items()})
        assert relative(alone, both[k:k + 1]) < 2e-6
    slots["edit_places"] = slots["edit_places"][::-1].copy()
    assert relative(editing.model_fn(**{n: Tensor(v) for n, v in slots.items()}), both) > 1e-4


@pytest.mark.parametrize("wrong", ["cat.png", ["cat.png"]])
def test_what_is_no_picture_is_refused(editing, wrong):
    with pytest.raises(DataError, match="expected an image or a list of images"):
        editing.run(editing.units, {"prompt": "a", "input_image": noise_image(32, 32), "edit_image": wrong})
