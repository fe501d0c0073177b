"""Editing with FLUX.1-Kontext and Qwen-Image-Edit: references of several sizes, in order, in some rows or in none."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from arrays import noise_image, relative
from device import DEVICE
from mindspore import Tensor

from ms_diffsynth import DiffusionTrainingModule, runtime
from ms_diffsynth.debug.parity import check_case
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import DataError, WeightError
from ms_diffsynth.pipelines.qwen_image import edit, vision
from ms_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ms_diffsynth.pipelines.qwen_image.rotary import edit_table, image_table, reference_places
from ms_diffsynth.registry import family
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.prepared import in_bucket
from ms_diffsynth.training.program_step import ProgramTrainStep

pytestmark = pytest.mark.usefixtures("eager")

ONE, THREE = noise_image(32, 48, 1), [noise_image(32, 48, 1), noise_image(48, 32, 2), noise_image(16, 64, 3)]
SMALL = {"height": 32, "width": 32, "seed": 0, "num_inference_steps": 1}


@pytest.fixture(scope="session")
def tiny_edit(tmp_path_factory, configured):
    """``tiny_edit(variant)``: the folder of a tiny edit model."""
    root = tmp_path_factory.mktemp("edit")

    def folder(variant):
        if not (root / variant).exists():
            family("qwen_image").tiny_variants[variant](root / variant, 0)
        return root / variant

    return folder


def opened(tiny_model, tiny_edit, name):
    folder = tiny_model("flux") if name == "kontext" else tiny_edit(name)
    pipe = family("flux" if name == "kontext" else "qwen_image").pipeline.from_pretrained(str(folder))
    pipe.max_sequence_length = 16
    pipe.edit_max_pixels = 64 * 64
    return pipe


NAMES = ("kontext", "edit", "edit-2511")


def module_of(pipe, **how):
    module = DiffusionTrainingModule()
    module.pipe = pipe
    how = how or {"lora_base_model": "dit", "lora_rank": 2}
    module.switch_pipe_to_training_mode(pipe, extra_inputs="edit_image", objective=Objective(), **how)
    return module


def rows_of(*edits):
    return [{"image": noise_image(32, 32, 7), "prompt": "make it red", "edit_image": given} for given in edits]


def inputs_of(module, cut, row):
    pipe = module.pipe
    slots = {n: v[None] for n, v in in_bucket(module.prepare(row, cut), (32, 32), pipe).slots.items()}
    random = Draws(5).of(np.array([0]))
    draws = {name: pipe.objective.draw(name, (1, *pipe.latent_shape(32, 32)), 1000, random) for name in cut.draws}
    return [Tensor(value) for value in ({**slots, **draws}[n] for n in (*cut.cache, *cut.draws))]


def loss_of(module, row, mode="pynative"):
    cut = module.training_cut()
    step = ProgramTrainStep(module, cut, AdamW(module.trainable_parameters(), learning_rate=1e-3), mode=mode)
    result = step.step(*inputs_of(module, cut, row))
    return float(result.loss.asnumpy()), float(result.grad_norm.asnumpy())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(1)
def test_images_follow_references_their_number_and_their_order(tiny_model, tiny_edit, name):
    pipe = opened(tiny_model, tiny_edit, name)
    given = ({}, {"edit_image": ONE}, {"edit_image": THREE}, {"edit_image": [*THREE[1:], THREE[0]]})
    found = [np.asarray(pipe("a cat", cfg_scale=1.0, **SMALL, **change), np.int16) for change in given]
    overlapping = name == "kontext"  # its references lie over each other: their order is not seen
    assert all((one != other).any() for k, one in enumerate(found) for other in found[:k]
               if not (overlapping and one is found[3] and other is found[2]))
    np.testing.assert_array_equal(pipe("a cat", cfg_scale=1.0, edit_image=[], **SMALL), found[0].astype(np.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(1)
def test_a_row_without_reference_is_text_to_image(tiny_model, tiny_edit, name):
    """The same loss as of a module that knows nothing of references, to the last bit."""
    row = rows_of(None)[0]
    found = loss_of(module_of(opened(tiny_model, tiny_edit, name)), row)
    plain = DiffusionTrainingModule()
    plain.pipe = opened(tiny_model, tiny_edit, name)
    plain.switch_pipe_to_training_mode(plain.pipe, lora_base_model="dit", lora_rank=2, objective=Objective())
    assert loss_of(plain, row) == found
    assert loss_of(module_of(opened(tiny_model, tiny_edit, name)), rows_of(ONE)[0])[0] != found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_network_learns_and_recompute_changes_no_bit(tiny_model, tiny_edit, name):
    found = loss_of(module_of(opened(tiny_model, tiny_edit, name), trainable_models="dit"), rows_of(THREE)[0])
    again = loss_of(module_of(opened(tiny_model, tiny_edit, name), trainable_models="dit",
                              use_gradient_checkpointing=True), rows_of(THREE)[0])
    assert found == again and found[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_with_0_1_and_3_references_compile_once_each(tiny_model, tiny_edit, name):
    """One step, compiled for each combination of sizes and not again; the losses are the eager ones."""
    rows = rows_of(None, ONE, THREE, None, ONE, THREE, noise_image(32, 48, 9))
    eager = [loss_of(module_of(opened(tiny_model, tiny_edit, name)), row)[0] for row in rows[:3]]
    runtime.configure("graph", DEVICE)
    module = module_of(opened(tiny_model, tiny_edit, name))
    cut = module.training_cut()
    step = ProgramTrainStep(module, cut, AdamW(module.trainable_parameters(), learning_rate=0.0), mode="graph",
                            planned_compilations=3)
    losses = [float(step.step(*inputs_of(module, cut, row)).loss.asnumpy()) for row in rows]
    runtime.configure("pynative", DEVICE)
    assert losses[:3] == pytest.approx(eager, rel=2e-5) and losses[3:6] == losses[:3]


def test_references_are_shrunk_within_the_limit_each_by_itself(tiny_model, tiny_edit):
    pipe = opened(tiny_model, tiny_edit, "kontext")
    pipe.edit_max_pixels = 32 * 32
    pipe.use_input("edit_image")
    row = {"prompt": "a", "input_image": noise_image(32, 32), "edit_image": [noise_image(128, 64), noise_image(16, 16)]}
    slots = pipe.run(pipe.units, row)
    assert [tuple(x.shape[2:]) for x in slots["edit_pixels"]] == [(32, 16), (16, 16)]
    assert slots["edit_latents"].shape == (1, 3, 64)
    np.testing.assert_array_equal(slots["edit_places"].asnumpy()[0], [[1, 0, 0], [1, 1, 0], [1, 0, 0]])
    with pytest.raises(DataError, match="expected an image or a list of images"):
        pipe.run(pipe.units, row | {"edit_image": "cat.png"})


def test_the_size_of_the_result_is_the_reference_s(tiny_model, tiny_edit):
    asked = {"num_inference_steps": 1, "seed": 0, "cfg_scale": 1.0}
    kontext, plus = (opened(tiny_model, tiny_edit, name) for name in ("kontext", "edit-2511"))
    assert kontext("a", edit_image=THREE, **asked).size == (48, 32)
    assert plus("a", edit_image=THREE, **asked).size == (64, 16)  # of the last, as diffusers does
    assert plus("a", edit_image=ONE, height=32, width=32, **asked).size == (32, 32)


# -- Qwen-Image-Edit --------------------------------------------------------------------------------------------------


def test_positions_without_references_are_those_of_text_to_image():
    """A reference smaller than the image moves no text; a larger one does, and each is centred by itself."""
    plain = [x.asnumpy() for x in image_table(5, 4, 6, (8, 12, 12))]
    places = Tensor(reference_places([(2, 3)])[None])
    for found, wanted in zip(edit_table(5, 4, 6, places, (8, 12, 12)), plain):
        np.testing.assert_allclose(found.asnumpy()[:, :5 + 24], wanted, rtol=0, atol=1e-6)
    larger = edit_table(5, 4, 6, Tensor(reference_places([(10, 2)])[None]), (8, 12, 12))[0].asnumpy()
    assert np.abs(larger[:, :5] - plain[0][:, :5]).max() > 0.1
    np.testing.assert_allclose(larger[:, 5:29], plain[0][:, 5:], rtol=0, atol=1e-6)
    found = reference_places([(2, 3), (1, 1)])
    np.testing.assert_array_equal(found[:, 0], [1] * 6 + [2])
    np.testing.assert_array_equal(found[:6, 1:3], [(r, c) for r in (-1, 0) for c in (-2, -1, 0)])
    np.testing.assert_array_equal(found[6, 1:3], (-1, -1))


def test_rows_of_two_shapes_share_a_batch(tiny_model, tiny_edit):
    pipe = opened(tiny_model, tiny_edit, "edit-2511")
    rng = np.random.default_rng(0)
    shapes = {"latents": (16, 4, 4), "prompt_embeds": (5, 32), "edit_latents": (12, 64)}
    slots = {name: rng.standard_normal((2, *shape)).astype(np.float32) for name, shape in shapes.items()}
    slots |= {"sigma": np.float32([0.3, 0.8]), "prompt_mask": np.float32([[1] * 5, [1, 1, 1, 0, 0]]),
              "edit_places": np.stack([reference_places([side]) for side in ((2, 6), (12, 1))])}
    both = pipe.model_fn(**{n: Tensor(v) for n, v in slots.items()}).asnumpy()
    for k in range(2):
        assert relative(pipe.model_fn(**{n: Tensor(v[k:k + 1]) for n, v in slots.items()}), both[k:k + 1]) < 5e-6


@pytest.mark.parametrize("name, style", [("edit", "first"), ("edit-2509", "plus"), ("edit-2511", "plus")])
def test_the_template_is_the_model_s(tiny_edit, name, style):
    pipe = QwenImagePipeline.from_pretrained(str(tiny_edit(name)))
    assert pipe.edit_style == style and bool(pipe.config("dit")["zero_cond_t"]) == (name == "edit-2511")
    unit = edit.TokenizeEditPrompt()
    found = unit.process(pipe, prompt="a cat", picture_sides=[(1, 2), (2, 1)])
    text = pipe.tokenizer.decode(found["prompt_ids"].asnumpy()[0])
    start = "Picture {}: " if style == "plus" else ""
    wanted = "".join(start.format(k) + "<|vision_start|>" + 2 * "<|image_pad|>" + "<|vision_end|>" for k in (1, 2))
    assert text == wanted + "a cat<|im_end|>\n<|im_start|>assistant\n"
    pipe.edit_template = "plus" if style == "first" else "first"
    assert pipe.edit_style != style
    with pytest.raises(DataError, match="stands for the tokens of a picture"):
        unit.process(pipe, prompt="a <|image_pad|>", picture_sides=[(1, 2)])


def test_the_prefix_is_what_the_tokenizer_makes_of_it(tiny_edit):
    pipe = QwenImagePipeline.from_pretrained(str(tiny_edit("edit")))
    assert len(edit.PREFIX) == 64 and tuple(pipe.tokenizer(edit.TEMPLATE.partition("{}")[0]).input_ids) == edit.PREFIX


def test_a_long_prompt_is_cut_and_its_pictures_are_not(tiny_edit, caplog):
    pipe = QwenImagePipeline.from_pretrained(str(tiny_edit("edit")))
    pipe.max_sequence_length = 12
    with caplog.at_level("WARNING"):
        found = edit.TokenizeEditPrompt().process(pipe, prompt="cat " * 40, picture_sides=[(3, 5)])
    assert found["prompt_ids"].shape == (1, 17 + 12) and (found["prompt_ids"].asnumpy() == 151655).sum() == 15


def test_where_tokens_lie():
    found = edit.text_places(np.array([0, 1, 1, 1, 1, 1, 1, 0, 1, 0], bool), [(2, 3), (1, 1)], 4)
    np.testing.assert_array_equal(found, [
        (4, 4, 4, 0), (5, 5, 5, 1), (5, 5, 6, 2), (5, 5, 7, 3), (5, 6, 5, 4), (5, 6, 6, 5), (5, 6, 7, 6), (8, 8, 8, 0),
        (9, 9, 9, 7), (10, 10, 10, 0)])


@pytest.mark.parametrize("size, fitted", [((384, 384), (392, 392)), ((1024, 1024), (1036, 1036)), ((20, 30), (56, 84)),
                                          ((28, 56), (56, 84)), ((896, 1184), (896, 1176))])
def test_sides_as_the_processor_makes_them(size, fitted):
    """Source: transformers 4.57.1, smart_resize with factor 28 and 3136 to 12845056 pixels."""
    assert vision.fitting(*size) == fitted


def test_pictures_of_the_plus_models_have_one_area():
    assert edit.plus_size(1024, 1024) == (384, 384) and edit.plus_size(1920, 1080) == (512, 288)
    assert edit.plus_size(64, 64) == (384, 384)


def test_windows_hold_every_token_once():
    found = vision.windows(5, 6, 4)
    assert [len(window) for window in found] == [2, 4, 8, 16]
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(30))
    assert vision.window_groups(10, 12, 4) == ((1, 8), (1, 16), (1, 32), (1, 64))


def test_a_text_encoder_without_vision_tower(tiny_model, tiny_edit):
    pipe = QwenImagePipeline.from_pretrained(str(tiny_model("qwen_image")))
    with pytest.raises(WeightError, match="has no vision tower"):
        pipe.use_input("edit_image")
    with pytest.raises(WeightError, match="has no vision tower"):
        pipe("a cat", edit_image=ONE, **SMALL)
    plain = QwenImagePipeline.from_pretrained(str(tiny_edit("edit")))
    plain("a cat", cfg_scale=1.0, **SMALL)
    assert "vision_tower" in plain.model_names and "vision_tower" not in plain.models  # text to image loads none


def test_an_edit_model_is_saved_as_it_was(tiny_edit, tmp_path):
    pipe = QwenImagePipeline.from_pretrained(str(tiny_edit("edit-2511")))
    pipe.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy/model_index.json").read_text())["_class_name"] == "QwenImageEditPlusPipeline"
    again = QwenImagePipeline.from_pretrained(str(tmp_path / "copy"))
    assert again.config("dit")["zero_cond_t"] and again.edit_style == "plus" and "vision_tower" in again.model_names


def test_zero_cond_t_is_the_model_s(golden, tmp_path):
    """The recorded case with the other value in config.json: references modulated as the image is."""
    folder = shutil.copytree(golden / "qwen_image_edit_2511", tmp_path / "case")
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | {"zero_cond_t": False}))
    errors = {quantity.name: quantity.error for quantity in check_case(folder, "pynative")}
    assert errors["velocity"] > 0.1 and errors["velocity without reference"] < 1e-5
