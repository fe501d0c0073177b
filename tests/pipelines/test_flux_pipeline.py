"""FLUX.1: tokenizers, loading from folders, shards and a hub, packing, inference."""
from __future__ import annotations

import json
import shutil
import sys

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from hub_server import HubServer
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import FluxImagePipeline, ModelConfig, runtime
from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.errors import DataError, DeviceError, WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_sharded
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.pipelines.flux.denoise import image_ids

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe(tiny_flux):
    pipe = FluxImagePipeline.from_pretrained(str(tiny_flux))
    pipe.max_sequence_length = 16
    return pipe


# Ids of the original tokenizers, computed with transformers 4.57.1 from the files of black-forest-labs/FLUX.1-dev.
@pytest.mark.parametrize(("name", "ids"), [
    ("tokenizer_1", [49406, 320, 1125, 539, 48136, 1929, 49407]),
    ("tokenizer_2", [3, 9, 1202, 13, 3, 7, 157, 7, 1782, 1]),
])
def test_shipped_tokenizers_are_the_real_ones(pipe, name, ids):
    assert getattr(pipe, name)("a photo of sks dog").input_ids == ids


# transformers 4.57.1, CLIPTokenizer with ftfy 6.3: what DiffSynth-Studio requires
@pytest.mark.parametrize(("text", "ids"), [
    ("a sign that says “hello world” and ‘bye’ – it’s fine…",
     [49406, 320, 2292, 682, 1563, 257, 3306, 1002, 257, 537, 262, 4460, 262, 1224, 585, 568, 3797, 959, 49407]),
    ("一只红色的猫在海边，背景是日落。",
     [49406, 19759, 222, 34517, 103, 163, 118, 95, 164, 231, 110, 163, 248, 226, 163, 234, 104, 37746, 101, 162, 113,
      115, 164, 122, 373, 267, 164, 225, 234, 48132, 107, 42891, 107, 39121, 164, 238, 377, 38000, 49407]),
    ("ＡＢＣ １２３", [49406, 5334, 272, 273, 274, 49407]),
    ("a &amp; b &lt;c&gt; cat &quot;x&quot;", [49406, 320, 261, 321, 283, 322, 285, 2368, 257, 343, 257, 49407]),
    ("ﬁne oﬃce", [49406, 3797, 2171, 49407]),
    ("a cat 🐱 with hearts ❤️ and 👨\u200d👩\u200d👧\u200d👦",
     [49406, 320, 2368, 22979, 593, 5516, 1752, 537, 25023, 26304, 48938, 4244, 964, 355, 49407]),
])
def test_clip_reads_quotes_chinese_and_emoji_as_the_reference(pipe, text, ids):
    assert pipe.tokenizer_1(text).input_ids == ids


def test_clip_without_ftfy_is_refused(tiny_flux, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(DeviceError, match=r"ftfy is not installed: CLIP's tokenizer needs it.* pip install ftfy"):
        FluxImagePipeline.from_pretrained(str(tiny_flux)).tokenizer_1  # noqa: B018


def test_prompts_are_padded_and_what_is_cut_is_logged(pipe, caplog):
    slots = pipe.run(pipe.units[:1], {"prompt": "a cat"})
    assert slots["clip_ids"].shape == (1, 77) and slots["t5_ids"].shape == (1, 16)
    with caplog.at_level("WARNING"):
        pipe.run(pipe.units[:1], {"prompt": "cat " * 100})
    assert "101 T5 tokens is cut to 16" in caplog.text and "102 CLIP tokens is cut to 77" in caplog.text


def test_packing_is_its_own_inverse_and_matches_the_layout():
    x = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    tokens = pack(Tensor(x))
    assert tokens.shape == (2, 6, 12)
    # the second patch of the first row
    np.testing.assert_array_equal(tokens.asnumpy()[0, 1], x[0, :, 0:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpack(tokens, 4, 6).asnumpy(), x)


def test_image_ids_are_row_and_column():
    ids = image_ids(4, 6).asnumpy()
    assert ids.shape == (6, 3) and ids[4].tolist() == [0, 1, 1]


def test_models_are_loaded_at_first_use_and_frozen(tiny_flux):
    pipe = FluxImagePipeline.from_pretrained(str(tiny_flux))
    assert not pipe.models
    assert not any(p.requires_grad for p in pipe.dit.get_parameters())
    assert set(pipe.models) == {"dit"}
    pipe.load_models_to_device(["vae"])
    assert set(pipe.models) == {"dit", "vae"}


def test_weights_arrive_unchanged(tiny_flux, pipe):
    for name, file in (("dit", f"transformer/{WEIGHTS}"), ("vae", f"vae/{WEIGHTS}"),
                       ("text_encoder_1", "text_encoder/model.safetensors")):
        saved = load_state_dict(tiny_flux / file)
        for key, value in state_dict(getattr(pipe, name)).items():
            np.testing.assert_array_equal(value, saved[key], err_msg=key)


def test_a_component_at_a_time_by_path_or_glob(tiny_flux):
    pipe = FluxImagePipeline.from_pretrained([ModelConfig(str(tiny_flux / "transformer")),
                                              ModelConfig(str(tiny_flux / "vae" / "*.safetensors"))])
    assert set(pipe.sources) == {"dit", "vae"}
    assert pipe.latent_shape(64, 48) == (16, 8, 6)
    with pytest.raises(WeightError, match=r"'text_encoder_1' is needed, but no files.*'text_encoder' folder"):
        pipe.text_encoder_1  # noqa: B018


def sharded(tiny_flux, folder):
    """The transformer's folder, its weights in several shards."""
    save_sharded(folder, load_state_dict(tiny_flux / "transformer" / WEIGHTS), max_shard_bytes=3_000_000,
                 config=json.loads((tiny_flux / "transformer" / "config.json").read_text()))
    return sorted(folder.glob("*.safetensors"))


def test_shards_are_read_and_a_missing_one_is_named(tiny_flux, pipe, tmp_path):
    shards = sharded(tiny_flux, tmp_path / "transformer")
    assert len(shards) > 2
    for config in (str(tmp_path / "transformer"), str(tmp_path / "transformer" / "*.safetensors")):
        dit = FluxImagePipeline.from_pretrained(ModelConfig(config)).dit
        np.testing.assert_array_equal(dit.proj_out.weight.asnumpy(), pipe.dit.proj_out.weight.asnumpy())
    shards[1].unlink()
    for config in (str(tmp_path / "transformer"), str(tmp_path / "transformer" / "*.safetensors")):
        with pytest.raises(WeightError, match=shards[1].name):
            FluxImagePipeline.from_pretrained(ModelConfig(config)).dit  # noqa: B018


def test_weights_that_do_not_fit_are_listed(tiny_flux, tmp_path):
    folder = tmp_path / "transformer"
    weights = load_state_dict(tiny_flux / "transformer" / WEIGHTS)
    weights["proj_out.weights"] = weights.pop("proj_out.weight")
    weights["x_embedder.bias"] = weights["x_embedder.bias"][:-1]
    save_sharded(folder, weights, config=json.loads((tiny_flux / "transformer" / "config.json").read_text()))
    with pytest.raises(WeightError) as error:
        FluxImagePipeline.from_pretrained(ModelConfig(str(folder))).dit  # noqa: B018
    for part in ("1 missing: proj_out.weight (near: proj_out.weights)", "1 superfluous: proj_out.weights",
                 "x_embedder.bias (127,), expected (128,)"):
        assert part in str(error.value)


def test_from_a_hub_by_id_and_pattern_with_a_pinned_revision(tiny_flux, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    sharded(tiny_flux, tmp_path / "shards")
    files = {f"transformer/{f.name}": f.read_bytes() for f in (tmp_path / "shards").iterdir()}
    with HubServer() as hub:
        commit = hub.add("black-forest-labs/FLUX.1-dev", files | {"README.md": b"hello"})
        named = {"model_id": "black-forest-labs/FLUX.1-dev", "endpoint": hub.endpoint, "cache_dir": tmp_path / "cache",
                 "origin_file_pattern": "transformer/diffusion_pytorch_model*.safetensors"}
        config = ModelConfig(**named)
        loaded = FluxImagePipeline.from_pretrained([config])
        assert config.revision == commit and "README.md" not in hub.downloads()
        np.testing.assert_array_equal(loaded.dit.proj_out.weight.asnumpy(), pipe.dit.proj_out.weight.asnumpy())
    offline = FluxImagePipeline.from_pretrained([ModelConfig(**named)])  # the server is gone
    np.testing.assert_array_equal(offline.dit.proj_out.weight.asnumpy(), pipe.dit.proj_out.weight.asnumpy())


def test_a_picture_of_odd_size_is_refused(pipe):
    with pytest.raises(DataError, match="100 x 64 pixels cannot be encoded: expected sides that are multiples of 16"):
        pipe.run(pipe.units[2:3], {"input_image": Image.new("RGB", (100, 64))})


@pytest.fixture
def eager():
    """Sampling without compilation, which tests/pipelines/test_contract.py covers."""
    runtime.configure("pynative", DEVICE)
    yield
    runtime.configure("graph", DEVICE)


def test_images_depend_on_seed_prompt_guidance_and_size_is_rounded_up(pipe, eager, caplog):
    def image(**kwargs):
        given = {"prompt": "a cat", "height": 32, "width": 32, "seed": 1, "num_inference_steps": 2} | kwargs
        return np.asarray(pipe(**given), np.int16)

    base = image()
    np.testing.assert_array_equal(image(), base)
    for change in ({"seed": 2}, {"prompt": "a dog"}, {"embedded_guidance": 1.0},
                   {"cfg_scale": 3.0, "negative_prompt": "x"}):
        assert (image(**change) != base).any(), change
    with caplog.at_level("WARNING"):
        assert image(height=20, width=40).shape == (32, 48, 3)
    assert "so 32 x 48 is used" in caplog.text


def test_on_the_cpu_bfloat16_is_a_logged_fallback(tiny_flux, caplog):
    with caplog.at_level("WARNING"):
        pipe = FluxImagePipeline.from_pretrained(str(tiny_flux), mindspore_dtype=ms.bfloat16)
    assert pipe.dtype == ms.float32 and pipe.dit.x_embedder.weight.dtype == ms.float32
    assert "dtype=bfloat16: the CPU has no bfloat16 matrix product" in caplog.text


def test_a_fused_lora_equals_one_beside(tiny_flux, tmp_path):
    from low_rank import inject_lora, lora_pairs, set_lora

    from ms_diffsynth.formats.lora import save_lora

    def velocity(pipe):
        rng = np.random.default_rng(0)
        slots = {"latents": rng.standard_normal((1, 16, 4, 4)), "sigma": np.array([0.5]), "guidance": np.array([3.5]),
                 "prompt_embeds": rng.standard_normal((1, 8, 48)), "pooled_prompt_embeds": rng.standard_normal((1, 32))}
        return pipe.model_fn(**{k: Tensor(v.astype(np.float32)) for k, v in slots.items()}).asnumpy()

    beside, fused = (FluxImagePipeline.from_pretrained(str(tiny_flux)) for _ in range(2))
    base = velocity(fused)
    inject_lora(beside.dit, beside.lora_target_modules, rank=2, alpha=8)
    rng = np.random.default_rng(1)
    set_lora(beside.dit, {n: tuple(0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in pair)
                          for n, pair in lora_pairs(beside.dit).items()})
    save_lora(tmp_path / "lora.safetensors", lora_pairs(beside.dit), alpha=8, prefix="transformer")
    assert fused.load_lora(fused.dit, tmp_path / "lora.safetensors") == len(lora_pairs(beside.dit))
    wanted = velocity(beside)
    assert np.abs(wanted - base).max() > 0.01
    np.testing.assert_allclose(velocity(fused), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_folder_of_another_family_is_refused(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(WeightError, match="describes a UNet2DModel, but FluxImagePipeline is made of"):
        FluxImagePipeline.from_pretrained(ModelConfig(str(folder)))
    shutil.rmtree(folder)
