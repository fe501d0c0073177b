"""SDXL: its conditions, how its UNet is called, what its noise schedule is, LoRAs of three models and their names."""
from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from arrays import noise_image
from mindspore import Tensor
from own_blocks import assert_equal_bit_for_bit, draw, value_and_gradients, with_lora, with_weights
from PIL import Image

from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.operators import framing
from ms_diffsynth.diffusion.ddpm import LatentDDPMObjective, NoiseSchedule
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.formats.adapters import READ
from ms_diffsynth.formats.lora import load_adapters, models_in
from ms_diffsynth.formats.originals import in_one_file, in_original_names
from ms_diffsynth.formats.weights import load_state_dict, open_checkpoint, save_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.nn.adapters.layer import linear_modules
from ms_diffsynth.nn.names import state_dict, torch_shapes
from ms_diffsynth.nn.recompute import use_recompute
from ms_diffsynth.pipelines.sdxl.pipeline import SDXLPipeline
from ms_diffsynth.pipelines.sdxl.published import SCHEDULER, prepared_shapes
from ms_diffsynth.registry import interchange
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.units import run_unit

pytestmark = pytest.mark.usefixtures("eager")
ENCODERS = ("text_encoder_1", "text_encoder_2")
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
IN_KOHYAS = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pipe(tiny_sdxl):
    return SDXLPipeline.from_pretrained(str(tiny_sdxl), mindspore_dtype=ms.float32)


def trained(folder, **how):
    module = DiffusionTrainingModule()
    module.pipe = SDXLPipeline.from_pretrained(str(folder), mindspore_dtype=ms.float32)
    module.switch_pipe_to_training_mode(module.pipe, **({"lora_base_model": "unet", "lora_rank": 2} | how))
    return module


# -- conditions ------------------------------------------------------------------------------------------------------


def test_no_negative_prompt_is_zeros_and_an_empty_one_is_encoded(pipe, tiny_sdxl, tmp_path):
    size = {"height": 32, "width": 64}
    positive, none = pipe.conditions({"prompt": "a cat", **size}, {"prompt": None, **size})
    _, empty = pipe.conditions({"prompt": "a cat", **size}, {"prompt": "", **size})
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert (none[name].asnumpy() == 0).all() and (empty[name].asnumpy() != 0).any()
        assert none[name].shape == positive[name].shape
    assert (none["time_ids"].asnumpy() == positive["time_ids"].asnumpy()).all()
    model = shutil.copytree(tiny_sdxl, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    other = SDXLPipeline.from_pretrained(str(model), mindspore_dtype=ms.float32)
    _, found = other.conditions({"prompt": "a cat", **size}, {"prompt": None, **size})
    np.testing.assert_array_equal(found["prompt_embeds"].asnumpy(), empty["prompt_embeds"].asnumpy())
    other.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


def test_tokenizers_pad_with_tokens_of_their_own(pipe):
    slots = pipe.run(pipe.units[:1], {"prompt": "a cat"})
    assert slots["clip_l_ids"].asnumpy()[0, :6].tolist() == [49406, 320, 2368, 49407, 49407, 49407]
    assert slots["clip_g_ids"].asnumpy()[0, :6].tolist() == [49406, 320, 2368, 49407, 0, 0]


@pytest.mark.parametrize("size, exif, expected", [
    ((128, 70), {}, [70, 128, 0, 26, 64, 64]), ((70, 128), {}, [128, 70, 26, 0, 64, 64]),
    ((128, 70), {0x112: 6}, [128, 70, 26, 0, 64, 64]), ((64, 64), {}, [64, 64, 0, 0, 64, 64]),
    ((32, 48), {}, [48, 32, 16, 0, 64, 64])])
def test_size_conditions_are_what_was_done_to_the_file(pipe, tmp_path, size, exif, expected):
    tags = Image.Exif()
    for key, value in exif.items():
        tags[key] = value
    noise_image(*size[::-1]).save(tmp_path / "a.png", exif=tags.tobytes())
    image = UnifiedDataset.default_image_operator(str(tmp_path), height=64, width=64, height_division_factor=32,
                                                  width_division_factor=32)("a.png")
    unit = next(unit for unit in pipe.units if unit.name == "size_conditions")
    found = run_unit(unit, pipe, {"height": 64, "width": 64, "input_image": image})["time_ids"].asnumpy()
    assert found.tolist() == [expected]
    assert framing(image.convert("L")) == tuple(expected[:4])  # copies know it too
    alone = run_unit(unit, pipe, {"height": 64, "width": 32, "input_image": None})["time_ids"].asnumpy()
    assert alone.tolist() == [[64, 32, 0, 0, 64, 32]]


@pytest.mark.slow
def test_the_prediction_depends_on_each_size(pipe):
    shape = pipe.latent_shape(32, 32)
    given = {"latents": Tensor(np.ones((1, *shape), np.float32)), "timestep_index": Tensor([7], ms.int32)}
    given |= pipe.condition("a cat", height=32, width=32)
    base = run_unit(pipe.denoise, pipe, given)["prediction"].asnumpy()
    for k in range(6):
        sizes = given["time_ids"].asnumpy().copy()
        sizes[0, k] += 200
        assert np.abs(run_unit(pipe.denoise, pipe, given | {"time_ids": Tensor(sizes)})["prediction"].asnumpy()
                      - base).max() > 1e-4, k


def test_a_start_from_an_image_is_its_latents_with_the_noise_of_the_first_level(pipe):
    image, noise = noise_image(32, 32), np.ones((1, *pipe.latent_shape(32, 32)), np.float32)
    sigmas = pipe.sampling_sigmas(10, noise.shape[1:])[5:]
    clean = pipe.run(pipe.units, {"input_image": image, "prompt": "", "height": 32, "width": 32})["input_latents"]
    found = pipe.start(image, noise, sigmas).asnumpy()
    np.testing.assert_allclose(found, clean.asnumpy() + sigmas[0], rtol=1e-5)
    alone = pipe.start(None, noise, pipe.sampling_sigmas(10, noise.shape[1:])).asnumpy()
    first = pipe.sampling_sigmas(10, noise.shape[1:])[0]
    np.testing.assert_allclose(alone, np.sqrt(first**2 + 1), rtol=1e-6)


# -- networks and schedules --------------------------------------------------------------------------------------------


def test_the_vae_is_float32_whatever_the_rest_is(tiny_sdxl):
    pipe = SDXLPipeline(dtype=ms.bfloat16)  # from_pretrained would take float32 on a CPU
    pipe.store.add(ModelConfig(str(tiny_sdxl)), pipe.network)
    dtypes = {name: {p.dtype for p in getattr(pipe, name).get_parameters()} for name in ("vae", "unet")}
    assert dtypes == {"vae": {ms.float32}, "unet": {ms.bfloat16}}


@pytest.mark.parametrize("changes, says", [
    ({"use_linear_projection": False}, "use_linear_projection=false: expected true"),
    ({"addition_embed_type": None}, "addition_embed_type=null: expected \"text_time\""),
    ({"attention_head_dim": [1, 2]}, "attention_head_dim=.*expected 3"),
    ({"up_block_types": ["UpBlock2D"] * 3}, "expected blocks of"),
    ({"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}, "attention at the last level"),
])
@pytest.mark.few(2)
def test_a_network_of_another_make_is_refused(tiny_sdxl, tmp_path, changes, says):
    folder = shutil.copytree(tiny_sdxl / "unet", tmp_path / "unet")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(WeightError, match=says):
        SDXLPipeline.from_pretrained(str(folder)).load_models_to_device(["unet"])


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_recompute_changes_no_bit(tiny_sdxl, compiled):
    def gradients(is_recomputed):
        unet = SDXLPipeline.from_pretrained(str(tiny_sdxl), mindspore_dtype=ms.float32).unet
        weights = with_lora(with_weights(unet), ("to_q", "ff.net.2", "proj_in"))
        if is_recomputed:
            count = 17 + 2 * 1 + 2 * 2 + 2 + 3 * 2 + 3 * 1  # residual blocks, and those of the transformers
            assert use_recompute(unet) == count
        sizes = Tensor(np.float32([[64, 64, 0, 8, 32, 32]]))

        def forward(latents, prompt, pooled):
            return unet(latents, Tensor([500], ms.int32), prompt, pooled, sizes)

        inputs = [Tensor(draw(k, *shape)) for k, shape in enumerate([(1, 4, 4, 8), (1, 5, 40), (1, 24)])]
        return value_and_gradients(unet, forward, inputs, weights, compiled)

    assert_equal_bit_for_bit(gradients(True), gradients(False))


def test_shapes_of_prepared_rows_are_those_that_are_prepared(pipe):
    slots = {name: array.shape[1:] for name, array in pipe.condition("a red cat", height=64, width=32).items()}
    configs = {name: pipe.config(name) for name in ("unet", "vae")}
    assert prepared_shapes(configs, pipe.latent_shape(64, 32), None) == slots | {"moments": (8, 8, 4)}


def test_the_published_schedule_is_read_and_saved_as_it_is(pipe, tmp_path):
    assert pipe.noise_schedule == NoiseSchedule(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False)
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text()) == SCHEDULER


def test_the_objective_decides_what_is_predicted_and_sampled(tiny_sdxl):
    objective = LatentDDPMObjective(prediction_type="v_prediction", zero_terminal_snr=True)
    module = trained(tiny_sdxl, objective=objective)
    schedule = module.pipe.noise_schedule
    assert (schedule.prediction_type, schedule.alphas_cumprod[-1]) == ("v_prediction", 0)
    assert schedule.sampling_sigmas(999)[0] == np.float32(np.sqrt(2.0**24 - 1))
    with pytest.raises(ConfigError, match="prediction_type=epsilon: expected v_prediction or sample with a zero term"):
        trained(tiny_sdxl, objective=LatentDDPMObjective(zero_terminal_snr=True))
    with pytest.raises(ConfigError, match="random_flip=true: the latents of a mirrored image"):
        LatentDDPMObjective(random_flip=True)
    with pytest.raises(ConfigError, match="is an objective of flow matching"):
        trained(tiny_sdxl, objective=Objective())


# -- LoRAs -------------------------------------------------------------------------------------------------------------


def test_one_file_holds_the_loras_of_three_models_by_kohyas_names(tiny_sdxl, tmp_path):
    module = trained(tiny_sdxl, lora_base_model=", ".join(("unet", *ENCODERS)), task="sft")
    parameters = module.trainable_parameters()
    assert len({p.name for p in parameters}) == len(parameters)
    generator = np.random.default_rng(0)
    for name in module.lora_base_models:
        model = getattr(module.pipe, name)
        module.adapter.load(model, {key: generator.standard_normal(array.shape).astype(np.float32)
                                    for key, array in module.adapter.tensors(model).items()})
    file = tmp_path / "lora.safetensors"
    module.save(file)
    names = load_state_dict(file)
    counts = {begin: sum(name.startswith(begin) and name.endswith("alpha") for name in names)
              for begin in ("lora_unet_", "lora_te1_", "lora_te2_")}
    blocks = 2 * 1 + 2 * 2 + 2 + 3 * 2 + 3 * 1  # two attentions in each, four layers in each of these
    assert counts == {"lora_unet_": 8 * blocks, "lora_te1_": 4 * 3, "lora_te2_": 4 * 3}
    assert f"lora_unet_{IN_KOHYAS}.alpha" in names
    fresh = SDXLPipeline.from_pretrained(str(tiny_sdxl), mindspore_dtype=ms.float32)
    assert fresh.load_lora(None, file) == sum(counts.values())
    for name, layer in (("unet", TO_Q), ("text_encoder_1", Q_PROJ), ("text_encoder_2", Q_PROJ)):
        own = module.adapter.tensors(getattr(module.pipe, name))
        change = own[f"{layer}.lora_B.weight"] @ own[f"{layer}.lora_A.weight"]
        before = load_state_dict(tiny_sdxl / fresh.store.component(name).folder)[f"{layer}.weight"]
        np.testing.assert_allclose(state_dict(getattr(fresh, name))[f"{layer}.weight"], before + change, atol=1e-5)
    again = trained(tiny_sdxl, lora_base_model=",".join(("unet", *ENCODERS)), lora_checkpoint=file)
    again.save(tmp_path / "again.safetensors")
    assert {k: v.tobytes() for k, v in load_state_dict(tmp_path / "again.safetensors").items()} == {
        k: v.tobytes() for k, v in names.items()}


@pytest.mark.parametrize("targets, says", [
    ("to_q", "nothing is selected in text_encoder_1"),
    ("to_q,q_proj,odd", "'odd' selects no layer of lora_base_model=")])
def test_layers_that_a_model_has_not_are_refused(tiny_sdxl, targets, says):
    with pytest.raises(ConfigError, match=says):
        trained(tiny_sdxl, lora_base_model="unet,text_encoder_1", lora_target_modules=targets)


def test_each_model_gets_the_layers_that_it_has(tiny_sdxl):
    module = trained(tiny_sdxl, lora_base_model="unet,text_encoder_2", lora_target_modules="to_q,fc1")
    found = {name: {key.rsplit(".", 3)[-3] for key in module.adapter.tensors(getattr(module.pipe, name))}
             for name in module.lora_base_models}
    assert found == {"unet": {"to_q"}, "text_encoder_2": {"fc1"}}


A, B = np.ones((1, 3), np.float32), np.full((3, 1), 2, np.float32)
NAMES = {  # of others -> (model, layer)
    f"lora_unet_{IN_KOHYAS}.lora_{{}}.weight": ("unet", TO_Q),
    f"lora_unet_{TO_Q.replace('.', '_')}.lora_{{}}.weight": ("unet", TO_Q),
    f"unet.{TO_Q.replace('to_q', 'processor.to_q_lora')}.{{}}.weight": ("unet", TO_Q),
    "lora_unet_middle_block_1_proj_in.lora_{}.weight": ("unet", "mid_block.attentions.0.proj_in"),
    "lora_unet_time_embed_0.lora_{}.weight": ("unet", "time_embedding.linear_1"),
    "lora_unet_label_emb_0_2.lora_{}.weight": ("unet", "add_embedding.linear_2"),
    "lora_unet_output_blocks_8_0_emb_layers_1.lora_{}.weight": ("unet", "up_blocks.2.resnets.2.time_emb_proj"),
    f"lora_te1_{Q_PROJ.replace('.', '_')}.lora_{{}}.weight": ("text_encoder_1", Q_PROJ),
    f"text_encoder_2.{Q_PROJ.replace('q_proj', 'to_q_lora')}.{{}}.weight": ("text_encoder_2", Q_PROJ),
    f"text_encoder.{Q_PROJ}.lora_linear_layer.{{}}.weight": ("text_encoder_1", Q_PROJ),
    "lora_te2_text_projection.lora_{}.weight": ("text_encoder_2", "text_projection"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_others(name, pipe, tmp_path):
    model, layer = NAMES[name]
    save_state_dict(tmp_path / "l.safetensors", {name.format("down"): A, name.format("up"): B})
    table = interchange("sdxl")
    assert models_in(tmp_path / "l.safetensors", table) == [model]
    for known in (None, list(linear_modules(getattr(pipe, model)))):
        file = load_adapters(tmp_path / "l.safetensors", {model: known}, READ, table)[model]
        assert list(file.modules) == [layer]


def test_a_lora_of_convolutions_is_refused_by_the_names_of_its_layers(pipe, tmp_path):
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    save_state_dict(tmp_path / "l.safetensors", {
        f"{name}.lora_down.weight": np.ones((1, 16, 3, 3), np.float32),
        f"{name}.lora_up.weight": np.ones((16, 1, 1, 1), np.float32)})
    says = rf"{name} is not a module of the model \(it is down_blocks.0.resnets.0.conv1\)"
    with pytest.raises(WeightError, match=says):
        pipe.load_lora(None, tmp_path / "l.safetensors")


# -- single files ------------------------------------------------------------------------------------------------------


def checkpoints(folder):
    return {name: open_checkpoint(folder / own) for name, own in (
        ("unet", "unet"), ("vae", "vae"), ("text_encoder_1", "text_encoder"), ("text_encoder_2", "text_encoder_2"))}


def test_all_names_of_the_publishers_unet(pipe, tiny_sdxl):
    """diffusers 0.39, from_single_file, makes its network of a file with these names, every tensor equal."""
    ours = open_checkpoint(tiny_sdxl / "unet")
    theirs = in_original_names(ours, interchange("sdxl").models["unet"])
    names = {entry.start: name for name, entry in ours.entries.items()}
    pairs = sorted(f"{name} {names[entry.start]}" for name, entry in theirs.entries.items())
    assert len(pairs) == len(torch_shapes(pipe.unet)) == len(names)
    assert hashlib.sha256("\n".join(pairs).encode()).hexdigest()[:16] == PAIRS


PAIRS = "ec09959ab4655222"


def test_a_whole_pipeline_in_one_file_has_the_publishers_names_and_comes_back(tiny_sdxl, tmp_path, monkeypatch):
    before = checkpoints(tiny_sdxl)
    save_state_dict(tmp_path / "whole.safetensors", in_one_file(before, interchange("sdxl")))
    tensors = load_state_dict(tmp_path / "whole.safetensors")
    begins = {"model.diffusion_model.": "unet", "first_stage_model.": "vae",
              "conditioner.embedders.0.transformer.": "text_encoder_1",
              "conditioner.embedders.1.model.": "text_encoder_2"}
    assert {name: sum(key.startswith(begin) for key in tensors) for begin, name in begins.items()} == {
        "unet": len(before["unet"]), "vae": len(before["vae"]), "text_encoder_1": len(before["text_encoder_1"]),
        "text_encoder_2": len(before["text_encoder_2"]) - 4 * 3}  # queries, keys and values are one
    own = load_state_dict(tiny_sdxl / "text_encoder_2")
    begin = "conditioner.embedders.1.model."
    np.testing.assert_array_equal(tensors[f"{begin}text_projection"], own["text_projection.weight"].T)
    attention = "text_model.encoder.layers.1.self_attn"
    np.testing.assert_array_equal(tensors[f"{begin}transformer.resblocks.1.attn.in_proj_weight"],
                                  np.concatenate([own[f"{attention}.{p}_proj.weight"] for p in "qkv"]))
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    more = {f"{begin}logit_scale": np.ones((), np.float32), "conditioner.embedders.0.transformer.text_model.embeddings."
            "position_ids": np.arange(77)[None], "v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    save_state_dict(tmp_path / "more.safetensors", tensors | more)
    configs = {name: json.loads((tiny_sdxl / folder / "config.json").read_text()) for name, folder in (
        ("unet", "unet"), ("vae", "vae"), ("text_encoder_1", "text_encoder"), ("text_encoder_2", "text_encoder_2"))}
    monkeypatch.setattr(SDXLPipeline, "components", tuple(
        replace(c, known={"tiny": configs[c.name]}) if c.known else c for c in SDXLPipeline.components))
    pipe = SDXLPipeline.from_pretrained(str(tmp_path / "more.safetensors"), mindspore_dtype=ms.float32)
    for name, checkpoint in before.items():
        found = state_dict(getattr(pipe, name))
        assert all((found[key] == array).all() for key, array in checkpoint.tensors())
    back = in_one_file({name: pipe.store.source(name).checkpoint() for name in before}, interchange("sdxl"))
    save_state_dict(tmp_path / "back.safetensors", back)
    written = {k: v for k, v in (tensors | more).items() if k not in ("v_pred", "ztsnr")}
    assert {k: v.tobytes() for k, v in load_state_dict(tmp_path / "back.safetensors").items()} == {
        k: v.tobytes() for k, v in written.items()}
