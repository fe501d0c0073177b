"""T5 and UMT5: relative positions in the buckets that transformers puts them in, and weights in the dtype it keeps."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.models import Source, load_component
from ms_diffsynth.pipelines.flux.pipeline import COMPONENTS
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.t5 import bucket, bucket_table, with_exact_buckets

# (buckets, max_distance) -> the first distance of each bucket of one half: transformers 5.24 on torch 2.13, for
# distances up to 700 (T5Attention._relative_position_bucket)
FIRST = {
    (32, 128): [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91],
    (64, 256): [*range(17), 20, 23, 27, 32, 39, 46, 54, 64, 77, 91, 108, 128, 153, 182, 216],
    (32, 512): [0, 1, 2, 3, 4, 5, 6, 7, 8, 14, 23, 39, 64, 108, 182, 305],
}


@pytest.fixture(scope="module", autouse=True)
def _cpu():
    runtime.configure("pynative", DEVICE)


@pytest.mark.parametrize("buckets, max_distance", FIRST)
def test_buckets_are_those_of_transformers(buckets, max_distance):
    first = FIRST[buckets, max_distance]
    for d in range(700):
        inner = np.searchsorted(first, d, "right") - 1
        assert bucket(-d, buckets, max_distance) == inner
        assert bucket(d, buckets, max_distance) == inner + (buckets // 2 if d else 0)


def test_a_table_holds_the_distance_from_query_to_key():
    table = bucket_table(20, 40, 32, 128)
    assert table.dtype == ms.int32
    wanted = [[bucket(key - query, 32, 128) for key in range(40)] for query in range(20)]
    assert table.asnumpy().tolist() == wanted


def _umt5():
    with quiet_imports():
        from mindone.transformers import UMT5EncoderModel
        from transformers import UMT5Config
    return UMT5EncoderModel(UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))


def _t5():
    config = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return COMPONENTS[3].build(config)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("build", [_t5, _umt5])
def test_every_layer_with_relative_positions_looks_them_up_in_the_table(build, mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = with_exact_buckets(build())
    layers = [cell for _, cell in encoder.cells_and_names() if getattr(cell, "has_relative_attention_bias", False)]
    assert len(layers) == (1 if build is _t5 else 2)  # T5 shares one table among its layers
    for layer in layers:
        compute = ms.jit(layer.compute_bias, fullgraph=True) if mode == "graph" else layer.compute_bias
        found, weight = compute(70, 70).asnumpy(), next(layer.relative_attention_bias.get_parameters()).asnumpy()
        buckets = [[bucket(key - query, 32, 128) for key in range(70)] for query in range(70)]
        np.testing.assert_array_equal(found, weight[np.array(buckets)].transpose(2, 0, 1)[None])


def test_the_encoder_uses_them(tiny_flux):
    """In the hidden states: positions 32 apart are one bucket on, which the CPU's own logarithm misses."""
    encoder = load_component(COMPONENTS[3], Source(tiny_flux / "text_encoder_2"), ms.float32)
    layer = encoder.encoder.block[0].layer[0].SelfAttention
    ids = Tensor(np.arange(40, dtype=np.int32)[None])
    before = encoder(ids, return_dict=False)[0].asnumpy()
    weight = layer.relative_attention_bias.weight.asnumpy().copy()
    weight[[12, 28]] += 5.0  # from 32 to 45 tokens apart
    layer.relative_attention_bias.weight.set_data(Tensor(weight))
    after = encoder(ids, return_dict=False)[0].asnumpy()
    changed = np.abs(after - before).max(-1)[0] > 1e-6
    assert changed[:8].all() and changed[32:].all()


@pytest.mark.slow
def test_the_compiled_encoder_is_the_eager_one(tiny_flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = load_component(COMPONENTS[3], Source(tiny_flux / "text_encoder_2"), ms.float32)

    def encode(ids):
        return encoder(ids, return_dict=False)[0]

    for tokens in (16, 40):
        ids = Tensor(np.arange(tokens, dtype=np.int32)[None])
        np.testing.assert_allclose(ms.jit(encode, fullgraph=True)(ids).asnumpy(), encode(ids).asnumpy(), atol=1e-6)


def test_wo_stays_float32_where_float16_would_overflow(tiny_flux):
    source = Source(tiny_flux / "text_encoder_2")
    half = load_component(COMPONENTS[3], source, ms.float16)
    kept = {name for name, p in half.parameters_and_names() if p.dtype == ms.float32}
    assert kept == {f"encoder.block.{k}.layer.1.DenseReluDense.wo.weight" for k in range(2)}
    assert {p.dtype for p in load_component(COMPONENTS[3], source, ms.bfloat16).get_parameters()} == {ms.bfloat16}
    # hidden states beyond 65504, the largest of float16
    whole = load_component(COMPONENTS[3], source, ms.float32)
    for encoder in (half, whole):
        for name, p in encoder.parameters_and_names():
            if ".wo." in name:
                ms.ops.assign(p, p * 3e4)
    ids = Tensor(np.arange(8, dtype=np.int32)[None])
    found, wanted = (encoder(ids, return_dict=False)[0].asnumpy().astype(np.float32) for encoder in (half, whole))
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
