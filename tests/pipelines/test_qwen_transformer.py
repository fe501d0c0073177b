"""Qwen-Image by its own blocks equals mindone's layers, composed in PyNative, in value and gradient.

mindone's own network cannot be the reference: its rotary positions let no gradient through to queries and keys.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from low_rank import lora_pairs, lora_parameters
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

from ms_diffsynth.nn.adapters.layer import adapted_layers
from ms_diffsynth.nn.quant import store_8bit
from ms_diffsynth.nn.recompute import use_recompute
from ms_diffsynth.pipelines.qwen_image.rotary import image_table

TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "img_mod.1", "txt_mlp.net.2")
MASK = np.float32([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])


@pytest.fixture(scope="module")
def qwen(configured):
    """The module under test; importing it imports mindone, which must come after the kernels."""
    from ms_diffsynth.pipelines.qwen_image import transformer

    return transformer


def network(qwen):
    return with_weights(qwen.build_transformer({
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 12, "guidance_embeds": False, "axes_dims_rope": (4, 6, 6)}))


def inputs():
    return [Tensor(draw(1, 2, 6, 16)), Tensor(draw(2, 2, 5, 12))]


def own(dit, mask=MASK):
    cos, sin = image_table(5, 2, 3, (4, 6, 6))
    mask, sigma = None if mask is None else Tensor(mask), Tensor([0.5, 0.3], ms.float32)

    def forward(tokens, text):
        return dit(tokens, sigma, text, cos, sin, mask)

    return forward


def composed(dit, mask=MASK):
    """mindone's layers one after the other, as diffusers 0.35 does it."""
    cos, sin = (x.asnumpy() for x in image_table(5, 2, 3, (4, 6, 6)))
    cos, sin = Tensor(cos[:, :, None]), Tensor(sin[:, :, None])
    keys = np.concatenate([np.ones((2, 5)) if mask is None else mask, np.ones((2, 6))], 1)
    left_out = Tensor((keys[:, None, None] - 1) * 1e9, ms.float32)

    def turned(x):
        swapped = ops.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
        return x * cos + swapped * sin

    def heads(x):
        return x.reshape(2, x.shape[1], 2, 16)

    def modulated(norm, x, shift, scale):
        return norm(x) * (1 + scale) + shift

    def block_of(block, image, text, temb):
        of_image, of_text = (mint.chunk(layer(temb).expand_dims(1), 6, -1) for layer in (block.img_mod, block.txt_mod))
        attn = block.attn
        x = modulated(block.img_norm1, image, of_image[0], of_image[1])
        y = modulated(block.txt_norm1, text, of_text[0], of_text[1])
        q = turned(ops.cat((attn.norm_added_q(heads(attn.add_q_proj(y))), attn.norm_q(heads(attn.to_q(x)))), 1))
        k = turned(ops.cat((attn.norm_added_k(heads(attn.add_k_proj(y))), attn.norm_k(heads(attn.to_k(x)))), 1))
        v = ops.cat((heads(attn.add_v_proj(y)), heads(attn.to_v(x))), 1)
        scores = ops.matmul(q.swapaxes(1, 2), k.swapaxes(1, 2).swapaxes(2, 3)) / 4 + left_out
        out = ops.matmul(ops.softmax(scores, -1), v.swapaxes(1, 2)).swapaxes(1, 2).reshape(2, 11, 32)
        image = image + of_image[2] * attn.to_out[0](out[:, 5:])
        text = text + of_text[2] * attn.to_add_out(out[:, :5])
        image = image + of_image[5] * block.img_mlp(modulated(block.img_norm2, image, of_image[3], of_image[4]))
        text = text + of_text[5] * block.txt_mlp(modulated(block.txt_norm2, text, of_text[3], of_text[4]))
        return image, text

    def forward(tokens, text):
        image, text = dit.img_in(tokens), dit.txt_in(dit.txt_norm(text))
        sinusoids = dit.time_text_embed.time_proj(Tensor([0.5, 0.3], ms.float32))
        temb = dit.time_text_embed.timestep_embedder(sinusoids)
        for block in dit.transformer_blocks:
            image, text = block_of(block, image, text, temb)
        return dit.proj_out(dit.norm_out(image, temb))

    return forward


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.few(1)
def test_equals_mindones_layers(qwen, masked):
    dit, mask = network(qwen), MASK if masked else None
    weights = dit.trainable_params()
    expected = value_and_gradients(dit, composed(dit, mask), inputs(), weights, False)
    assert_same(value_and_gradients(dit, own(dit, mask), inputs(), weights, False), expected)
    padding = expected["input 1"][0, 3:]
    assert (np.abs(padding).max() < 1e-6) == masked, "padding that is attended to has a gradient"


def test_an_array_laid_out_as_the_loras_parameter_is_taken_apart_by_the_names_in_files(qwen):
    dit = network(qwen)
    with_lora(dit, TARGETS)
    own(dit)(*inputs())
    (flat,) = {id(cell.flat): cell.flat for cell in adapted_layers(dit).values()}.values()
    found = flat.matrices(flat.flat.asnumpy())
    expected = {f"{name}.lora_{letter}.weight": array for name, pair in lora_pairs(dit).items()
                for letter, array in zip("AB", pair)}
    assert list(found) and set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_compiled_equals_mindones_layers_with_lora(qwen):
    plain, dit = network(qwen), network(qwen)
    plain.__class__ = qwen.mindone.QwenImageTransformer2DModel  # its LoRA stays in the layers
    expected = value_and_gradients(plain, composed(plain), inputs(), with_lora(plain, TARGETS), False)
    assert_same(value_and_gradients(dit, own(dit), inputs(), with_lora(dit, TARGETS), True), expected)


@COMPILED
@pytest.mark.few(1)
def test_blocks_may_differ_and_recompute_changes_no_bit(qwen, compiled):
    """A LoRA on one of two blocks, the base of the other in 8 bits: two cells."""
    def result(recomputed):
        dit = network(qwen)
        weights = with_lora(dit, ("transformer_blocks.1.attn.to_q", "transformer_blocks.1.img_mod.1"))
        store_8bit(dit.transformer_blocks[0])
        if recomputed:
            assert use_recompute(dit) == 2
        assert dit.block_cell_of == (0, 1) and weights == lora_parameters(dit)
        return value_and_gradients(dit, own(dit), inputs(), weights, compiled)

    assert_equal_bit_for_bit(result(True), result(False))


@pytest.mark.slow
@COMPILED
def test_recompute_changes_no_bit_when_all_is_trained(qwen, compiled):
    def result(recomputed):
        dit = network(qwen)
        if recomputed:
            use_recompute(dit)
        return value_and_gradients(dit, own(dit), inputs(), dit.trainable_params(), compiled)

    assert_equal_bit_for_bit(result(True), result(False))


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_operation_of_a_block_is_computed_twice(qwen, recomputed, tmp_path):
    dit = network(qwen)
    weights = with_lora(dit, TARGETS)
    if recomputed:
        use_recompute(dit)
    counts = final_operations(lambda: value_and_gradients(dit, own(dit), inputs(), weights, True), tmp_path)
    # two blocks of two streams, norms before two sub-layers and at the end; the last makes no text
    plain, again = {"attention": 2, "activation": 3, "norm": 7 + 1}, {"attention": 2, "activation": 3, "norm": 7}
    assert counts == {name: plain[name] + recomputed * again[name] for name in plain}
