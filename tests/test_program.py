"""The cut: wiring errors, where units land, what is cached; at the end, a thousand random programs."""
from __future__ import annotations

import random
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
    assert "    velocity = denoise(latents, sigma, prompt_embeds)  # dit" in text  # nobody writes its optional input
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


# -- a thousand random programs -------------------------------------------------------------------------------------
#
# Each cut is compared with the definition, written here as reachability over the graph. `program.py` walks its list
# once, forward or backward. Here nothing is walked in order: the dependency graph of units is closed transitively, and
# every claim (where a unit lands, what is cached, what is refused) is a question of who reaches whom. Order is checked
# apart: each half keeps the program's order.

ANY_INPUTS, ANY_DRAWS, ANY_MODELS = ("in0", "in1", "in2"), ("draw0", "draw1"), ("a", "b", "c")


@dataclass(frozen=True)
class Case:
    units: tuple[Unit, ...]
    outputs: tuple[str, ...]
    trainable: tuple[str, ...]
    fuse: tuple[str, ...]


def random_case(rng: random.Random) -> Case:
    slots, units = [*ANY_INPUTS, *rng.sample(ANY_DRAWS, rng.randint(1, 2))], []
    for k in range(rng.randint(2, 10)):
        recent = slots[-rng.randint(3, 12):]
        reads = [s + ("?" if rng.random() < 0.2 else "") for s in rng.sample(recent, rng.randint(1, 3))]
        if rng.random() < 0.1:
            reads.append("nowhere?")  # an optional slot without a writer
        writes = tuple(f"s{k}_{j}" for j in range(rng.choice((1, 1, 2))))
        draws = {s.removesuffix("?") for s in reads} & set(ANY_DRAWS)
        units.append(Unit(f"u{k}", tuple(reads), writes, tuple(rng.sample(ANY_MODELS, rng.choice((0, 0, 1, 1, 2)))),
                          is_host=not draws and rng.random() < 0.12, no_grad=rng.random() < 0.15))
        slots += writes
    outputs = {rng.choice(units[-1].output_params), *rng.sample(slots, rng.choice((0, 0, 1)))}
    trainable = [m + rng.choice(("", ".mlp")) for m in rng.sample(ANY_MODELS, rng.choice((0, 1, 1, 2)))]
    fuse = [u.name for u in units if rng.random() < 0.08]
    return Case(tuple(units), tuple(sorted(outputs)), tuple(trainable), tuple(fuse))


class Definition:
    """What a cut is, by transitive closure: ``reach[u]`` holds u and everything u's result depends on."""

    def __init__(self, case: Case):
        self.case = case
        reads = {u.name: {p.rstrip("?") for p in u.input_params} for u in case.units}
        writers = {p: u.name for u in case.units for p in u.output_params}
        self.reads, self.by_name = reads, {u.name: u for u in case.units}
        edges = {(a, writers[p]) for a in reads for p in reads[a] if p in writers}
        self.reach = closure(reads, edges)
        passing = {(a, b) for a, b in edges if self.passes(a)}
        self.gradient_reach = closure(reads, passing)
        self.ends = {writers[p] for p in case.outputs if p in writers}
        self.needed = {b for a in self.ends for b in self.reach[a]}
        self.roots = {name.split(".")[0] for name in case.trainable}
        moved = {n for n in self.needed if reads[n] & set(ANY_DRAWS) or n in case.fuse or self.holds_trained(n)}
        self.step = {n for n in self.needed if self.reach[n] & moved}

    def passes(self, name: str) -> bool:
        return not self.by_name[name].no_grad and not self.by_name[name].is_host

    def holds_trained(self, name: str) -> bool:
        return not self.by_name[name].no_grad and bool(set(self.by_name[name].onload_model_names) & self.roots)

    def refusal(self) -> str | None:
        """What the error says, None when the cut exists."""
        models = {m for n in self.needed for m in self.by_name[n].onload_model_names}
        if not set(self.case.fuse) <= self.needed:
            return "fuse names"
        if not self.roots <= models:
            return "do not depend on it"
        if any(self.by_name[n].is_host for n in self.step):
            return "must run inside the compiled step"
        fed = {n for a in self.ends for n in self.gradient_reach[a] if self.passes(n)}
        if not self.roots <= {m for n in fed for m in self.by_name[n].onload_model_names}:
            return "gradient cannot reach"
        return None

    def expected(self) -> dict[str, object]:
        """Every field of the cut."""
        order = [u.name for u in self.case.units]
        prepare = self.needed - self.step
        read_by_step = set().union(*(self.reads[n] for n in self.step)) if self.step else set()
        read_by_prepare = set().union(*(self.reads[n] for n in prepare)) if prepare else set()
        outside = {p for n in prepare for p in self.by_name[n].output_params} | set(ANY_INPUTS)
        return {
            "prepare": [n for n in order if n in prepare], "step": [n for n in order if n in self.step],
            "cache": read_by_step & outside,
            "draws": [d for d in ANY_DRAWS if d in read_by_step],
            "inputs": [i for i in ANY_INPUTS if i in read_by_prepare | read_by_step],
            "prepare models": sorted({m for n in prepare for m in self.by_name[n].onload_model_names}),
            "step models": sorted({m for n in self.step for m in self.by_name[n].onload_model_names}),
        }


def closure(nodes, edges) -> dict[str, set[str]]:
    """Warshall: what each node reaches, itself included."""
    reach = {a: {a} | {b for x, b in edges if x == a} for a in nodes}
    for k in nodes:
        for a in nodes:
            if k in reach[a]:
                reach[a] |= reach[k]
    return reach


def found(cut) -> dict[str, object]:
    return {"prepare": names(cut.prepare), "step": names(cut.step), "cache": set(cut.cache),
            "draws": list(cut.draws), "inputs": list(cut.inputs), "prepare models": list(cut.models("prepare")),
            "step models": list(cut.models("step"))}


def test_a_thousand_random_programs():
    rng = random.Random(2106)
    seen: dict[str | None, int] = {}
    for number in range(1000):
        case = random_case(rng)
        definition = Definition(case)
        program = Program(case.units, ANY_INPUTS, ANY_DRAWS)
        refusal = definition.refusal()
        seen[refusal] = seen.get(refusal, 0) + 1
        if refusal is not None:
            with pytest.raises(ProgramError, match=refusal):
                program.cut(case.outputs, case.trainable, case.fuse)
            continue
        cut = program.cut(case.outputs, case.trainable, case.fuse)
        assert found(cut) == definition.expected(), f"program {number}: {case}"
        assert len(set(cut.cache)) == len(cut.cache) and cut.outputs == case.outputs
    # every outcome occurs often enough to mean something
    assert seen[None] > 300 and len(seen) == 5 and min(seen.values()) >= 20, seen
