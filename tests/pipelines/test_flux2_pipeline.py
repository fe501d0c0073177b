"""FLUX.2: what mindone's networks compute, the prompt, latents in patches, editing, the documents' way to load it."""
from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor, mint
from PIL import Image

from ms_diffsynth import DataError, Flux2ImagePipeline, runtime
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_sharded
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipelines.flux2.prompt import BEFORE, BEHIND, TEMPLATE
from ms_diffsynth.pipelines.flux2.rotary import edit_places, edit_table, image_places, image_table, table, text_places
from ms_diffsynth.units import run_unit

PROMPT = "a red cat by the sea"
GUIDANCE = Tensor(np.float32([4.0]))


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Without compilation, which tests/pipelines/test_contract.py covers."""
    runtime.configure("pynative", DEVICE)
    yield
    runtime.configure("graph", DEVICE)


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


def relative(found, wanted):
    found = found.asnumpy() if isinstance(found, Tensor) else found
    wanted = wanted.asnumpy() if isinstance(wanted, Tensor) else wanted
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


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
    found = table(np.array([[10.0, 37, 63, 0], [0, 0, 0, 511]]), (32, 32, 32, 32), 2000.0)
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


def test_the_text_encoder_is_mindones_own_at_a_quarter_a_half_and_three_quarters(pipe, folder):
    from mindone.transformers.models.qwen3 import modeling_qwen3 as mindone
    from transformers import Qwen3Config

    config = Qwen3Config(**json.loads((folder / "text_encoder/config.json").read_text()))
    whole = mindone.Qwen3Model._from_config(config).set_train(False)
    given = {p.name: p for p in pipe.text_encoder.model.get_parameters()}
    for name, parameter in whole.parameters_and_names():
        if f"model.{name}" in given:
            parameter.set_data(given[f"model.{name}"])
    slots = run_unit(pipe.units[0], pipe, {"prompt": PROMPT})
    ids, mask = slots["prompt_ids"], slots["prompt_mask"]
    assert 0 < mask.asnumpy().sum() < mask.shape[1]
    states = whole(ids, attention_mask=mask.astype(ms.int32), output_hidden_states=True, use_cache=False)[2]
    found = run_unit(pipe.units[1], pipe, slots)["prompt_embeds"]
    assert pipe.text_encoder.model.taken == (1, 2, 3)
    assert relative(found, mint.cat((states[1], states[2], states[3]), -1)) < 2e-6


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


def test_another_models_tokenizer_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    vocabulary = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["assistant"], vocabulary["user"] = vocabulary["user"], vocabulary["assistant"]
    (copy / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    pipe = Flux2ImagePipeline.from_pretrained(str(folder), tokenizer_config=ModelConfig(str(copy)))
    with pytest.raises(WeightError, match=r"another model's\. Give the tokenizer/ folder of FLUX\.2-klein"):
        pipe.condition("a cat")


# -- the picture -----------------------------------------------------------------------------------------------------


def patches(z):
    """2x2 patches into channels, in a loop."""
    return np.stack([z[:, c, i::2, j::2] for c in range(z.shape[1]) for i in range(2) for j in range(2)], 1)


def test_latents_are_patches_normalised_by_the_batch_norm(pipe):
    statistics = pipe.vae.bn.running_mean, pipe.vae.bn.running_var
    mean, variance = (value.asnumpy()[:, None, None] for value in statistics)
    variance = variance + 1e-4
    pixels = pipe.preprocess_image(picture(32, 48))
    posterior = pipe.vae._encode(pixels).asnumpy()
    slots = pipe.run(pipe.units[3:], {"pixels": pixels})
    assert slots["moments"].shape == (1, 256, 2, 3)
    wanted = (patches(posterior[:, :32]) - mean) / np.sqrt(variance)
    assert relative(slots["input_latents"], wanted) < 2e-6
    spread = np.exp(slots["moments"].asnumpy()[:, 128:] / 2) * np.sqrt(variance)
    assert relative(spread, patches(np.exp(posterior[:, 32:] / 2))) < 2e-6


def test_decoding_undoes_the_normalisation(pipe):
    pixels = pipe.preprocess_image(picture(32, 48))
    latents = pipe.run(pipe.units[3:], {"pixels": pixels})["input_latents"]
    wanted = pipe.vae.decode(pipe.vae._encode(pixels)[:, :32], return_dict=False)[0]
    assert relative(run_unit(pipe.build_decode(), pipe, {"latents": latents})["pixels"], wanted) < 1e-5
    assert pipe.latent_shape(32, 48) == (128, 2, 3) == latents.shape[1:]


def test_pictures_depend_on_seed_prompt_guidance_and_edit_picture(pipe):
    def image(**kwargs):
        given = {"prompt": "a cat", "height": 32, "width": 48, "seed": 1, "num_inference_steps": 2} | kwargs
        return np.asarray(pipe(**given), np.int16)

    base, edited = image(), image(edit_image=picture(32, 32))
    assert base.shape == edited.shape == (32, 48, 3) and (base != edited).any()
    for change in ({"seed": 2}, {"prompt": "a dog"}, {"cfg_scale": 4.0}):
        assert (image(**change) != base).any(), change
    assert (image(edit_image=picture(32, 32, seed=1)) != edited).any()
    assert (image(edit_image=[picture(32, 32), picture(16, 48)]) != edited).any()
    np.testing.assert_array_equal(image(edit_image=picture(32, 32)), edited)
    np.testing.assert_array_equal(image(cfg_scale=1.0), base)


# -- editing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def editing(folder):
    pipe = Flux2ImagePipeline.from_pretrained(str(folder))
    pipe.max_sequence_length = 32
    pipe.use_input("edit_image")
    pipe.use_input("edit_image")  # a second time changes nothing
    return pipe


def test_edit_pictures_are_prepared_each_in_its_size(editing):
    row = {"prompt": PROMPT, "input_image": picture(32, 32), "edit_image": [picture(32, 40), picture(16, 48)]}
    slots = editing.run(editing.units, row)
    assert slots["edit_latents"].shape == (1, 2 * 2 + 1 * 3, 128) and slots["edit_places"].shape == (1, 7, 4)
    first = editing.run(editing.units[4:5], {"pixels": editing.preprocess_image(picture(16, 48))})["moments"][:, :128]
    assert relative(slots["edit_latents"][:, 4:], first.reshape(1, 128, 3).swapaxes(1, 2)) < 1e-6
    np.testing.assert_array_equal(slots["edit_places"].asnumpy()[0, :, 0], [10] * 4 + [20] * 3)
    looked_up = np.stack([x.asnumpy() for x in edit_table(slots["edit_places"], (8, 8, 8, 8), 2000)])
    np.testing.assert_array_equal(looked_up[:, 0], table(slots["edit_places"].asnumpy()[0].astype(float),
                                                         (8, 8, 8, 8), 2000))


def test_transparency_of_an_edit_image_is_laid_over_white(editing):
    """As `data.images.read_image` does with files; what lies below transparent pixels is not seen."""
    hidden = np.asarray(picture(32, 32))
    alpha = np.zeros((32, 32), np.uint8)
    alpha[:, 16:] = 255
    white = hidden.copy()
    white[:, :16] = 255
    row = {"prompt": PROMPT, "input_image": picture(32, 32)}
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


@pytest.mark.parametrize("wrong", ["cat.png", [], ["cat.png"]])
def test_what_is_no_picture_is_refused(editing, wrong):
    with pytest.raises(DataError, match="expected an image or a list of images"):
        editing.run(editing.units, {"prompt": "a", "input_image": picture(32, 32), "edit_image": wrong})


# -- loading ---------------------------------------------------------------------------------------------------------


def test_the_documents_way_to_load(tiny_flux2, tmp_path, monkeypatch):
    (tmp_path / "black-forest-labs").mkdir()
    for name in ("FLUX.2-klein-4B", "FLUX.2-klein-base-4B"):
        (tmp_path / "black-forest-labs" / name).symlink_to(tiny_flux2)
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    four, base = "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-base-4B"
    loaded = Flux2ImagePipeline.from_pretrained(
        mindspore_dtype=ms.float32, device=DEVICE,
        model_configs=[
            ModelConfig(model_id=four, origin_file_pattern="text_encoder/*.safetensors"),
            ModelConfig(model_id=base, origin_file_pattern="transformer/*.safetensors"),
            ModelConfig(model_id=four, origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
        ],
        tokenizer_config=ModelConfig(model_id=four, origin_file_pattern="tokenizer/"),
    )
    assert set(loaded.sources) == set(loaded.model_names) and not loaded.models
    loaded(prompt="a cat", height=32, width=32, num_inference_steps=1)
    assert set(loaded.models) == set(loaded.model_names)


def test_what_klein_does_not_use_of_qwen3_is_not_loaded(folder, tmp_path):
    weights = load_state_dict(folder / "text_encoder/model.safetensors")
    more = {"lm_head.weight": 3, "model.norm.weight": 32, "model.layers.35.mlp.up_proj.weight": 3}
    more = {name: np.zeros(size, np.float32) for name, size in more.items()}
    config = json.loads((folder / "text_encoder/config.json").read_text())
    save_sharded(tmp_path / "text_encoder", weights | more, stem="model", config=config)
    loaded = Flux2ImagePipeline.from_pretrained(ModelConfig(str(tmp_path / "text_encoder")))
    assert len(list(loaded.text_encoder.get_parameters())) == len(weights) == 1 + 3 * 11
    save_sharded(tmp_path / "odd", weights | {"more.weight": np.zeros(3, np.float32)}, stem="model", config=config)
    with pytest.raises(WeightError, match=r"1 superfluous: more\.weight"):
        Flux2ImagePipeline.from_pretrained(ModelConfig(str(tmp_path / "odd"))).text_encoder  # noqa: B018
