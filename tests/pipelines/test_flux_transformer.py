"""FLUX.1 by its own blocks equals mindone's network in value and gradient.

Tolerance: float32, 1e-5 of each tensor's largest element, the rounding of sums of up to a hundred terms through three
blocks. A gradient that is zero in exact arithmetic (the bias of a key projection, which shifts all scores of a row
alike) is rounding noise, so 1e-6 of the network's largest gradient is allowed everywhere.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from low_rank import inject_lora, lora_pairs, lora_parameters, set_lora
from mindspore import ParameterTuple, Tensor

from ms_diffsynth.nn.quant import store_8bit
from ms_diffsynth.nn.recompute import use_recompute

RELATIVE, OF_LARGEST = 1e-5, 1e-6
TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "proj_mlp", "proj_out")
AXES = {16: (4, 4, 8), 32: (8, 12, 12)}
IDS = Tensor(np.array([(0, i, j) for i in range(2) for j in range(3)], np.float32))
TEXT_IDS = Tensor(np.zeros((4, 3), np.float32))


@pytest.fixture(scope="module")
def flux(configured):
    """The module under test; importing it imports mindone, which must come after the kernels."""
    from ms_diffsynth.pipelines.flux import transformer

    return transformer


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(head_dim=16, guided=True, double=1):
    from mindone.diffusers import FluxTransformer2DModel

    dit = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=1, attention_head_dim=head_dim,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=AXES[head_dim],
        guidance_embeds=guided)
    for seed, parameter in enumerate(dit.get_parameters()):
        weight = draw(seed, *parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
        parameter.set_data(Tensor(weight + 1 if ".norm_" in parameter.name and parameter.ndim == 1 else weight))
    return dit


def with_lora(dit):
    inject_lora(dit, TARGETS, rank=2)
    move(dit)
    return lora_parameters(dit)


def move(dit):
    """Away from the start of a LoRA, where B is zero."""
    pairs = lora_pairs(dit).items()
    set_lora(dit, {name: (a, 0.3 * draw(seed, *b.shape)) for seed, (name, (a, b)) in enumerate(pairs)})


def inputs(guided=True):
    return (Tensor(draw(1, 2, 6, 16)), Tensor([0.5, 0.3], ms.float32),
            Tensor([1.0, 3.5], ms.float32) if guided else None, Tensor(draw(2, 2, 10)), Tensor(draw(3, 2, 4, 12)))


def value_and_gradients(dit, weights, guided=True, compiled=False):
    """Output of the network, and gradients of its input and weights, on the host."""
    target = Tensor(draw(4, 2, 6, 16))
    tokens, time, guidance, pooled, text = inputs(guided)

    def loss(tokens, time, guidance, pooled, text):
        out = dit(hidden_states=tokens, timestep=time, guidance=guidance, pooled_projections=pooled,
                  encoder_hidden_states=text, txt_ids=TEXT_IDS, img_ids=IDS, return_dict=False)[0]
        return (out * target).sum(), out

    gradient = ms.value_and_grad(loss, 0, ParameterTuple(weights), has_aux=True)

    def step(tokens, time, guidance, pooled, text):
        return gradient(tokens, time, guidance, pooled, text)

    (_, out), (of_input, of_weights) = (ms.jit(step, fullgraph=True) if compiled else step)(
        tokens, time, guidance, pooled, text)
    found = {p.name: g.asnumpy().copy() for p, g in zip(weights, of_weights)}
    if "lora" in found:
        found |= dit.lora.matrices(found.pop("lora"))
    return {"output": out.asnumpy().copy(), "gradient of the input": of_input.asnumpy().copy(), **found}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    largest = max(np.abs(v).max() for name, v in expected.items() if name != "output")
    wrong = []
    for name, value in expected.items():
        allowed = max(RELATIVE * np.abs(value).max(), OF_LARGEST * largest)
        error = np.abs(found[name] - value).max()
        if not error <= allowed:
            wrong.append(f"{name}: {error:.1e}, allowed {allowed:.1e}")
    assert not wrong, wrong


@pytest.mark.parametrize("head_dim, guided", [(16, True), (32, False)])
def test_equals_mindone(flux, head_dim, guided):
    dit = network(head_dim, guided)
    names = [p.name for p in dit.get_parameters()]
    expected = value_and_gradients(dit, dit.trainable_params(), guided)
    assert flux.use_own_blocks(dit) is dit
    assert [p.name for p in dit.get_parameters()] == names and list(dit.parameters_dict()) == names
    assert_same(value_and_gradients(dit, dit.trainable_params(), guided), expected)


@pytest.mark.parametrize("order", ["LoRA first", "LoRA last"])
def test_equals_mindone_with_lora_on_a_frozen_base(flux, order):
    dit = network()
    expected = value_and_gradients(dit, with_lora(dit))
    fresh = network()
    if order == "LoRA first":
        with_lora(fresh)
        weights = lora_parameters(flux.use_own_blocks(fresh))
    else:
        weights = with_lora(flux.use_own_blocks(fresh))
    assert_same(value_and_gradients(fresh, weights), expected)


def test_compiled_equals_mindone(flux):
    dit = network()
    expected = value_and_gradients(dit, dit.trainable_params())
    assert_same(value_and_gradients(flux.use_own_blocks(dit), dit.trainable_params(), compiled=True), expected)


def test_compiled_equals_mindone_with_lora(flux):
    dit = network(32)
    expected = value_and_gradients(dit, with_lora(dit))
    fresh = network(32)
    weights = with_lora(flux.use_own_blocks(fresh))
    assert_same(value_and_gradients(fresh, weights, compiled=True), expected)


def test_a_network_of_mindone_stays_as_it_is(flux):
    flux.use_own_blocks(network())
    assert not any(type(cell).__module__ == flux.__name__ for _, cell in network().cells_and_names())


@pytest.mark.parametrize("what", ["processor", "fused", "dropout"])
def test_another_attention_is_refused(flux, what):
    dit = network()
    attn = dit.transformer_blocks[0].attn
    if what == "processor":
        attn.set_processor(flux.mindone.FluxIPAdapterAttnProcessor(32, 32))
    elif what == "fused":
        attn.fuse_projections()
    else:
        attn.dropout = 0.1
    with pytest.raises(TypeError, match="expected a FluxAttnProcessor without either"):
        flux.use_own_blocks(dit)


def test_sigma_and_guidance_are_multiplied_in_float32(flux):
    """bfloat16 has 8 bits: 0.4980 and 0.5 would be the same step."""
    dit = flux.use_own_blocks(network())
    embedder = dit.time_text_embed.timestep_embedder
    seen = []
    embedder.__class__ = type("Seen", (type(embedder),), {"construct": lambda self, x: seen.append(x) or x})
    for sigma in (0.4985, 0.5):
        dit.embed(embedder, Tensor([sigma], ms.float32), ms.bfloat16)
    first, second = (x.astype(ms.float32).asnumpy() for x in seen)
    assert seen[0].dtype == ms.bfloat16 and np.abs(first - second).max() > 0.5


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])
def test_blocks_may_differ(flux, compiled):
    """A LoRA on one of two blocks, the base of the other in 8 bits: two cells, and gradients as by mindone's."""
    def result(is_own, recomputed=False):
        dit = network(double=2)
        if is_own:
            flux.use_own_blocks(dit)
        inject_lora(dit, ["transformer_blocks.1.attn.to_q", "proj_out"], 2)
        move(dit)
        store_8bit(dit.transformer_blocks[0])
        if recomputed:
            use_recompute(dit)
        if is_own:
            assert dit.double_cell_of == (0, 1) and dit.single_cell_of == (0,)
        return value_and_gradients(dit, lora_parameters(dit), compiled=compiled)

    plain = result(True)
    assert_same(plain, result(False))
    again = result(True, recomputed=True)
    assert all((again[name] == value).all() for name, value in plain.items())
