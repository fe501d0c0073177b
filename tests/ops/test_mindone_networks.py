"""mindone's own networks run on the CPU, forward and backward, and compiling them changes nothing.

Tolerance: float32, 1e-5 of each tensor's largest element; PyNative and compiled code call the same kernels and differ
by the order of some sums. A gradient that is zero in exact arithmetic (the bias of a key projection, which shifts all
scores of a row alike) is rounding noise, so 1e-6 of the network's largest gradient is allowed everywhere.
"""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from reference import STRICT

RELATIVE, OF_LARGEST = 1e-5, 1e-6


def draw(*shape):
    return Tensor(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


class Flux(nn.Cell):
    def __init__(self):
        from mindone.diffusers import FluxTransformer2DModel
        super().__init__()
        self.dit = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True)
        self.ids = Tensor(np.array([(0, i, j) for i in range(2) for j in range(3)], np.float32))
        self.text_ids = Tensor(np.zeros((4, 3), np.float32))

    def construct(self, tokens, time, guidance, pooled, text):
        return self.dit(hidden_states=tokens, timestep=time, guidance=guidance, pooled_projections=pooled,
                        encoder_hidden_states=text, txt_ids=self.text_ids, img_ids=self.ids, return_dict=False)[0]

    inputs = (draw(2, 6, 16), Tensor([0.5, 0.3], ms.float32), Tensor([1.0, 3.5], ms.float32), draw(2, 10),
              draw(2, 4, 12))


class Vae(nn.Cell):
    """Encode, take the mean of the posterior, decode."""

    def __init__(self):
        from mindone.diffusers import AutoencoderKL
        super().__init__()
        self.vae = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), layers_per_block=1,
            latent_channels=4, norm_num_groups=2, sample_size=8, use_quant_conv=False, use_post_quant_conv=False)

    def construct(self, pixels):
        moments = self.vae.encode(pixels, return_dict=False)[0]
        return self.vae.decode(moments[:, :4], return_dict=False)[0]

    inputs = (draw(2, 3, 8, 8),)


class Clip(nn.Cell):
    def __init__(self):
        from mindone.transformers import CLIPTextModel
        from transformers import CLIPTextConfig
        super().__init__()
        self.text = CLIPTextModel(CLIPTextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=6, projection_dim=16))

    def construct(self, words):
        hidden, pooled = self.text(words, return_dict=False)[:2]
        return hidden + pooled.expand_dims(1)

    inputs = (Tensor([[1, 5, 7, 3, 2, 19], [4, 4, 6, 19, 0, 0]], ms.int32),)


class T5(nn.Cell):
    def __init__(self):
        from mindone.transformers import T5EncoderModel
        from transformers import T5Config
        super().__init__()
        self.text = T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                            feed_forward_proj="gated-gelu", dropout_rate=0.0))

    def construct(self, words):
        return self.text(words, return_dict=False)[0]

    inputs = (Tensor([[1, 5, 7, 3, 2, 19], [4, 4, 6, 19, 0, 0]], ms.int32),)


def with_drawn_weights(network: nn.Cell) -> nn.Cell:
    """Every weight drawn on the host: MindSpore's own first weights are not the same in every run."""
    random = np.random.default_rng(11)
    for _, parameter in network.parameters_and_names():
        offset = 1.0 if parameter.ndim == 1 and "norm" in parameter.name and "weight" in parameter.name else 0.0
        noise = random.standard_normal(parameter.shape) * (0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
        parameter.set_data(Tensor((offset + noise).astype(np.float32)))
    return network


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Flux, Vae, Clip, T5])
def test_compiled_equals_pynative_in_value_and_gradient(kind):
    network = with_drawn_weights(kind())
    network.set_train(True)
    target = draw(*network(*kind.inputs).shape)

    def loss(*inputs):
        out = network(*inputs)
        return ((out - target) ** 2).mean(), out
    parameters = tuple(p for p in network.trainable_params())
    both = ms.value_and_grad(loss, None, parameters, has_aux=True)

    def step(*inputs):
        return both(*inputs)
    (value, out), gradients = step(*kind.inputs)
    (compiled_value, compiled_out), compiled_gradients = ms.jit(step, **STRICT)(*kind.inputs)
    assert np.isfinite(value.asnumpy()) and float(value.asnumpy()) > 0
    np.testing.assert_allclose(compiled_value.asnumpy(), value.asnumpy(), rtol=RELATIVE)
    assert_same("output", compiled_out.asnumpy(), out.asnumpy(), 0.0)
    arrays = [g.asnumpy() for g in gradients]
    largest = max(np.abs(a).max() for a in arrays)
    for parameter, compiled_gradient, array in zip(parameters, compiled_gradients, arrays):
        assert_same(parameter.name, compiled_gradient.asnumpy(), array, largest)


GRAPH_MODE = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import mindspore as ms; ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
from ms_diffsynth.ops import install_cpu_kernels; install_cpu_kernels()
import numpy as np, test_mindone_networks as t
np.save("gradients.npy", np.concatenate([g.asnumpy().ravel() for g in t.gradients_of(t.Flux)]))
"""


class Gradients(nn.Cell):
    def __init__(self, loss, parameters):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.gradients = ms.grad(loss, None, parameters)

    def construct(self, *inputs):
        return self.gradients(*inputs)


class Square(nn.Cell):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def construct(self, *inputs):
        out = self.network(*inputs)
        return (out * out).mean()


def gradients_of(kind):
    network = Square(with_drawn_weights(kind()))
    network.set_train(True)
    return Gradients(network, tuple(network.trainable_params()))(*kind.inputs)


@pytest.mark.slow
def test_graph_mode_of_the_whole_process_equals_pynative(tmp_path):
    tests = Path(__file__).parent
    subprocess.run([sys.executable, "-c", GRAPH_MODE.format(root=str(tests.parents[1]), tests=str(tests))],
                   cwd=tmp_path, check=True, capture_output=True)
    expected = np.concatenate([g.asnumpy().ravel() for g in gradients_of(Flux)])
    found = np.load(tmp_path / "gradients.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def assert_same(name, actual, expected, largest):
    allowed = max(RELATIVE * np.abs(expected).max(), OF_LARGEST * largest)
    error = np.abs(actual - expected).max()
    assert error <= allowed, f"{name}: differs by {error:.1e}, at most {allowed:.1e} was expected"


@pytest.mark.parametrize("kind", [Flux, Vae, Clip, T5])
def test_gradient_is_the_slope_of_the_loss(kind):
    """Along the gradient itself, where a wrong one shows most: |g|^2 against a central difference in float32.

    The loss of 1 is rounded to 6e-8; a step that moves it by 1e-2 gives the slope to 1e-3 with its curvature.
    """
    network = with_drawn_weights(kind())
    network.set_train(True)
    target = draw(*network(*kind.inputs).shape)

    def loss(*inputs):
        return ((network(*inputs) - target) ** 2).mean()
    parameters = tuple(network.trainable_params())
    _, gradients = ms.value_and_grad(loss, None, parameters)(*kind.inputs)
    arrays = [g.asnumpy().astype(np.float64) for g in gradients]
    square = sum((a ** 2).sum() for a in arrays)
    step, ends = 3e-3 / square, []
    start = [p.asnumpy().copy() for p in parameters]
    for sign in (1, -1):
        for p, s, a in zip(parameters, start, arrays):
            p.set_data(Tensor((s + sign * step * a).astype(np.float32)))
        ends.append(float(loss(*kind.inputs).asnumpy()))
    slope = (ends[0] - ends[1]) / (2 * step)
    assert abs(slope / square - 1) < 3e-3
