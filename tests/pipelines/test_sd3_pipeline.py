"""Stable Diffusion 3: its tokenizers, three encoders or two, how it is called, what it refuses, and what is trained."""
from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.debug.skeleton import build
from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.models import arguments
from ms_diffsynth.nn.names import state_dict, torch_shapes
from ms_diffsynth.pipelines.sd3.denoise import Denoise
from ms_diffsynth.pipelines.sd3.pipeline import SD3ImagePipeline
from ms_diffsynth.pipelines.sd3.published import PUBLISHED, prepared_shapes
from ms_diffsynth.pipelines.sd3.transformer import PatchEmbed
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.training.module import DiffusionTrainingModule

pytestmark = pytest.mark.usefixtures("eager")


def pipeline(folder):
    pipe = SD3ImagePipeline.from_pretrained(str(folder))
    pipe.max_sequence_length = 16
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_sd3):
    return pipeline(tiny_sd3)


# transformers 4.57.1, CLIPTokenizer with ftfy 6.3; "!" is CLIP-G's padding, and so a token of its own there
@pytest.mark.parametrize(("slot", "text", "ids"), [
    ("clip_l_ids", "a photo of sks dog", [49406, 320, 1125, 539, 48136, 1929, 49407, 49407, 49407]),
    ("clip_g_ids", "a photo of sks dog", [49406, 320, 1125, 539, 48136, 1929, 49407, 0, 0]),
    ("clip_l_ids", "fish!  wow!!!", [49406, 2759, 256, 2781, 995, 49407, 49407, 49407]),
    ("clip_g_ids", "fish!  wow!!!", [49406, 2759, 0, 2781, 0, 0, 0, 49407, 0, 0]),
])
@pytest.mark.parametrize("are_shipped", [True, False])
@pytest.mark.few(3)
def test_each_clip_pads_with_its_own_token(tiny_sd3, are_shipped, slot, text, ids):
    pipe = SD3ImagePipeline() if are_shipped else pipeline(tiny_sd3)
    found = pipe.run(pipe.units[:1], {"prompt": text})[slot].asnumpy()
    assert found.shape == (1, 77) and found[0, :len(ids)].tolist() == ids and set(found[0, len(ids):]) == {ids[-1]}


def without_t5(folder, tmp_path, is_said):
    model = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(model / "text_encoder_3")
    index = json.loads((model / "model_index.json").read_text())
    if is_said:
        index["text_encoder_3"] = [None, None]  # as diffusers 0.39 saves such a pipeline
    (model / "model_index.json").write_text(json.dumps(index))
    return pipeline(model)


def test_a_model_without_t5_has_zeros_in_its_place(pipe, tiny_sd3, tmp_path):
    whole, part = (p.condition("a red cat") for p in (pipe, without_t5(tiny_sd3, tmp_path, is_said=True)))
    (full, embeds), (wanted, pooled) = ([slots[name].asnumpy() for slots in (whole, part)] for name in
                                        ("prompt_embeds", "pooled_prompt_embeds"))
    np.testing.assert_array_equal(embeds[:, :77], full[:, :77])
    np.testing.assert_array_equal(pooled, wanted)
    assert embeds.shape == full.shape and np.abs(full[:, 77:]).min(-1).max() > 0 and not embeds[:, 77:].any()


def test_t5_is_not_left_away_where_it_is_only_lost(tiny_sd3, tmp_path):
    with pytest.raises(WeightError, match="'text_encoder_3' is needed, but no files were given for it"):
        without_t5(tiny_sd3, tmp_path, is_said=False).condition("a red cat")


def test_two_models_of_a_class_are_told_apart_by_their_folders(tiny_sd3, pipe, tmp_path):
    configs = [ModelConfig(str(tiny_sd3 / name / "model.safetensors")) for name in ("text_encoder_2", "text_encoder")]
    found = SD3ImagePipeline.from_pretrained(configs)
    for name in ("text_encoder_1", "text_encoder_2"):
        for key, value in state_dict(getattr(found, name)).items():
            np.testing.assert_array_equal(value, state_dict(getattr(pipe, name))[key])
    other = shutil.copytree(tiny_sd3 / "text_encoder", tmp_path / "clip")
    with pytest.raises(WeightError, match=r"clip holds a CLIPTextModelWithProjection, of which SD3ImagePipeline has "
                                          r"text_encoder_1, text_encoder_2: expected a folder called text_encoder or "
                                          r"text_encoder_2"):
        SD3ImagePipeline.from_pretrained(ModelConfig(str(other)))


class Recorder(nn.Cell):
    def construct(self, *inputs):
        self.inputs = inputs
        return inputs[0]


def test_the_timestep_keeps_its_precision_in_half_the_bits():
    unit, zeros = Denoise(ms.float16), ms.ops.zeros((1, 16, 4, 4), ms.float32)
    unit.dit = Recorder()
    (velocity,) = unit(zeros, Tensor(np.float32([0.7654321])), zeros, zeros)
    latents, embeds, pooled, timestep = unit.dit.inputs
    assert {x.dtype for x in (latents, embeds, pooled)} == {ms.float16} and velocity.dtype == ms.float32
    assert timestep.dtype == ms.float32 and timestep.asnumpy() == pytest.approx([765.4321], rel=1e-7)


def test_a_picture_beyond_the_table_of_positions_is_refused(pipe):
    assert pipe.latent_shape(384, 64) == (16, 48, 8)
    with pytest.raises(ConfigError, match=r"height=400, width=64: this transformer has positions for sides of at most "
                                          r"384 pixels \(pos_embed_max_size=24\)"):
        pipe(prompt="a cat", height=400, width=64, num_inference_steps=1)


@pytest.mark.parametrize(("changes", "says"), [
    ({"dual_attention_layers": [1]}, r"dual_attention_layers=\(1,\): expected the first blocks"),
    ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm': expected rms_norm or null"),
])
def test_a_network_of_another_make_is_refused(tiny_sd3, tmp_path, changes, says):
    folder = shutil.copytree(tiny_sd3 / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=rf"no SD3Transformer2DModel can be built from .*{says}"):
        SD3ImagePipeline.from_pretrained(ModelConfig(str(folder))).dit  # noqa: B018


def trained(folder, **how):
    module = DiffusionTrainingModule()
    module.pipe = pipeline(folder)
    module.switch_pipe_to_training_mode(module.pipe, **how)
    return module


def test_the_table_of_positions_is_no_weight(tiny_sd3):
    module = trained(tiny_sd3, trainable_models="dit")
    names = {name.removeprefix("pipe.dit.") for name in module.export_trainable_state_dict()}
    assert set(state_dict(module.pipe.dit)) - names == {"pos_embed.pos_embed"}


def test_a_lora_is_on_the_layers_of_diffusers_script_and_named_as_there(tiny_sd3, tmp_path):
    trained(tiny_sd3, lora_base_model="dit", lora_rank=2).save(tmp_path / "lora.safetensors")
    attention = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    layers = [(k, name) for k in (0, 1) for name in attention if (k, name) != (1, "to_add_out")]  # the last has none
    assert set(load_state_dict(tmp_path / "lora.safetensors")) == {
        f"transformer.transformer_blocks.{k}.attn.{name}.lora_{x}.weight" for k, name in layers for x in "AB"}


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.few(1)
def test_a_published_network_has_the_names_and_shapes_of_mindones(model):
    config = PUBLISHED[model]["dit"] | {"pos_embed_max_size": 4}  # mindone computes the table when it is built
    with quiet_imports():
        from mindone.diffusers import SD3Transformer2DModel
    component = next(c for c in SD3ImagePipeline.components if c.name == "dit")
    with no_init_parameters():
        wanted = torch_shapes(SD3Transformer2DModel(**arguments(SD3Transformer2DModel, config)))
    assert torch_shapes(build(component, config, ms.bfloat16, is_allocated=False)) == wanted


def test_shapes_of_prepared_rows_are_those_that_are_prepared(pipe):
    configs = {name: pipe.config(name) for name in ("dit", "vae")}
    slots = {name: array.shape[1:] for name, array in pipe.condition("a red cat").items()}
    wanted = prepared_shapes(configs, pipe.latent_shape(64, 32), pipe.max_sequence_length)
    assert wanted == slots | {"moments": (32, 8, 4)}


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("size", [(8, 8), (4, 10), (24, 2)])
def test_the_middle_of_the_table_of_positions_is_added(mode, size):
    cell = PatchEmbed(patch_size=2, in_channels=3, width=5, side=12)
    rng = np.random.default_rng(0)
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    latents = Tensor(rng.standard_normal((2, 3, *size)).astype(np.float32))
    rows, columns = (side // 2 for side in size)
    top, left = (12 - rows) // 2, (12 - columns) // 2
    table = cell.pos_embed.asnumpy().reshape(12, 12, 5)[top:top + rows, left:left + columns].reshape(1, -1, 5)
    wanted = cell.proj(latents).asnumpy().reshape(2, 5, -1).swapaxes(1, 2) + table
    found = CompiledStep(cell.construct, "the patches", mode)(latents)
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=1e-6, atol=1e-6)
