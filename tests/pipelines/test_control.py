"""Control images: ControlNets of FLUX.1 and Qwen-Image, FLUX.1-Fill and -Canny; masks; new ControlNets."""
from __future__ import annotations

import json

import numpy as np
import pytest
from arrays import noise_image
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import DiffusionTrainingModule
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, DataError
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.pipelines.shared.control import LoadControl, unshuffled
from ms_diffsynth.registry import family
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.prepared import in_bucket
from ms_diffsynth.training.program_step import ProgramTrainStep

pytestmark = pytest.mark.usefixtures("eager")

EDGES, OTHER, PICTURE = noise_image(32, 32, 1), noise_image(32, 32, 2), noise_image(32, 32, 3)
MASK = Image.fromarray(np.kron([[0, 255], [0, 0]], np.ones((16, 16))).astype(np.uint8))
SMALL = {"height": 32, "width": 32, "seed": 0, "num_inference_steps": 2, "cfg_scale": 1.0}
FAMILIES = ("flux", "qwen_image")
KINDS = {"flux": "controlnet", "union": "controlnet-union", "fill": "fill", "canny": "canny",
         "qwen_image": "controlnet", "inpaint": "inpaint"}


@pytest.fixture(scope="session")
def opened(tmp_path_factory, tiny_model, configured):
    """``opened(kind)``: a pipeline of a tiny model of one of KINDS, or without a ControlNet for ``plain FAMILY``."""
    root = tmp_path_factory.mktemp("control")

    def pipeline(kind):
        name = kind.removeprefix("plain ")
        of = "qwen_image" if name in ("qwen_image", "inpaint") else "flux"
        folder = tiny_model(of) if kind != name else root / name
        if not folder.exists():
            family(of).tiny_variants[KINDS[name]](folder, 0)
        pipe = family(of).pipeline.from_pretrained(str(folder))
        pipe.max_sequence_length = 16
        return pipe

    return pipeline


def sampled(pipe, **inputs):
    return np.asarray(pipe("a cat", **{**SMALL, **inputs}), np.int16)


def module_of(pipe, extra="control_image", **how):
    module = DiffusionTrainingModule()
    module.pipe = pipe
    module.switch_pipe_to_training_mode(pipe, extra_inputs=extra, objective=Objective(),
                                        **(how or {"trainable_models": "controlnet"}))
    return module


def inputs_of(module, cut, row):
    slots = {n: v[None] for n, v in in_bucket(module.prepare(row, cut), (32, 32), module.pipe).slots.items()}
    random, pipe = Draws(5).of(np.array([0])), module.pipe
    draws = {name: pipe.objective.draw(name, (1, *pipe.latent_shape(32, 32)), 1000, random) for name in cut.draws}
    return [Tensor(value) for value in ({**slots, **draws}[n] for n in (*cut.cache, *cut.draws))]


def losses_of(module, row, steps=1, mode="pynative", rate=1e-3):
    cut = module.training_cut()
    step = ProgramTrainStep(module, cut, AdamW(module.trainable_parameters(), learning_rate=rate), mode=mode)
    results = [step.step(*inputs_of(module, cut, row)) for _ in range(steps)]
    return [(float(r.loss.asnumpy()), float(r.grad_norm.asnumpy())) for r in results]


ROW = {"image": PICTURE, "prompt": "a cat", "control_image": EDGES, "control_mask": MASK}


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_images_follow_control_images_and_their_scales(opened, name):
    pipe = opened(name)
    plain, edges, other = sampled(pipe), sampled(pipe, control_image=EDGES), sampled(pipe, control_image=OTHER)
    assert (plain != edges).any() and (edges != other).any()
    np.testing.assert_array_equal(sampled(pipe, control_image=EDGES, conditioning_scale=0.0), plain)
    assert (sampled(pipe, control_image=EDGES, conditioning_scale=0.5) != edges).any()
    both = [EDGES, OTHER]
    np.testing.assert_array_equal(sampled(pipe, control_image=both, conditioning_scale=[1.0, 0.0]), edges)
    assert (sampled(pipe, control_image=both) != edges).any()
    large = EDGES.resize((64, 64), Image.Resampling.NEAREST)
    assert sampled(pipe, control_image=large, height=None, width=None).shape == (64, 64, 3)


@pytest.mark.slow
def test_control_images_are_read_in_a_part_of_the_steps(opened):
    pipe = opened("flux")
    plain, edges = sampled(pipe), sampled(pipe, control_image=EDGES)
    half = sampled(pipe, control_image=EDGES, control_range=(0.0, 0.5))
    assert (half != plain).any() and (half != edges).any()
    assert (sampled(pipe, control_image=EDGES, control_range=(0.5, 1.0)) != half).any()
    np.testing.assert_array_equal(sampled(pipe, control_image=EDGES, control_range=(0.6, 0.9)), plain)  # no whole step
    with pytest.raises(ConfigError, match=r"control_range=\(0.5, 0.5\): expected two numbers"):
        sampled(pipe, control_image=EDGES, control_range=(0.5, 0.5))


@pytest.mark.slow
def test_a_union_is_told_which_kind_of_image_it_sees(opened):
    pipe = opened("union")
    first, third = (sampled(pipe, control_image=EDGES, control_mode=mode) for mode in (0, 2))
    assert (first != third).any()
    np.testing.assert_array_equal(sampled(pipe, control_image=EDGES), first)
    pipe.control_mode = 2
    np.testing.assert_array_equal(sampled(pipe, control_image=EDGES), third)


@pytest.mark.parametrize("kind", ["fill", "inpaint"])
@pytest.mark.few(1)
@pytest.mark.slow
def test_what_is_under_the_hole_is_not_seen(opened, kind):
    pipe = opened(kind)
    pixels = np.asarray(PICTURE).copy()
    pixels[:16, 16:] = 7
    found = sampled(pipe, control_image=PICTURE, control_mask=MASK)
    np.testing.assert_array_equal(sampled(pipe, control_image=Image.fromarray(pixels), control_mask=MASK), found)
    pixels[16:, :16] = 7
    assert (sampled(pipe, control_image=Image.fromarray(pixels), control_mask=MASK) != found).any()
    assert (sampled(pipe, control_image=PICTURE, control_mask=MASK.rotate(90)) != found).any()


def test_a_wide_network_reads_one_control_image(opened):
    pipe = opened("canny")
    assert (sampled(pipe, control_image=EDGES) != sampled(pipe, control_image=OTHER)).any()
    with pytest.raises(ConfigError, match="2 control images: a network that takes them as channels reads one"):
        sampled(pipe, control_image=[EDGES, OTHER])
    with pytest.raises(ConfigError, match="reads a control image beside the noisy latents: give control_image"):
        sampled(pipe)


MISTAKES = {
    "nothing reads it": ("plain flux", {"control_image": EDGES}, "nothing reads it: expected a ControlNet"),
    "no mask": ("fill", {"control_image": EDGES}, "control_mask is missing: this model fills a hole"),
    "a mask": ("flux", {"control_image": EDGES, "control_mask": MASK}, "this model reads no mask"),
    "a mask alone": ("fill", {"control_mask": MASK}, "control_mask without control_image"),
    "a scale alone": ("flux", {"conditioning_scale": 0.5}, "conditioning_scale without control_image"),
    "three scales": ("flux", {"control_image": EDGES, "conditioning_scale": [1, 1, 1]}, "or one for each of 1 control"),
    "two kinds": ("flux", {"control_image": EDGES, "edit_image": EDGES}, "expected one of the two"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_sampled(opened, name):
    kind, inputs, says = MISTAKES[name]
    with pytest.raises(ConfigError, match=says):
        sampled(opened(kind), **inputs)


# -- what control images become ---------------------------------------------------------------------------------------


def test_a_mask_is_the_image_s_size_and_has_nothing_between(opened):
    pipe = opened("fill")
    grey = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
    found = LoadControl().process(pipe, None, grey, PICTURE, None, None)
    assert found["control_hole"].shape == (1, 1, 32, 32) and set(np.unique(found["control_hole"])) == {0.0, 1.0}
    np.testing.assert_array_equal(found["control_pixels"][0].asnumpy(), pipe.preprocess_image(PICTURE).asnumpy())
    with pytest.raises(DataError, match="expected an image or a list of images"):
        LoadControl().process(pipe, "edges.png", None, PICTURE, None, None)
    with pytest.raises(DataError, match="control_mask is a list of 2: expected one mask"):
        LoadControl().process(pipe, PICTURE, [PICTURE, PICTURE], PICTURE, None, None)


def test_the_tokens_of_fill_are_latents_and_every_pixel_of_the_mask(opened):
    """Token (row, column) holds its 16 x 16 pixels of the mask: channel 8 y + x of each of four latent pixels."""
    pipe, rng = opened("fill"), np.random.default_rng(0)
    mask = Image.fromarray((rng.random((32, 48)) > 0.5).astype(np.uint8) * 255)
    pipe.use_input("control_mask")
    slots = pipe.run(pipe.units, {"prompt": "a", "input_image": noise_image(32, 48), "control_mask": mask})
    tokens, pixels = slots["control_latents"].asnumpy()[0, 0], np.asarray(mask) / 255
    assert tokens.shape == (6, 64 + 256)
    square = pixels[16:, 32:].reshape(2, 8, 2, 8).transpose(1, 3, 0, 2)  # of the last token: y, x, row, column
    np.testing.assert_array_equal(tokens[5, 64:], square.reshape(-1))
    assert unshuffled(np.asarray(pixels, np.float32)[None, None]).shape == (1, 64, 4, 6)


def test_the_mask_of_a_controlnet_is_a_seventeenth_channel(opened):
    pipe = opened("inpaint")
    pipe.use_input("control_mask")
    slots = pipe.run(pipe.units, {"prompt": "a", "input_image": PICTURE, "control_mask": MASK})
    tokens = slots["control_latents"].asnumpy()
    assert tokens.shape == (1, 1, 4, 68)
    np.testing.assert_array_equal(tokens[0, 0, :, 64:], [[1] * 4, [0] * 4, [1] * 4, [1] * 4])  # 1 is kept


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_controlnet_is_the_network_s_first_blocks_and_changes_nothing(opened, name):
    pipe = opened(f"plain {name}")
    pipe.new_controlnet()
    dit, net, config = state_dict(pipe.dit), state_dict(pipe.controlnet), pipe.config("controlnet")
    new = {key: value for key, value in net.items() if key not in dit}
    assert all(key.startswith("controlnet_") and not value.any() for key, value in new.items()) and len(new) > 4
    for key in set(net) & set(dit):
        np.testing.assert_array_equal(net[key], dit[key])
    assert config["num_layers"] == 2
    np.testing.assert_array_equal(sampled(pipe, control_image=EDGES), sampled(pipe))
    module = module_of(pipe)
    (first, norm), (second, _), (third, _) = losses_of(module, ROW, 3, rate=1e-4)
    plain = DiffusionTrainingModule()
    plain.pipe = opened(f"plain {name}")
    plain.switch_pipe_to_training_mode(plain.pipe, lora_base_model="dit", lora_rank=2, objective=Objective())
    assert losses_of(plain, ROW)[0][0] == first and norm > 0 and third < second < first


def test_fewer_blocks_and_too_many(opened):
    pipe = opened("plain flux")
    pipe.new_controlnet((1, 0), extra_channels=4)
    net = state_dict(pipe.controlnet)
    assert net["controlnet_x_embedder.weight"].shape == (128, 68) and pipe.reads_mask
    assert {key.split(".")[1] for key in net if key.startswith("transformer_blocks.")} == {"0"}
    assert not any(key.startswith(("single_", "controlnet_single")) for key in net)
    (first, _), (second, _) = losses_of(module_of(pipe, "control_mask"), ROW, 2)  # no single blocks, and the mask alone
    assert second < first
    with pytest.raises(ConfigError, match=r"a new ControlNet of 5 transformer_blocks: .* which has 2"):
        opened("plain flux").new_controlnet((5,))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.few(1)
def test_recompute_changes_no_bit(opened, name):
    found, again = (losses_of(module_of(opened(name), trainable_models="controlnet", use_gradient_checkpointing=on),
                              ROW) for on in (False, True))
    assert found == again and found[0][1] > 0


@pytest.mark.parametrize("kind, extra", [("flux", "control_image"), ("union", "control_image"),
                                         ("fill", "control_mask"), ("canny", "control_image"),
                                         ("qwen_image", "control_image"), ("inpaint", "control_image,control_mask")])
@pytest.mark.few(1)
def test_a_lora_learns_under_control(opened, kind, extra):
    pipe = opened(kind)
    module = module_of(pipe, extra, lora_base_model="dit", lora_rank=2)
    cut = module.training_cut()
    assert "control_latents" in cut.cache and "vae" not in cut.models("step")
    assert ("controlnet" in cut.models("step")) == (kind not in ("fill", "canny"))
    (first, norm), (second, _) = losses_of(module, ROW, 2)
    assert second < first and norm > 0
    other = losses_of(module_of(opened(kind), extra, lora_base_model="dit", lora_rank=2),
                      ROW | {"control_image": OTHER, "control_mask": MASK.rotate(90)})[0]
    assert other[0] != first


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_as_eager(opened, name):
    eager, graph = (losses_of(module_of(opened(name)), ROW, 2, mode) for mode in ("pynative", "graph"))
    assert np.array(graph) == pytest.approx(np.array(eager), rel=1e-4)


TRAINING_MISTAKES = {
    "nothing reads it": ("plain flux", "control_image", "nothing reads it: expected a ControlNet"),
    "no mask": ("fill", "control_image", "control_mask is missing"),
    "a mask": ("flux", "control_image,control_mask", "this model reads no mask"),
    "not named": ("fill", None, "name its column, extra_inputs=control_mask"),
    "references too": ("flux", "control_image,edit_image", "expected one of the two"),
}


@pytest.mark.parametrize("name", TRAINING_MISTAKES)
def test_what_cannot_be_trained(opened, name):
    kind, extra, says = TRAINING_MISTAKES[name]
    with pytest.raises(ConfigError, match=says):
        module_of(opened(kind), extra, lora_base_model="dit")


@pytest.mark.parametrize("kind, class_name", [("flux", "FluxControlNetPipeline"),
                                              ("inpaint", "QwenImageControlNetInpaintPipeline")])
def test_a_controlnet_is_saved_with_its_pipeline(opened, tmp_path, kind, class_name):
    pipe = opened(kind)
    pipe.save_pretrained(tmp_path / "copy")
    index = json.loads((tmp_path / "copy/model_index.json").read_text())
    assert index["_class_name"] == class_name and index["controlnet"][0] == "diffusers"
    again = type(pipe).from_pretrained(str(tmp_path / "copy"))
    assert again.config("controlnet") == pipe.config("controlnet") and again.weights_digest("controlnet")
    plain = opened("plain flux" if kind == "flux" else "plain qwen_image")
    plain.new_controlnet(extra_channels=4 * plain.reads_mask)
    assert plain.saved_class == class_name.replace("Inpaint", "")
