"""FLUX.1 by its own blocks equals mindone's network in value and gradient, whole or with an adapter on a frozen base.

That a layer with DoRA computes what peft computes is shown in tests/nn/test_dora.py.
"""
from __future__ import annotations

from functools import partial

import mindspore as ms
import numpy as np
import pytest
from low_rank import lora_parameters
from mindspore import Tensor
from own_blocks import (
    assert_equal_bit_for_bit,
    assert_same,
    draw,
    final_operations,
    value_and_gradients,
    with_dora,
    with_lora,
    with_weights,
)

from ms_diffsynth.nn.adapters.dora import DoRA
from ms_diffsynth.nn.quant import store_8bit
from ms_diffsynth.nn.recompute import use_recompute

TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "proj_mlp", "proj_out")
ADAPTERS = {"lora": with_lora, "scaled lora": partial(with_lora, alpha=3.0), "dora": with_dora}
AXES = {16: (4, 4, 8), 32: (8, 12, 12)}
IDS = Tensor(np.array([(0, i, j) for i in range(2) for j in range(3)], np.float32))
TEXT_IDS = Tensor(np.zeros((4, 3), np.float32))
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])


@pytest.fixture(scope="module")
def flux(configured):
    """The module under test; importing it imports mindone, which must come after the kernels."""
    from ms_diffsynth.pipelines.flux import transformer

    return transformer


def network(head_dim=16, guided=True, double=1, single=1):
    from mindone.diffusers import FluxTransformer2DModel

    return with_weights(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=head_dim,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=AXES[head_dim],
        guidance_embeds=guided))


def result(dit, weights, compiled=False, guided=True):
    time, pooled = Tensor([0.5, 0.3], ms.float32), Tensor(draw(2, 2, 10))
    guidance = Tensor([1.0, 3.5], ms.float32) if guided else None

    def forward(tokens, text):
        return dit(hidden_states=tokens, timestep=time, guidance=guidance, pooled_projections=pooled,
                   encoder_hidden_states=text, txt_ids=TEXT_IDS, img_ids=IDS, return_dict=False)[0]

    return value_and_gradients(dit, forward, [Tensor(draw(1, 2, 6, 16)), Tensor(draw(3, 2, 4, 12))], weights, compiled)


@pytest.mark.parametrize("head_dim, guided, compiled", [(16, True, False), (32, False, False), (16, True, True)])
@pytest.mark.few(1)
def test_equals_mindone(flux, head_dim, guided, compiled):
    dit = network(head_dim, guided)
    names = [p.name for p in dit.get_parameters()]
    expected = result(dit, dit.trainable_params(), guided=guided)
    assert flux.use_own_blocks(dit) is dit
    assert [p.name for p in dit.get_parameters()] == names and list(dit.parameters_dict()) == names
    assert_same(result(dit, dit.trainable_params(), compiled, guided), expected)


@pytest.mark.parametrize("adapter, order, head_dim, compiled", [
    ("lora", "adapter first", 16, False), ("scaled lora", "adapter last", 16, False),
    ("lora", "adapter last", 32, True), ("dora", "adapter last", 16, False),
    ("dora", "adapter last", 16, True)])
@pytest.mark.few(2)
def test_equals_mindone_with_an_adapter_on_a_frozen_base(flux, adapter, order, head_dim, compiled):
    dit, inject = network(head_dim, single=2), ADAPTERS[adapter]
    expected = result(dit, inject(dit, TARGETS))
    fresh = network(head_dim, single=2)
    if order == "adapter first":
        inject(fresh, TARGETS)
        weights = lora_parameters(flux.use_own_blocks(fresh))
    else:
        weights = inject(flux.use_own_blocks(fresh), TARGETS)
    if adapter == "dora":
        assert [p.name for p in weights] == ["lora", *(f"proj_out.{part}" for part in DoRA.format.parts)]
    assert_same(result(fresh, weights, compiled), expected)
    assert fresh.single_cell_of == (0, 0) and all(np.abs(array).max() > 0 for array in expected.values())


@COMPILED
@pytest.mark.parametrize("adapter", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
@pytest.mark.few(1)
def test_blocks_may_differ_and_recompute_changes_no_bit(flux, adapter, compiled):
    """An adapter on one of two blocks, on a base in 8 bits or beside one: two cells."""
    def found(is_own, recomputed=False):
        dit = network(double=2)
        if is_own:
            flux.use_own_blocks(dit)
        places = (f"transformer_blocks.1.{name}" for name in ("attn.to_q", "ff.net.2"))
        weights = ADAPTERS[adapter](dit, [*places, "proj_out"])
        store_8bit(dit.transformer_blocks[adapter == "dora"])
        if recomputed:
            use_recompute(dit)
        if is_own:
            assert dit.double_cell_of == (0, 1) and dit.single_cell_of == (0,)
        return result(dit, weights, compiled)

    plain = found(True)
    assert_same(plain, found(False))
    assert_equal_bit_for_bit(found(True, recomputed=True), plain)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("is_own", [False, True])
def test_recompute_changes_no_bit_of_mindones_blocks_and_when_all_is_trained(flux, is_own, compiled):
    def found(recomputed):
        dit = network()
        weights = flux.use_own_blocks(dit).trainable_params() if is_own else with_lora(dit, TARGETS)
        if recomputed:
            assert use_recompute(dit) == 2
        return result(dit, weights, compiled)

    assert_equal_bit_for_bit(found(True), found(False))


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_operation_of_a_block_is_computed_twice(flux, recomputed, tmp_path):
    dit = flux.use_own_blocks(network())
    weights = with_lora(dit, TARGETS)
    if recomputed:
        use_recompute(dit)
    counts = final_operations(lambda: result(dit, weights, True), tmp_path)
    times = 2 if recomputed else 1
    # attention of two blocks; GELU of two streams and one; norms before 4 + 1 sub-layers, and at the end
    assert counts == {"attention": 2 * times, "activation": 3 * times, "norm": 5 * times + 1}


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
