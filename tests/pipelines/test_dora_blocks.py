"""DoRA in FLUX.1's own blocks, where it enters through one Parameter, equals DoRA on mindone's layers.

There a layer computes it as tests/nn/test_dora.py compares with peft.
"""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor
from own_blocks import assert_equal_bit_for_bit, assert_same, draw, value_and_gradients, with_weights

from ms_diffsynth.nn.adapters.dora import MAGNITUDE, DoRA
from ms_diffsynth.nn.quant import store_8bit
from ms_diffsynth.nn.recompute import use_recompute

TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "proj_mlp", "proj_out")
IDS = Tensor(np.array([(0, i, j) for i in range(2) for j in range(3)], np.float32))
TEXT_IDS = Tensor(np.zeros((4, 3), np.float32))


@pytest.fixture(scope="module")
def flux(configured):
    """Importing it imports mindone, which must come after the kernels."""
    from ms_diffsynth.pipelines.flux import transformer

    return transformer


def network(double=1, width=16):
    from mindone.diffusers import FluxTransformer2DModel

    return with_weights(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=2, attention_head_dim=width,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
        guidance_embeds=False))


def with_dora(dit, targets=TARGETS):
    """A DoRA away from its start, where B is zero and the magnitudes are the norms."""
    DoRA().inject(dit, targets, rank=2, alpha=3)
    DoRA().load(dit, {name: array * (1 + 0.2 * draw(seed, *array.shape)) if MAGNITUDE in name
                      else array + 0.3 * draw(seed, *array.shape)
                      for seed, (name, array) in enumerate(DoRA().tensors(dit).items())})
    return DoRA().parameters(dit)


def result(dit, weights, compiled):
    time, pooled = Tensor(np.array([0.5, 0.3], np.float32)), Tensor(draw(2, 2, 10))

    def forward(tokens, text):
        return dit(hidden_states=tokens, timestep=time, guidance=None, pooled_projections=pooled,
                   encoder_hidden_states=text, txt_ids=TEXT_IDS, img_ids=IDS, return_dict=False)[0]

    inputs = [Tensor(draw(1, 2, 6, 16)), Tensor(draw(3, 2, 4, 12))]
    return value_and_gradients(dit, forward, inputs, weights, compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])
def test_equals_layers_of_mindone(flux, compiled):
    dit = network()
    expected = result(dit, with_dora(dit), False)
    own = flux.use_own_blocks(network())
    weights = with_dora(own)
    assert [p.name for p in weights] == ["lora", *(f"proj_out.{part}" for part in DoRA.format.parts)]
    assert own.single_cell_of == (0, 0)
    assert_same(result(own, weights, compiled), expected)
    assert all(np.abs(array).max() > 0 for array in expected.values())


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])
def test_blocks_may_differ(flux, compiled):
    """A DoRA on one of two blocks, on a base in 8 bits; recomputed to the bit."""
    def found(is_own, recomputed=False):
        dit = network(double=2)
        if is_own:
            flux.use_own_blocks(dit)
        weights = with_dora(dit, ["transformer_blocks.1.attn.to_q", "transformer_blocks.1.ff.net.2", "proj_out"])
        store_8bit(dit.transformer_blocks[1])
        if recomputed:
            use_recompute(dit)
        if is_own:
            assert dit.double_cell_of == (0, 1) and dit.single_cell_of == (0, 0)
        return result(dit, weights, compiled)

    plain = found(True)
    assert_same(plain, found(False))
    assert_equal_bit_for_bit(found(True, recomputed=True), plain)
