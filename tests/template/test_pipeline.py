"""Sampling with templates, eagerly on the toy pipeline where the network does not matter."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from mindspore import Tensor

from ms_diffsynth import Flux2ImagePipeline, TemplatePipeline, runtime
from ms_diffsynth.errors import ConfigError, TemplateError, UntrustedCodeError
from ms_diffsynth.formats.lora import save_lora
from ms_diffsynth.pipelines.toy.pipeline import ToyImagePipeline
from ms_diffsynth.template.cache import merge
from ms_diffsynth.template.code import read_code
from ms_diffsynth.template.loading import Template
from ms_diffsynth.template.pipeline import template_cache

TRUST = {"trust_template_code": True}
OPTIONS = {"prompt": "a cat", "height": 16, "width": 16, "seed": 0, "num_inference_steps": 2}


def pixels(picture):
    return np.asarray(picture).astype(int)


def same(a, b):
    """Whether two caches of keys and values are equal to the bit."""
    a, b = a["kv_cache"], b["kv_cache"]
    return list(a) == list(b) and all(np.array_equal(x.asnumpy(), y.asnumpy())
                                      for block in a for x, y in zip(a[block], b[block]))


@pytest.fixture
def folders(template, plain_source):
    """Three templates that differ in a factor."""
    return [template(plain_source.replace("ops.sin(vectors)", f"ops.sin({k} * vectors)"), f"t{k}") for k in (1, 2, 5)]


@pytest.fixture
def seen(monkeypatch):
    """(prompt, template cache or None) of every condition, in order."""
    found, conditions = [], ToyImagePipeline.conditions

    def noting(self, *branches):
        found.extend((branch["prompt"], branch.get("template_cache")) for branch in branches if branch is not None)
        return conditions(self, *branches)

    monkeypatch.setattr(ToyImagePipeline, "conditions", noting)
    return found


def test_without_template_inputs_it_is_the_base_pipeline(toy, folders):
    pipe, templates = toy(), TemplatePipeline.from_pretrained(folders, **TRUST)
    base = pixels(pipe(**OPTIONS))
    for nothing in ({}, {"template_inputs": None}, {"template_inputs": []}, {"negative_template_inputs": []}):
        assert np.array_equal(pixels(templates(pipe, **OPTIONS, **nothing)), base)
    assert np.array_equal(pixels(TemplatePipeline.from_pretrained([], **TRUST)(pipe, **OPTIONS)), base)
    dark, bright = (pixels(templates(pipe, **OPTIONS, template_inputs=[{"scale": s}])) for s in (-20, 20))
    assert (dark != base).any() and (dark != bright).any()
    assert np.array_equal(pixels(pipe(**OPTIONS)), base), "nothing of a template stays behind"


def test_several_templates_are_chosen_by_model_id_and_merged_in_order(toy, folders, seen):
    pipe, templates = toy(), TemplatePipeline.from_pretrained(folders, **TRUST)
    inputs = [{"model_id": 2, "scale": 1}, {"scale": 2}, {"scale": 3, "model_id": 1}, {"model_id": 2, "scale": 4}]
    templates(pipe, template_inputs=inputs, **OPTIONS)
    single = [template_cache(templates.templates[k], templates.fetch_model(k), pipe, {"scale": scale})
              for k, scale in ((2, 1), (0, 2), (1, 3), (2, 4))]
    assert same(seen[-1][1], merge(single)) and seen[-1][1]["kv_cache"]["double_0"][0].shape == (1, 8, 2, 8)
    assert not same(single[0], template_cache(templates.templates[0], templates.fetch_model(0), pipe, {"scale": 1}))
    assert inputs[0] == {"model_id": 2, "scale": 1}, "the caller's inputs stay as they are"


def test_the_negative_branch_has_templates_of_its_own_or_none(toy, folders, seen):
    pipe, templates = toy(), TemplatePipeline.from_pretrained(folders, **TRUST)
    pictures = {}
    for name, negative in (("none", None), ("own", [{"scale": -9}])):
        seen.clear()
        pictures[name] = pixels(templates(pipe, negative_prompt="no", cfg_scale=3, template_inputs=[{"scale": 9}],
                                          negative_template_inputs=negative, **OPTIONS))
        assert [prompt for prompt, _ in seen] == ["a cat", "no"]
        assert same(seen[0][1], templates.call_single_side(pipe, [{"scale": 9}]))
        if negative is None:
            assert seen[1][1] is None
        else:
            assert same(seen[1][1], templates.call_single_side(pipe, negative))
    assert (pictures["none"] != pictures["own"]).any()
    only = pixels(templates(pipe, cfg_scale=3, negative_template_inputs=[{"scale": -9}], **OPTIONS))
    assert seen[-2][1] is None and same(seen[-1][1], templates.call_single_side(pipe, [{"scale": -9}]))
    assert (only != pictures["own"]).any()


def test_lazy_loading_keeps_one_model_and_gives_the_same(toy, folders, seen, monkeypatch):
    built, build = [], Template.build

    def counting(self, dtype=ms.float32):
        built.append(self.code.folder.name)
        return build(self, dtype)

    monkeypatch.setattr(Template, "build", counting)
    inputs = [{"scale": 1, "model_id": k} for k in (1, 1, 2, 0)]
    TemplatePipeline.from_pretrained(folders, **TRUST)(toy(), template_inputs=inputs, **OPTIONS)
    assert built == ["t1", "t2", "t5"]
    built.clear()
    lazy = TemplatePipeline.from_pretrained(folders, lazy_loading=True, **TRUST)
    assert built == []
    lazy(toy(), template_inputs=inputs, **OPTIONS)
    assert built == ["t2", "t5", "t1"] and list(lazy._models) == [0] and same(seen[0][1], seen[1][1])


def test_compiled_sampling_gives_the_eager_picture_and_compiles_once_a_branch(toy, folders):
    templates, pictures = TemplatePipeline.from_pretrained(folders, **TRUST), {}
    for mode in ("pynative", "graph"):
        runtime.configure(mode, DEVICE)
        pipe = toy()
        pictures[mode] = [pixels(templates(pipe, cfg_scale=2, template_inputs=[{"scale": s}], **OPTIONS))
                          for s in (9, -9)]
    for a, b in zip(*pictures.values()):
        assert np.abs(a - b).max() <= 1
    assert (pictures["graph"][0] != pictures["graph"][1]).any()
    assert [step.compilations for step in pipe.compiled_steps.values()] == [1, 1], "with a template, and without"


@pytest.mark.parametrize("inputs, message", [
    ([{"model_id": 3, "scale": 1}], "model_id=3: there are 3 templates; expected one of 0, 1, 2"),
    ([{"model_id": -1, "scale": 1}], "model_id=-1: there are 3 templates"),
    ([{"model_id": "bright", "scale": 1}], "model_id='bright': there are 3 templates"),
    ({"scale": 1}, r"template_inputs=\{'scale': 1\}: expected a list of dicts.*Put it into brackets"),
    (["scale"], r"template_inputs=\['scale'\]: expected a list of dicts"),
    ("scale", "template_inputs='scale': expected a list of dicts"),
])
def test_inputs_that_cannot_be(toy, folders, inputs, message):
    templates = TemplatePipeline.from_pretrained(folders, **TRUST)
    with pytest.raises(ConfigError, match=message):
        templates(toy(), template_inputs=inputs, **OPTIONS)


def test_inputs_that_a_template_or_a_pipeline_does_not_know(toy, toy_folder, folders, template, plain_source):
    templates = TemplatePipeline.from_pretrained(folders, **TRUST)
    with pytest.raises(TemplateError, match=r"model\.py: process_inputs failed on \{'scael': 1\} .*'scale'"):
        templates(toy(), template_inputs=[{"scael": 1}], **OPTIONS)
    with pytest.raises(ConfigError, match=r"TemplateToy has no input cfg_scael; .*Did you mean 'cfg_scale'"):
        templates(toy(), template_inputs=[{"scale": 1}], cfg_scael=2, **OPTIONS)
    with pytest.raises(ConfigError, match="ToyImagePipeline has no input template_cache"):
        templates(ToyImagePipeline.from_pretrained(str(toy_folder)), template_inputs=[{"scale": 1}], **OPTIONS)
    broken = template(plain_source.replace("return {\"kv_cache\"", "return {\"kv\""), "broken")
    with pytest.raises(TemplateError, match=r"broken/model\.py: forward returned 'kv': expected a dict with kv_cache"):
        TemplatePipeline.from_pretrained(broken, **TRUST)(toy(), template_inputs=[{"scale": 1}], **OPTIONS)
    raising = template(plain_source.replace("vectors = ", "vectors = 1 / 0 + "), "raising")
    with pytest.raises(TemplateError, match=r"raising/model\.py line \d+: forward failed \(ZeroDivisionError"):
        TemplatePipeline.from_pretrained(raising, **TRUST)(toy(), template_inputs=[{"scale": 1}], **OPTIONS)


def test_each_template_has_its_sha256(folders):
    hashes = [read_code(folder).sha256 for folder in folders]
    assert len(TemplatePipeline.from_pretrained(folders, **TRUST, trust_template_sha256=hashes).templates) == 3
    with pytest.raises(UntrustedCodeError, match="is not what was allowed"):
        TemplatePipeline.from_pretrained(folders, **TRUST, trust_template_sha256=hashes[::-1])
    with pytest.raises(ConfigError, match="trust_template_sha256 has 1 entries for 3 templates"):
        TemplatePipeline.from_pretrained(folders, **TRUST, trust_template_sha256=hashes[0])
    assert TemplatePipeline.from_pretrained(folders[0], **TRUST, trust_template_sha256=hashes[0]).dtype == ms.float32


def test_a_lora_as_template_cache_is_the_lora_loaded(flux2_folder, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"transformer_blocks.0.attn.to_q": (96, 96), "transformer_blocks.1.ff.linear_in": (96, 576),
             "transformer_blocks.0.attn.to_add_out": (96, 96), "transformer_blocks.0.ff_context.linear_out": (288, 96),
             "single_transformer_blocks.1.attn.to_qkv_mlp_proj": (96, 864),
             "single_transformer_blocks.0.attn.to_out": (384, 96)}
    pairs = {module: tuple(rng.standard_normal(shape).astype(np.float32) / 10 for shape in ((2, inner), (outer, 2)))
             for module, (inner, outer) in sizes.items()}
    save_lora(tmp_path / "lora.safetensors", pairs, alpha=2)
    cache = {f"{module}.lora_{side}.weight": Tensor(x) for module, pair in pairs.items() for side, x in zip("AB", pair)}
    pipe = Flux2ImagePipeline.from_pretrained(str(flux2_folder))
    pipe.max_sequence_length = 16
    latents, sigma = Tensor(rng.standard_normal((1, 128, 2, 2)).astype(np.float32)), Tensor(np.float32([0.7]))
    guidance = Tensor(np.float32([1]))

    def velocity(**extra):
        return pipe.denoiser(pipe.condition("a cat", guidance=guidance, **extra))(latents, sigma).asnumpy()

    base, cached = velocity(), velocity(template_cache={"lora": cache})
    batched = velocity(template_cache={"lora": {name: x.expand_dims(0) for name, x in cache.items()}})
    assert pipe.load_lora(pipe.dit, tmp_path / "lora.safetensors") == len(sizes)
    fused = velocity()
    assert np.abs(fused - base).max() > 1e-2
    np.testing.assert_allclose(cached, fused, atol=1e-5)
    np.testing.assert_allclose(batched, fused, atol=1e-5)
