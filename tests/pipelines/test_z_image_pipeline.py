"""Z-Image: its template, how its transformer is called, what tells Turbo from the base model, what is trained."""
from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from ms_diffsynth.debug.parity import Case, read_case
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipelines.z_image.denoise import Denoise, from_patches, to_patches
from ms_diffsynth.pipelines.z_image.pipeline import ZImagePipeline
from ms_diffsynth.pipelines.z_image.published import prepared_shapes
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.units import run_unit

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def pipe(tiny_z_image):
    return ZImagePipeline.from_pretrained(str(tiny_z_image))


def turbo(folder, tmp_path, **changes):
    """The tiny model with Turbo's scheduler_config.json."""
    model = shutil.copytree(folder, tmp_path / "turbo")
    file = model / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 3.0} | changes))
    return model


def test_the_template_has_no_thought_and_is_cut_at_its_end(pipe, monkeypatch, caplog):
    def ids(prompt):
        slots = pipe.run(pipe.units[:1], {"prompt": prompt})
        assert (slots["prompt_mask"].asnumpy() == 1).all()
        return slots["prompt_ids"].asnumpy()[0].tolist()

    whole = [151644, 872, 198, 64, 8251, 151645, 198, 151644, 77091, 198]  # transformers 4.57.1, enable_thinking=True
    assert ids("a cat") == whole
    monkeypatch.setattr(pipe, "max_sequence_length", 6)
    assert ids("a cat") == whole[:6] and "of 10 tokens, template included, is cut to 6" in caplog.text


def test_a_batch_of_two_lengths_is_each_alone_whatever_is_beyond(golden):
    """Against the reference: what fills a text up to 32 tokens is attended to, what is beyond is not."""
    case = Case(golden / "z_image", read_case(golden / "z_image"))
    pipe, given = case.pipeline(), case.inputs
    sigma = given["grid.sigmas"][given["timestep_index"][0]].astype(np.float32)
    mask = given["prompt_embeds_mask"].astype(np.float32)

    def velocity(rows, embeds, mask):
        slots = {"latents": case.expected["noisy_latents"][rows], "sigma": sigma[rows], "prompt_embeds": embeds}
        slots |= {} if mask is None else {"prompt_mask": mask}
        return run_unit(pipe.denoise, pipe, {n: Tensor(array) for n, array in slots.items()})["velocity"].asnumpy()

    embeds, both = given["prompt_embeds"], slice(None)
    wider = [np.pad(array, [(0, 0), (0, 91)] + [(0, 0)] * (array.ndim - 2)) for array in (embeds, mask)]
    found = {"alone": [velocity([k], embeds[k:k + 1, mask[k] > 0], None)[0] for k in range(2)],
             "batch": velocity(both, embeds, mask), "wider": velocity(both, *wider)}
    for name, rows in found.items():
        for k in range(2):
            wanted = case.expected[f"single.{k}.velocity"][0]
            # through this network an error of 1e-6 becomes one of 1e-5
            np.testing.assert_allclose(rows[k], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=f"{name} {k}")
    spoilt = velocity(both, embeds, np.ones_like(mask))[0]  # a text that goes on with zeros
    assert np.abs(spoilt - found["batch"][0]).max() > 0.1 * np.abs(found["batch"][0]).max()


class Recorder(nn.Cell):
    def construct(self, *inputs):
        self.inputs = inputs
        return inputs[0]


def test_time_runs_backwards_in_float32_and_the_answer_is_negated():
    unit = Denoise(ms.float16)
    unit.dit, unit.axes, unit.theta = Recorder(), (4, 4, 4), 256.0
    latents = np.random.default_rng(0).standard_normal((1, 16, 4, 6)).astype(np.float32)
    velocity = unit(Tensor(latents), Tensor(np.float32([0.2345679])), Tensor(np.zeros((1, 3, 8), np.float32)))[0]
    patches, time, embeds, mask, keys, cos, sin = unit.dit.inputs
    assert patches.dtype == embeds.dtype == ms.float16 and velocity.dtype == time.dtype == ms.float32
    assert time.asnumpy() == pytest.approx([0.7654321], rel=1e-7)
    np.testing.assert_array_equal(velocity.asnumpy(), -latents.astype(np.float16).astype(np.float32))
    assert embeds.shape == (1, 32, 8) and mask.asnumpy().sum() == 3 and keys.asnumpy().sum() == 32
    assert cos.shape == sin.shape == (1, 64, 12)
    angles = np.arctan2(sin.asnumpy()[0], cos.asnumpy()[0])
    assert (angles[32:, 0] == pytest.approx(np.arctan2(np.sin(np.arange(1, 33)), np.cos(np.arange(1, 33))), abs=1e-6))
    assert angles[:6, 0] == pytest.approx(np.arctan2(np.sin(33), np.cos(33)), abs=1e-6)  # behind the text
    assert (angles[:6, 4] == pytest.approx([0, 0, 0, 1, 1, 1])) and (angles[:6, 8] == pytest.approx([0, 1, 2, 0, 1, 2]))
    assert not angles[6:32].any()  # what fills the image up is at (0, 0, 0)


def test_a_patch_has_its_channels_together():
    latents = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    patches = to_patches(Tensor(latents))
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches.asnumpy()[1, 4].reshape(2, 2, 3), latents[1, :, 2:4, 2:4].transpose(1, 2, 0))
    np.testing.assert_array_equal(from_patches(patches, 2, 3).asnumpy(), latents)


def test_the_text_encoder_stops_before_its_last_layer(pipe):
    assert len(pipe.text_encoder.model.layers) == pipe.config("text_encoder")["num_hidden_layers"] - 1
    assert not [name for name, _ in pipe.text_encoder.parameters_and_names() if name.startswith("model.norm")]


def test_the_scheduler_tells_turbo_from_the_base_model(pipe, tiny_z_image, tmp_path):
    model = turbo(tiny_z_image, tmp_path)
    fast = ZImagePipeline.from_pretrained(str(model))
    assert (pipe.sampling.num_inference_steps, pipe.sampling.cfg_scale) == (50, 5.0)
    assert (fast.sampling.num_inference_steps, fast.sampling.cfg_scale) == (8, 1.0)
    sigmas = fast.sampling_sigmas(8, (16, 8, 8))
    assert sigmas == pytest.approx([1, .954545, .9, .833333, .75, .642857, .5, .3, 0], abs=1e-6)
    assert pipe.sampling_sigmas(8, (16, 8, 8))[7] == pytest.approx(6 / 13, abs=1e-6)
    grids = [p.training_schedule("sft").sigmas for p in (pipe, fast, ZImagePipeline())]
    assert all((grid == grids[0]).all() for grid in grids)
    assert (grids[0][0], grids[0][500]) == (1, 0.75) and grids[0][999] == pytest.approx(0.002994, abs=1e-6)
    assert pipe.training_schedule("dreambooth").sigmas[500] == pytest.approx(6 * 0.5 / 3.5, abs=2e-3)
    other = ZImagePipeline.from_pretrained(str(turbo(tiny_z_image, tmp_path / "x", shift=2.0)))
    assert other.sampling == pipe.sampling and other.training_schedule("sft").sigmas[500] < 0.68  # another model
    (model / "sampling_config.json").write_text('{"num_inference_steps": 4}')
    assert ZImagePipeline.from_pretrained(str(model)).sampling.num_inference_steps == 4


@pytest.mark.parametrize(("changes", "says"), [
    ({"qk_norm": False}, "qk_norm=False: expected True"),
    ({"siglip_feat_dim": 1152}, "siglip_feat_dim=1152: expected None"),
    ({"all_patch_size": [2, 4]}, r"all_patch_size=\(2, 4\): expected \(2,\)"),
    ({"axes_dims": [8, 12, 14]}, r"axes_dims=\[8, 12, 14\]: expected three even numbers that add up to dim / n_heads"),
])
def test_a_network_of_another_make_is_refused(tiny_z_image, tmp_path, changes, says):
    folder = shutil.copytree(tiny_z_image / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=rf"no ZImageTransformer2DModel can be built from .*{says}"):
        ZImagePipeline.from_pretrained(ModelConfig(str(folder))).dit  # noqa: B018


def test_a_lora_is_on_the_layers_of_diffsynths_script_by_names_that_all_read(tiny_z_image, tmp_path):
    module = DiffusionTrainingModule()
    module.pipe = ZImagePipeline.from_pretrained(str(tiny_z_image))
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="dit", lora_rank=2)
    module.save(tmp_path / "lora.safetensors")
    layers = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
    blocks = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    assert set(load_state_dict(tmp_path / "lora.safetensors")) == {
        f"diffusion_model.{block}.{layer}.lora_{x}.weight" for block in blocks for layer in layers for x in "AB"}


def test_shapes_of_prepared_rows_are_those_that_are_prepared(pipe):
    configs = {name: pipe.config(name) for name in ("dit", "vae")}
    slots = {name: array.shape[1:] for name, array in pipe.condition("a red cat").items()}
    assert prepared_shapes(configs, pipe.latent_shape(64, 32), 64) == slots | {"moments": (32, 8, 4)}
