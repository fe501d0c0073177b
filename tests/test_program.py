"""The cut: wiring errors, where units land, what is cached. Random programs: test_program_random.py."""
from __future__ import annotations

from dataclasses import dataclass

import pytest

from ms_diffsynth.errors import ProgramError
from ms_diffsynth.program import Program


@dataclass(frozen=True)
class Unit:
    name: str
    input_params: tuple[str, ...]
    output_params: tuple[str, ...]
    onload_model_names: tuple[str, ...] = ()
    is_host: bool = False
    no_grad: bool = False


ENCODE = [
    Unit("tokenize", ("prompt",), ("ids",), ("tokenizer",), is_host=True),
    Unit("encode_prompt", ("ids",), ("prompt_embeds",), ("text_encoder",)),
    Unit("load_pixels", ("input_image",), ("pixels",), is_host=True),
    Unit("encode_image", ("pixels",), ("moments",), ("vae",)),
    Unit("sample_latents", ("moments", "posterior_noise"), ("input_latents",)),
]
TRAIN = [
    Unit("flow_match_path", ("input_latents", "noise", "sigma"), ("latents", "target")),
    Unit("denoise", ("latents", "sigma", "prompt_embeds", "control?"), ("velocity",), ("dit",)),
    Unit("flow_match_loss", ("velocity", "target"), ("loss",)),
]
TEMPLATE = [
    Unit("template_inputs", ("template_raw",), ("template_inputs",), ("template_model",), is_host=True, no_grad=True),
    Unit("template_forward", ("template_inputs",), ("control",), ("template_model",)),
]
INPUTS = ("prompt", "input_image", "template_raw")
DRAWS = ("noise", "sigma", "posterior_noise")


def names(units):
    return [u.name for u in units]


def training():
    return Program([*ENCODE, *TRAIN], INPUTS, DRAWS)


def test_training_the_dit_caches_moments_and_prompt_embeds():
    cut = training().cut(("loss",), ("dit",))
    assert names(cut.prepare) == ["tokenize", "encode_prompt", "load_pixels", "encode_image"]
    assert names(cut.step) == ["sample_latents", "flow_match_path", "denoise", "flow_match_loss"]
    assert cut.cache == ("moments", "prompt_embeds")
    assert cut.models("prepare") == ("text_encoder", "tokenizer", "vae")
    assert cut.models("step") == ("dit",)
    assert cut.draws == ("noise", "sigma", "posterior_noise")
    assert cut.inputs == ("prompt", "input_image")


def test_fusing_the_vae_moves_the_cache_to_pixels():
    cut = training().cut(("loss",), ("dit",), fuse=("encode_image",))
    assert set(cut.cache) == {"pixels", "prompt_embeds"} and "encode_image" in names(cut.step)
    assert cut.models("step") == ("dit", "vae")


def test_training_the_text_encoder_moves_the_cache_to_token_ids():
    assert training().cut(("loss",), ("text_encoder",)).cache == ("ids", "moments")


def test_dotted_trainable_name_pulls_its_model_into_the_step():
    program = Program([*ENCODE, *TEMPLATE, *TRAIN], INPUTS, DRAWS)
    cut = program.cut(("loss",), ("template_model.mlp",))
    assert "template_forward" in names(cut.step) and "template_inputs" in names(cut.prepare)


def test_text_to_image_drops_what_nobody_needs():
    program = Program([*ENCODE[:4], TRAIN[1]], INPUTS, ("latents", "sigma"))
    cut = program.cut(("velocity",))
    assert names(cut.prepare) == ["tokenize", "encode_prompt"] and names(cut.step) == ["denoise"]


def test_branch_reruns_only_what_depends_on_the_prompt():
    program = Program([*ENCODE[:4], TRAIN[1]], INPUTS, ("latents", "sigma"))
    assert program.branch(("prompt",), ("prompt_embeds", "moments")) == ("tokenize", "encode_prompt")


def test_describe_is_straight_line_code():
    text = training().cut(("loss",), ("dit",)).describe()
    assert "def prepare(prompt, input_image):" in text
    assert "    velocity = denoise(latents, sigma, prompt_embeds, control)  # dit" in text
    assert text.endswith("    return loss")


@pytest.mark.parametrize(("build", "says"), [
    (lambda: Program([Unit("a", ("promt",), ("x",))], ("prompt",)), "unit 'a' reads 'promt'.*Did you mean 'prompt'"),
    (lambda: Program([Unit("a", ("prompt",), ("prompt",))], ("prompt",)), "unit 'a' writes 'prompt', but the caller"),
    (lambda: training().cut(("los",)), "output 'los'.*Did you mean 'loss'"),
    (lambda: training().cut(("loss",), fuse=("encode_imag",)), "fuse names 'encode_imag'.*'encode_image'"),
    (lambda: training().cut(("loss",), fuse=("load_pixels",)), "'load_pixels' must run inside the compiled step"),
    (lambda: training().cut(("loss",), ("controlnet",)), "'controlnet' is to be trained, but the outputs do not"),
    (lambda: training().cut(("prompt_embeds",), ("dit",)), "'dit' is to be trained"),
])
def test_refusals_name_the_unit_and_the_remedy(build, says):
    with pytest.raises(ProgramError, match=says):
        build()


FROZEN_ENCODER = [
    Unit("encode", ("prompt",), ("prompt_embeds",), ("text_encoder",)),
    Unit("detach", ("prompt_embeds",), ("fixed_embeds",), no_grad=True),
    Unit("denoise", ("noise", "fixed_embeds"), ("velocity",), ("dit",)),
    Unit("target", ("noise",), ("target",), ("vae",), no_grad=True),
    Unit("flow_match_loss", ("velocity", "target"), ("loss",)),
]


def test_a_trained_model_whose_gradient_cannot_reach_the_loss_is_named():
    program = Program(FROZEN_ENCODER, ("prompt",), ("noise",))
    with pytest.raises(ProgramError, match=r"'text_encoder' is to be trained, but its gradient cannot reach loss: "
                                           r"it stops at detach, target, declared no_grad.*reaches: \['dit'\]"):
        program.cut(("loss",), ("dit", "text_encoder.embedding"))
    with pytest.raises(ProgramError, match="'vae' is to be trained, but its gradient cannot reach loss"):
        program.cut(("loss",), ("vae",))
    assert names(program.cut(("loss",), ("dit",)).step) == ["denoise", "target", "flow_match_loss"]


def test_one_path_that_passes_gradients_is_enough():
    program = Program([*FROZEN_ENCODER[:2], Unit("denoise", ("noise", "fixed_embeds", "prompt_embeds"), ("velocity",)),
                       Unit("flow_match_loss", ("velocity",), ("loss",))], ("prompt",), ("noise",))
    assert "encode" in names(program.cut(("loss",), ("text_encoder",)).step)
