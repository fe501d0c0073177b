"""Several template caches become one, and one becomes single Tensors and back."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.template.cache import JoinTemplateCache, merge, to_slots

A, B = "transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.0.attn.to_q.lora_B.weight"
OTHER_A, OTHER_B = (name.replace("to_q", "to_k") for name in (A, B))


def numbers(*shape, seed=0):
    return Tensor(np.random.default_rng([*shape, seed]).standard_normal(shape).astype(np.float32))


def pair(tokens):
    """K and V of one block."""
    return numbers(1, tokens, 3, 8), numbers(1, tokens, 3, 8, seed=1)


def same(a, b):
    """Whether two caches have the same structure, order and bits."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and np.array_equal(a.asnumpy(), b.asnumpy())


def test_keys_and_values_are_joined_along_the_tokens_block_by_block():
    first = {"kv_cache": {"single_1": pair(4), "double_0": pair(1)}}
    second = {"kv_cache": {"single_0": pair(5), "single_1": pair(2)}}
    merged = merge([first, second])["kv_cache"]
    assert list(merged) == ["single_1", "double_0", "single_0"], "the union, in the order of their appearance"
    k, v = (x.asnumpy() for x in merged["single_1"])
    assert k.shape == v.shape == (1, 6, 3, 8)
    for found, side in ((k, 0), (v, 1)):
        assert np.array_equal(found[:, :4], first["kv_cache"]["single_1"][side].asnumpy())
        assert np.array_equal(found[:, 4:], second["kv_cache"]["single_1"][side].asnumpy())
    assert same(merged["double_0"], first["kv_cache"]["double_0"])
    assert same(merged["single_0"], second["kv_cache"]["single_0"])
    swapped = merge([second, first])["kv_cache"]["single_1"][0].asnumpy()
    assert np.array_equal(swapped[:, 2:], k[:, :4])
    assert list(merge([second, first])["kv_cache"]) == ["single_0", "single_1", "double_0"]


@pytest.mark.parametrize("batch", [(), (1,)], ids=["without a batch axis", "with one"])
def test_a_merged_lora_is_the_sum_of_the_corrections(batch):
    first = {"lora": {A: numbers(*batch, 2, 6), B: numbers(*batch, 5, 2)}}
    second = {"lora": {A: numbers(*batch, 3, 6), B: numbers(*batch, 5, 3), OTHER_A: numbers(1, 6),
                       OTHER_B: numbers(5, 1)}}
    merged = merge([first, second])["lora"]
    assert merged[A].shape == (*batch, 5, 6) and merged[B].shape == (*batch, 5, 5)
    assert list(merged) == [A, B, OTHER_A, OTHER_B] and same(merged[OTHER_A], second["lora"][OTHER_A])
    sums = [lora[B].asnumpy() @ lora[A].asnumpy() for lora in (merged, first["lora"], second["lora"])]
    np.testing.assert_allclose(sums[0], sums[1] + sums[2], atol=1e-6)


def test_text_is_joined_along_the_tokens():
    parts = [numbers(1, n, 7) for n in (2, 3, 1)]
    merged = merge([{"text_embedding": part} for part in parts])
    assert list(merged) == ["text_embedding"]
    assert np.array_equal(merged["text_embedding"].asnumpy(), np.concatenate([p.asnumpy() for p in parts], 1))


def test_kinds_do_not_meet_and_one_cache_stays_as_it_is():
    kv, text = {"kv_cache": {"double_0": (numbers(1, 1, 1, 1),) * 2}}, {"text_embedding": numbers(1, 1, 1)}
    assert same(merge([text, {}, kv]), {**kv, **text}) and merge([]) == {}
    assert merge([kv])["kv_cache"] is kv["kv_cache"]


def test_dtypes_are_those_of_the_first():
    merged = merge([{"text_embedding": numbers(1, 1, 2).half()}, {"text_embedding": numbers(1, 1, 2)}])
    assert str(merged["text_embedding"].dtype) == "Float16"


@pytest.mark.parametrize("cache", [
    {"kv_cache": {"single_0": pair(2), "double_0": pair(1)}},
    {"lora": {A: numbers(2, 6), B: numbers(5, 2)}},
    {"text_embedding": numbers(1, 3, 7)},
    {"kv_cache": {"double_0": pair(1)}, "lora": {B: numbers(5, 2), A: numbers(2, 6)},
     "text_embedding": numbers(1, 3, 7)},
], ids=["kv", "lora", "text", "all"])
def test_slots_are_single_tensors_and_join_is_their_inverse(cache):
    slots = {"prompt_embeds": numbers(1)} | to_slots(cache) | {"guidance": numbers(1)}
    assert all(isinstance(value, Tensor) for value in slots.values())
    join = JoinTemplateCache(tuple(slots))
    assert not {"prompt_embeds", "guidance"} & set(join.input_params)
    assert same(join(*[slots[name] for name in join.input_params])[0], cache)
    backwards = JoinTemplateCache(tuple(reversed(slots)))
    found = backwards(*[slots[name] for name in backwards.input_params])[0]
    assert found.keys() == cache.keys()
    assert all(same(pair, cache["kv_cache"][block]) for block, pair in found.get("kv_cache", {}).items())


def test_no_cache_has_no_slots():
    assert to_slots({}) == {} and JoinTemplateCache(("latents", "prompt_embeds")).input_params == ()
