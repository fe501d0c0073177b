"""FLUX.2 by its own blocks equals mindone's layers, composed in PyNative, in value and gradient, with and without what
templates say.
"""
from __future__ import annotations

import mindspore as ms
import pytest
from mindspore import Tensor, mint, ops
from own_blocks import (
    assert_equal_bit_for_bit,
    assert_same,
    draw,
    final_operations,
    value_and_gradients,
    with_lora,
    with_weights,
)

from ms_diffsynth.nn.quant import store_8bit
from ms_diffsynth.nn.recompute import use_recompute
from ms_diffsynth.pipelines.flux2.rotary import image_table
from ms_diffsynth.pipelines.flux2.template import by_block

TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.linear_in", "to_qkv_mlp_proj", "attn.to_out")
TABLE = ((4, 4, 4, 4), 2000.0)
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])
BLOCKS = ("double_0", "double_1", "single_0", "single_1")
# keys of two blocks of four; LoRAs of two layers, one for each sample, one for all
LORA = {"transformer_blocks.1.attn.to_k": ((2, 3, 32), (2, 32, 3)), "single_transformer_blocks.0.attn.to_out":
        ((3, 128), (32, 3))}


@pytest.fixture(scope="module")
def flux2(configured):
    """The module under test; importing it imports mindone, which must come after the kernels."""
    from ms_diffsynth.pipelines.flux2 import transformer

    return transformer


def network(flux2, guided=True):
    return with_weights(flux2.build_transformer({
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_guidance_channels": 32, "mlp_ratio": 3.0,
        "axes_dims_rope": TABLE[0], "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": guided}))


def inputs(with_template):
    """Tokens and text; and what a template says: keys and values twice, A and B twice."""
    shapes = [(2, 6, 16), (2, 5, 12)]
    if with_template:
        shapes += [(2, 3, 2, 16)] * 4 + [shape for pair in LORA.values() for shape in pair]
    return [Tensor(draw(seed, *shape)) for seed, shape in enumerate(shapes)]


def own(dit, guided=True):
    (cos, sin), sigma = image_table(5, 2, 3, *TABLE), Tensor([0.5, 0.3], ms.float32)
    guidance = Tensor([1.0, 3.5], ms.float32) if guided else None

    def forward(tokens, text, *values):
        template = {}
        if values:
            a = "transformer_blocks.1.attn.to_k.lora_"
            b = "single_transformer_blocks.0.attn.to_out.lora_"
            cache = {"kv_cache": {"double_0": (values[0], values[1]), "single_1": (values[2], values[3])},
                     "lora": {a + "A.weight": values[4], a + "B.weight": values[5],
                              b + "A.weight": values[6], b + "B.weight": values[7]}}
            template = by_block(cache, BLOCKS, 2, (2, 16), ms.float32)
        return dit(tokens, sigma, guidance, text, cos, sin, template)

    return forward


def composed(dit, guided=True):
    """mindone's layers one after the other, as diffusers 0.36 does it, and a template's as DiffSynth-Studio does."""
    cos, sin = (x.expand_dims(2) for x in image_table(5, 2, 3, *TABLE))

    def turned(x):
        return x * cos + ops.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape) * sin

    def heads(x):
        return x.reshape(2, x.shape[1], 2, 16)

    def attend(q, k, v, kv):
        q, k = turned(q), turned(k)
        if kv is not None:
            k, v = ops.cat((k, kv[0]), 1), ops.cat((v, kv[1]), 1)
        scores = ops.matmul(q.swapaxes(1, 2), k.swapaxes(1, 2).swapaxes(2, 3)) / 4
        return ops.matmul(ops.softmax(scores, -1), v.swapaxes(1, 2)).swapaxes(1, 2).reshape(2, 11, 32)

    def low_rank(x, pair):
        return ops.matmul(ops.matmul(x, pair[0].swapaxes(-1, -2)), pair[1].swapaxes(-1, -2))

    def six(modulation, temb):
        return mint.chunk(modulation.linear(modulation.act_fn(temb)).expand_dims(1), 6, -1)

    def double(block, image, text, a, b, kv, to_k):
        attn = block.attn
        x = block.norm1(image) * (1 + a[1]) + a[0]
        y = block.norm1_context(text) * (1 + b[1]) + b[0]
        keys = attn.to_k(x) if to_k is None else attn.to_k(x) + low_rank(x, to_k)
        q = ops.cat((attn.norm_added_q(heads(attn.add_q_proj(y))), attn.norm_q(heads(attn.to_q(x)))), 1)
        k = ops.cat((attn.norm_added_k(heads(attn.add_k_proj(y))), attn.norm_k(heads(keys))), 1)
        out = attend(q, k, ops.cat((heads(attn.add_v_proj(y)), heads(attn.to_v(x))), 1), kv)
        image = image + a[2] * attn.to_out[0](out[:, 5:])
        text = text + b[2] * attn.to_add_out(out[:, :5])
        image = image + a[5] * block.ff(block.norm2(image) * (1 + a[4]) + a[3])
        return image, text + b[5] * block.ff_context(block.norm2_context(text) * (1 + b[4]) + b[3])

    def single(block, x, modulation, kv, to_out):
        attn = block.attn
        projected = attn.to_qkv_mlp_proj(block.norm(x) * (1 + modulation[1]) + modulation[0])
        q, k, v = mint.chunk(projected[..., :96], 3, -1)
        out = attend(attn.norm_q(heads(q)), attn.norm_k(heads(k)), heads(v), kv)
        hidden = ops.cat((out, attn.mlp_act_fn(projected[..., 96:])), -1)
        y = attn.to_out(hidden) if to_out is None else attn.to_out(hidden) + low_rank(hidden, to_out)
        return x + modulation[2] * y

    def forward(tokens, text, *values):
        kv = {"double_0": values[:2], "single_1": values[2:4]} if values else {}
        to_k, to_out = (values[4:6], values[6:]) if values else (None, None)
        image, text, embedder = dit.x_embedder(tokens), dit.context_embedder(text), dit.time_guidance_embed
        temb = embedder.timestep_embedder(embedder.time_proj(Tensor([500, 300], ms.float32)))
        if guided:
            temb = temb + embedder.guidance_embedder(embedder.time_proj(Tensor([1000, 3500], ms.float32)))
        a, b = six(dit.double_stream_modulation_img, temb), six(dit.double_stream_modulation_txt, temb)
        for i, block in enumerate(dit.transformer_blocks):
            image, text = double(block, image, text, a, b, kv.get(f"double_{i}"), to_k if i == 1 else None)
        modulation = dit.single_stream_modulation
        three = mint.chunk(modulation.linear(modulation.act_fn(temb)).expand_dims(1), 3, -1)
        x = ops.cat((text, image), 1)
        for i, block in enumerate(dit.single_transformer_blocks):
            x = single(block, x, three, kv.get(f"single_{i}"), to_out if i == 0 else None)
        return dit.proj_out(dit.norm_out(x[:, 5:], temb))

    return forward


@pytest.mark.parametrize("told", [False, True], ids=["alone", "template"])
def test_equals_mindones_layers(flux2, told):
    dit = network(flux2, guided=told)
    weights = dit.trainable_params()
    expected = value_and_gradients(dit, composed(dit, told), inputs(told), weights, False)
    assert_same(value_and_gradients(dit, own(dit, told), inputs(told), weights, False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True], ids=["alone", "template"])
def test_compiled_equals_mindones_layers_with_lora(flux2, told):
    plain, dit = network(flux2), network(flux2)
    plain.__class__ = flux2.mindone.Flux2Transformer2DModel  # its LoRA stays in the layers
    expected = value_and_gradients(plain, composed(plain), inputs(told), with_lora(plain, TARGETS), False)
    assert_same(value_and_gradients(dit, own(dit), inputs(told), with_lora(dit, TARGETS), True), expected)


@COMPILED
@pytest.mark.parametrize("told", [False, True], ids=["alone", "template"])
@pytest.mark.few(1)
def test_blocks_may_differ_and_recompute_changes_no_bit(flux2, told, compiled):
    """A LoRA on some blocks, the base of another in 8 bits."""
    def result(recomputed):
        dit = network(flux2)
        weights = with_lora(dit, ("transformer_blocks.1.attn.to_q", "to_qkv_mlp_proj"))
        store_8bit(dit.transformer_blocks[0])
        if recomputed:
            assert use_recompute(dit) == 4
        assert dit.double_cell_of == (0, 1) and dit.single_cell_of == (0, 0)
        return value_and_gradients(dit, own(dit), inputs(told), weights, compiled)

    assert_equal_bit_for_bit(result(True), result(False))


@pytest.mark.slow
@COMPILED
def test_recompute_changes_no_bit_when_all_is_trained(flux2, compiled):
    def result(recomputed):
        dit = network(flux2)
        if recomputed:
            use_recompute(dit)
        return value_and_gradients(dit, own(dit), inputs(True), dit.trainable_params(), compiled)

    assert_equal_bit_for_bit(result(True), result(False))


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_operation_of_a_block_is_computed_twice(flux2, recomputed, tmp_path):
    dit = network(flux2)
    weights = with_lora(dit, TARGETS)
    if recomputed:
        use_recompute(dit)
    counts = final_operations(lambda: value_and_gradients(dit, own(dit), inputs(True), weights, True), tmp_path)
    times = 2 if recomputed else 1
    # attention of four blocks; SwiGLU of two streams twice and of one twice; norms before them, and at the end
    assert counts == {"attention": 4 * times, "activation": 6 * times, "norm": 10 * times + 1}
