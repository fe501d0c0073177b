"""The cut: wiring errors, where units land, what is cached; against a brute-force definition on random programs."""
from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from ms_diffsynth.errors import ProgramError
from ms_diffsynth.program import Program, slot


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


def random_program(rng):
    """Units with random reads among all slots written so far."""
    slots, units = ["in0", "in1", "draw0"], []
    for k in range(rng.randint(2, 9)):
        reads = tuple(rng.sample(slots, rng.randint(1, min(3, len(slots)))))
        models = tuple(rng.sample(["a", "b", "c"], rng.randint(0, 1)))
        units.append(Unit(f"u{k}", reads, (f"s{k}",), models, no_grad=rng.random() < 0.2))
        slots.append(f"s{k}")
    return units


def brute_force(units, output, trainable, fuse):
    """(needed, in the step) by the definition alone: dependence is reachability."""
    writer = {p: u for u in units for p in u.output_params}

    def ancestors(unit, seen=()):
        found = {unit.name}
        for param in unit.input_params:
            if slot(param) in writer:
                found |= ancestors(writer[slot(param)])
        return found

    needed = ancestors(writer[output])
    hot = {u.name for u in units if "draw0" in u.input_params or u.name in fuse
           or (trainable in u.onload_model_names and not u.no_grad)} & needed
    return needed, {u.name for u in units if u.name in needed and ancestors(u) & hot}


def test_random_programs_against_the_definition():
    rng, checked = random.Random(0), 0
    for _ in range(1000):
        units = random_program(rng)
        output, trainable = units[-1].output_params[0], rng.choice(["a", "b", "c"])
        fuse = tuple(rng.sample([u.name for u in units], 1)) if rng.random() < 0.5 else ()
        needed, in_step = brute_force(units, output, trainable, fuse)
        program = Program(units, ("in0", "in1"), ("draw0",))
        reachable = {m for u in units if u.name in needed and not u.no_grad for m in u.onload_model_names}
        if trainable not in reachable or not set(fuse) <= needed:
            with pytest.raises(ProgramError):
                program.cut((output,), (trainable,), fuse)
            continue
        cut = program.cut((output,), (trainable,), fuse)
        assert set(names(cut.step)) == in_step and set(names(cut.prepare)) == needed - in_step
        written = {p for u in cut.step for p in u.output_params}
        assert set(cut.cache) == {p for u in cut.step for p in u.input_params} - written - {"draw0"}
        checked += 1
    assert checked > 100
