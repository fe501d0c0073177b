"""What a network cannot take from a template: every message, eager and compiled."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from processes import run_python

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.errors import TemplateError
from ms_diffsynth.pipelines.flux2.template import by_block, joined, with_text
from ms_diffsynth.template.cache import check_cache

TO_Q = "transformer_blocks.0.attn.to_q"


class Wrong(nn.Cell):
    """Caches no network takes, through all checks on the way to the blocks."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def cache(self, x):
        kind, result = self.kind, {"kv_cache": {"double_0": (x, x)}, "text_embedding": x[:, :, 0]}
        if kind == "nothing":
            result = None
        if kind == "tensor":
            result = x
        if kind == "empty":
            result = {}
        if kind == "name":
            result = {"kv_cahce": {"double_0": (x, x)}}
        if kind == "no blocks":
            result = {"kv_cache": (x, x)}
        if kind == "no pair":
            result = {"kv_cache": {"double_0": x}}
        if kind == "block":
            result = {"kv_cache": {"double_9": (x, x)}}
        if kind == "shape":
            result = {"kv_cache": {"double_0": (x, x[:, :, :1])}}
        if kind == "rank":
            result = {"kv_cache": {"double_0": (x[0], x[0])}}
        if kind == "batch":
            result = {"kv_cache": {"double_0": (ops.cat((x, x, x)), ops.cat((x, x, x)))}}
        if kind == "text":
            result = {"text_embedding": x[:, :, 0, :2]}
        if kind == "layer":
            result = {"lora": {"transformer_blocks.0.attn.to_x.lora_A.weight": x[0, 0]}}
        if kind == "half":
            result = {"lora": {TO_Q + ".lora_A.weight": x[0, 0]}}
        if kind == "lora rank":
            result = {"lora": {TO_Q + ".lora_A.weight": x[0, 0], TO_Q + ".lora_B.weight": x[0, 0]}}
        return result

    def construct(self, x):
        cache = check_cache(self.cache(x))
        y = with_text(x[:, :, 0], cache).sum()
        blocks = by_block(cache, ("double_0", "single_0"), x.shape[0], (3, 4), ms.float32)
        for name in ("double_0", "single_0"):
            if "kv" in blocks[name]:
                y = y + ops.cat((x, blocks[name]["kv"][0]), 1).sum()
            if "attn.to_q" in blocks[name]:
                a, b = blocks[name]["attn.to_q"]
                y = y + ops.matmul(ops.matmul(x[0], a.swapaxes(-1, -2)), b.swapaxes(-1, -2)).sum()
        return (y,)


# MindSpore keeps what a failed compilation leaves behind, and may stumble over it when it compiles something else
MODES = ["pynative", pytest.param("graph", marks=pytest.mark.alone)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind, message", [
    ("nothing", "the template's forward returned something that is not a dict: expected a dict with kv_cache"),
    ("tensor", "something that is not a dict"), ("empty", "an empty dict"),
    ("name", "returned 'kv_cahce': expected a dict with .*Did you mean 'kv_cache'"),
    ("no blocks", r"returned a kv_cache of another kind: expected a dict: block name -> \(K, V\)"),
    ("no pair", r"returned a kv_cache\['double_0'\] of another kind: expected two Tensors \(K, V\)"),
    ("block", r"names double_9: this network has double_0, single_0\. Did you mean 'double_0'\?"),
    ("shape", r"kv_cache\['double_0'\] has the shapes \[2, 5, 3, 4\] and \[2, 5, 1, 4\]: .*each \[2, tokens, 3, 4\]"),
    ("rank", r"kv_cache\['double_0'\] has the shapes \[5, 3, 4\] and \[5, 3, 4\]"),
    ("batch", r"kv_cache\['double_0'\] has the shapes \[6, 5, 3, 4\]"),
    ("text", r"text_embedding has the shape \[2, 5, 2\]: expected \[2, tokens, 4\], as prompt_embeds"),
    ("layer", r"lora names transformer_blocks\.0\.attn\.to_x: .*Did you mean 'transformer_blocks\.0\.attn\.to_v'|to_q"),
    ("half", r"lora names half of transformer_blocks\.0\.attn\.to_q: expected <module>\.lora_A"),
    ("lora rank", r"lora of transformer_blocks\.0\.attn\.to_q has the shapes \[3, 4\] and \[3, 4\]: expected A \[rank"),
])
def test_a_cache_that_cannot_enter_is_an_error_that_says_why(mode, kind, message):
    with pytest.raises(TemplateError, match=message):
        CompiledStep(Wrong(kind).construct, "the step", mode)(Tensor(np.ones((2, 5, 3, 4), np.float32)))


@pytest.mark.slow
def test_what_fails_to_compile_fails_in_a_process_of_its_own():
    child = run_python("-m", "pytest", "-q", "-m", "alone", "-p", "no:cacheprovider", __file__)
    assert child.returncode == 0 and "." * 15 in child.stdout, child.stdout


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_of_the_wrong_width_is_an_error_that_names_the_layer(mode):
    good = CompiledStep(Joined().construct, "the step", mode)
    a, b = good(Tensor(np.ones((3, 4), np.float32)), Tensor(np.ones((6, 3), np.float32)))
    assert a.shape == (2, 3, 4) and b.shape == (2, 6, 3)
    with pytest.raises(TemplateError, match=r"lora of a layer attn\.to_out has the shapes \[2, 3, 5\] and \[2, 6, 3\]"):
        good(Tensor(np.ones((3, 5), np.float32)), Tensor(np.ones((6, 3), np.float32)))


class Joined(nn.Cell):
    def construct(self, a, b):
        lora = {"single_transformer_blocks.0.attn.to_out.lora_A.weight": a,
                "single_transformer_blocks.0.attn.to_out.lora_B.weight": b}
        template = by_block({"lora": lora}, ("single_0",), 2, (3, 4), ms.float32)
        (_, (_, pairs), norm), kv = joined(("to_qkv", "to_out", "norm"), template, "single_0", ((9, 4), (6, 4)))
        return pairs[0] if norm == "norm" and kv == () else None
