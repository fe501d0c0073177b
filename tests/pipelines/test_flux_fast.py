"""FLUX.1 on the fast cells equals mindone's network in value and gradient; what they do not cover stays mindone's.

Tolerance: float32, 1e-5 of each tensor's largest element, the rounding of sums of up to a hundred terms through three
blocks. A gradient that is zero in exact arithmetic (the bias of a key projection, which shifts all scores of a row
alike) is rounding noise, so 1e-6 of the network's largest gradient is allowed everywhere.
"""
from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import pytest
from mindspore import ParameterTuple, Tensor

from ms_diffsynth.nn.lora import inject_lora, lora_parameters

RELATIVE, OF_LARGEST = 1e-5, 1e-6
TARGETS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "proj_mlp", "proj_out")
AXES = {16: (4, 4, 8), 32: (8, 12, 12)}
IDS = Tensor(np.array([(0, i, j) for i in range(2) for j in range(3)], np.float32))
TEXT_IDS = Tensor(np.zeros((4, 3), np.float32))


@pytest.fixture(scope="module")
def flux(configured):
    """The module under test; importing it imports mindone, which must come after the kernels."""
    from ms_diffsynth.pipelines.flux import fast

    return fast


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(head_dim=16, guided=True):
    from mindone.diffusers import FluxTransformer2DModel

    dit = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=head_dim,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=AXES[head_dim],
        guidance_embeds=guided)
    for seed, parameter in enumerate(dit.get_parameters()):
        weight = draw(seed, *parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
        parameter.set_data(Tensor(weight + 1 if ".norm_" in parameter.name and parameter.ndim == 1 else weight))
    return dit


def with_lora(dit):
    injected = inject_lora(dit, TARGETS, rank=2)
    for seed, cell in enumerate(injected.values()):
        cell.lora_B.set_data(Tensor(0.3 * draw(seed, *cell.lora_B.shape)))
    return lora_parameters(dit)


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
    return {"output": out.asnumpy().copy(), "gradient of the input": of_input.asnumpy().copy(),
            **{p.name: g.asnumpy().copy() for p, g in zip(weights, of_weights)}}


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
    assert flux.use_fast_cells(dit) is dit
    assert [p.name for p in dit.get_parameters()] == names and list(dit.parameters_dict()) == names
    assert_same(value_and_gradients(dit, dit.trainable_params(), guided), expected)


@pytest.mark.parametrize("order", ["LoRA first", "LoRA last"])
def test_equals_mindone_with_lora_on_a_frozen_base(flux, order):
    dit = network()
    expected = value_and_gradients(dit, with_lora(dit))
    fresh = network()
    if order == "LoRA first":
        weights = with_lora(fresh)
        flux.use_fast_cells(fresh)
    else:
        weights = with_lora(flux.use_fast_cells(fresh))
    assert_same(value_and_gradients(fresh, weights), expected)


def test_compiled_equals_mindone(flux):
    dit = network()
    expected = value_and_gradients(dit, dit.trainable_params())
    assert_same(value_and_gradients(flux.use_fast_cells(dit), dit.trainable_params(), compiled=True), expected)


def test_compiled_equals_mindone_with_lora(flux):
    dit = network(32)
    expected = value_and_gradients(dit, with_lora(dit))
    fresh = network(32)
    weights = with_lora(flux.use_fast_cells(fresh))
    assert_same(value_and_gradients(fresh, weights, compiled=True), expected)


def test_classes_of_mindone_stay_as_they_are(flux):
    flux.use_fast_cells(network())
    assert not any(type(cell).__module__ == flux.__name__ for _, cell in network().cells_and_names())


def test_says_how_many_once(flux, caplog):
    dit = network()
    with caplog.at_level(logging.DEBUG, logger=flux.__name__):
        flux.use_fast_cells(dit)
    assert len(caplog.records) == 1 and "modules" in caplog.text
    classes = [type(cell) for _, cell in dit.cells_and_names()]
    flux.use_fast_cells(dit)
    assert [type(cell) for _, cell in dit.cells_and_names()] == classes


# ---- guards: where the fast form does not compute the same, the module stays mindone's ----

def is_untouched(flux, cell):
    before = type(cell)
    flux.use_fast_cells(cell)
    return type(cell) is before


def test_guard_dtype(flux):
    dit = network()
    dit.proj_out.weight.set_dtype(ms.float16)
    flux.use_fast_cells(dit)
    assert not any(type(cell).__module__ == flux.__name__ for _, cell in dit.cells_and_names())


def test_guard_device(flux, monkeypatch):
    monkeypatch.setattr(flux.ms, "get_context", lambda name: "Ascend")
    assert is_untouched(flux, network().proj_out)


def guarded_modules():
    from mindone.diffusers.models import activations, layers_compat, normalization
    from mindspore import mint

    affine = mint.nn.LayerNorm(4, elementwise_affine=True)
    zero, single = normalization.AdaLayerNormZero(4), normalization.AdaLayerNormZeroSingle(4)
    zero.norm, single.norm = affine, affine
    block = network().transformer_blocks[0]
    block.norm2_context = affine
    return {
        "linear without bias": mint.nn.Linear(4, 4, bias=False),
        "exact GELU": activations.GELU(4, 4), "exact activation": layers_compat.GELU(),
        "RMSNorm with bias": normalization.RMSNorm(4, 1e-6, bias=True),
        "RMSNorm without weight": normalization.RMSNorm(4, 1e-6, elementwise_affine=False),
        "RMSNorm over two axes": normalization.RMSNorm((4, 4), 1e-6),
        "AdaLayerNormZero, affine": zero, "AdaLayerNormZeroSingle, affine": single,
        "AdaLayerNormZero with classes": normalization.AdaLayerNormZero(4, num_embeddings=3),
        "AdaLayerNormZero, float32 norm": normalization.AdaLayerNormZero(4, norm_type="fp32_layer_norm"),
        "AdaLayerNormContinuous, affine": normalization.AdaLayerNormContinuous(4, 4),
        "AdaLayerNormContinuous, RMSNorm": normalization.AdaLayerNormContinuous(4, 4, elementwise_affine=False,
                                                                               norm_type="rms_norm"),
        "block with an affine norm": block,
    }


def test_guards_of_modules(flux):
    replaced = [name for name, cell in guarded_modules().items() if not is_untouched(flux, cell)]
    assert not replaced


def test_guard_subclass(flux):
    class Own(ms.mint.nn.Linear):
        """Somebody else's."""

    assert is_untouched(flux, Own(4, 4))


def test_guard_other_processor(flux):
    dit = network()
    processor = flux.flux.FluxIPAdapterAttnProcessor(32, 32)
    dit.transformer_blocks[0].attn.set_processor(processor)
    flux.use_fast_cells(dit)
    assert dit.transformer_blocks[0].attn.processor is processor
    assert type(dit.single_transformer_blocks[0].attn.processor) is flux.FastAttnProcessor


def attend(attn, **settings):
    angles = np.random.default_rng(5).uniform(0, 6, (6, 16)).astype(np.float32)
    rotary = (Tensor(np.cos(angles)), Tensor(np.sin(angles)))
    arguments = {"hidden_states": Tensor(draw(6, 2, 6, 32)), "image_rotary_emb": rotary, **settings}
    return attn(**arguments).asnumpy()


def mask():
    taken = np.ones((2, 1, 6, 6), bool)
    taken[:, :, :, 4:] = False
    return Tensor(taken)


@pytest.mark.parametrize("case", ["mask", "fused", "no rotary", "plain"])
def test_attention_calls_that_go_to_mindone(flux, case, monkeypatch):
    calls = []
    monkeypatch.setattr(flux, "_attention", lambda *a: calls.append(1) or flux.flux.FluxAttnProcessor.__call__(*a))
    attn = network().single_transformer_blocks[0].attn
    if case == "fused":
        attn.fuse_projections()
    settings = {"mask": {"attention_mask": mask()}, "no rotary": {"image_rotary_emb": None}}.get(case, {})
    expected = attend(attn, **settings)
    found = attend(flux.use_fast_cells(attn), **settings)
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())
    assert len(calls) == (0 if case == "plain" else 1)


def test_dropout_of_attention_is_kept(flux):
    dit = network()
    attn = dit.transformer_blocks[0].attn
    attn.to_out[1].p = 1 - 1e-7
    flux.use_fast_cells(dit)
    dit.set_train(True)
    angles = Tensor(np.zeros((10, 16), np.float32))
    image, _ = attn(hidden_states=Tensor(draw(6, 2, 6, 32)), encoder_hidden_states=Tensor(draw(7, 2, 4, 32)),
                    image_rotary_emb=(angles + 1, angles))
    assert (image.asnumpy() == 0).all()


@pytest.mark.parametrize("kind", ["double", "single"])
def test_joint_attention_kwargs_go_to_mindone(flux, kind):
    dit = network()
    block = (dit.transformer_blocks if kind == "double" else dit.single_transformer_blocks)[0]
    angles = np.random.default_rng(5).uniform(0, 6, (6, 16)).astype(np.float32)
    taken = mask()

    def run():
        return [out.asnumpy().copy() for out in block(
            Tensor(draw(6, 2, 4, 32)), Tensor(draw(7, 2, 2, 32)), Tensor(draw(8, 2, 32)),
            (Tensor(np.cos(angles)), Tensor(np.sin(angles))), {"attention_mask": taken})]

    expected = run()
    flux.use_fast_cells(dit)
    for found, value in zip(run(), expected):
        np.testing.assert_allclose(found, value, rtol=0, atol=RELATIVE * np.abs(value).max())
