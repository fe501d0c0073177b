"""Pipelines: where models come from, what is wrong with them when something is, and the three dictionaries."""
from __future__ import annotations

import gc
import json
import logging
import shutil
import weakref

import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.errors import ConfigError, ProgramError, WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_sharded, save_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipeline import Pipeline, UnitSequence, _fresh_random
from ms_diffsynth.pipelines.toy.pipeline import ToyImagePipeline
from ms_diffsynth.program import Program
from ms_diffsynth.units import PipelineUnit, TensorUnit


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model("toy")


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny, tmp_path / "toy")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- loading ---------------------------------------------------------------------------------------------------------


def test_models_are_loaded_at_first_use_frozen_and_in_evaluation_mode(tiny):
    pipe = ToyImagePipeline.from_pretrained(str(tiny))
    assert pipe.models == {}
    assert pipe.config("vae")["scaling_factor"] == 0.5 and pipe.models == {}
    vae = pipe.vae
    assert list(pipe.models) == ["vae"] and pipe.vae is vae
    assert not vae.trainable_params() and not vae.training
    assert pipe.config("vae")["scaling_factor"] == 0.5
    pipe.load_models_to_device(["dit"])
    assert list(pipe.models) == ["vae", "dit"]
    with pytest.raises(ConfigError, match=r"'dot' is not a model of ToyImagePipeline.*Did you mean 'dit'"):
        pipe.load_models_to_device(["dot"])
    with pytest.raises(AttributeError, match="has no attribute 'control'"):
        _ = pipe.control


def test_a_pipeline_that_is_not_made_yet_has_no_models():
    for name in ("vae", "store"):
        with pytest.raises(AttributeError, match="has no attribute"):
            getattr(ToyImagePipeline.__new__(ToyImagePipeline), name)


def test_a_config_is_read_once(tiny, monkeypatch):
    pipe = ToyImagePipeline.from_pretrained(str(tiny))
    read, config = [], {"latent_channels": 4, "scaling_factor": 0.5}
    monkeypatch.setattr("ms_diffsynth.models.read_config", lambda folder, *name: read.append(folder) or config)
    for _ in range(3):
        assert pipe.config("vae") == config
    assert read == [tiny / "vae"]


def test_models_that_are_unloaded_are_gone_and_come_back_when_they_are_used(tiny):
    pipe = ToyImagePipeline.from_pretrained(str(tiny))
    pixels = {"pixels": Tensor(np.zeros((1, 3, 16, 16), np.float32))}
    (encode,) = (unit for unit in pipe.units if unit.name == "encode_image")
    moments = pipe.run([encode], pixels)["moments"].asnumpy()
    vae = weakref.ref(pipe.vae)
    pipe.unload_models(["vae", "dit"])  # dit was not loaded
    gc.collect()
    assert vae() is None and pipe.models == {}
    assert (pipe.run([encode], pixels)["moments"].asnumpy() == moments).all()


def test_components_can_be_given_one_by_one_as_folders_or_files(tiny):
    file = tiny / "transformer/diffusion_pytorch_model.safetensors"
    pipe = ToyImagePipeline.from_pretrained([ModelConfig(str(tiny / "vae")), ModelConfig(str(file))])
    wanted = load_state_dict(file)
    assert np.array_equal(pipe.dit.layer_1.weight.asnumpy(), wanted["layer_1.weight"])
    with pytest.raises(WeightError, match=r"'text_encoder' is needed, but no files were given for it; given: vae, "
                                          r"dit\. Add a ModelConfig for its 'text_encoder' folder"):
        _ = pipe.text_encoder
    with pytest.raises(WeightError, match="given: none"):
        _ = ToyImagePipeline().dit


def test_the_config_of_another_model(folder):
    edit_config(folder / "transformer", _class_name="UNet2DConditionModel")
    with pytest.raises(WeightError, match=r"describes a UNet2DConditionModel, but ToyImagePipeline is made of "
                                          r"ToyTextEncoder, ToyAutoencoder, ToyTransformer"):
        ToyImagePipeline.from_pretrained(ModelConfig(str(folder / "transformer")))
    with pytest.raises(WeightError, match="describes a UNet2DConditionModel, but 'dit' is a ToyTransformer"):
        _ = ToyImagePipeline.from_pretrained(str(folder)).dit
    edit_config(folder / "transformer", _class_name="ToyTransformer", hidden_size=0)
    with pytest.raises(WeightError, match=r"no ToyTransformer can be built from .*config.json .*hidden_size=0"):
        _ = ToyImagePipeline.from_pretrained(str(folder)).dit


@pytest.mark.parametrize("text, part", [(None, "config.json is missing: .*Download the whole component folder"),
                                        ("{", "config.json is not JSON"), ("{}", "a model without a class name")])
def test_a_config_that_cannot_be_read(folder, text, part):
    path = folder / "vae/config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(WeightError, match=part):
        _ = ToyImagePipeline.from_pretrained(str(folder)).vae


def test_weights_that_do_not_fit_are_all_named(folder):
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_state_dict(file)
    weights["layer_one.weight"] = weights.pop("layer_1.weight")
    weights["layer_2.bias"] = np.zeros(3, np.float32)
    save_state_dict(file, weights)
    with pytest.raises(WeightError) as error:
        _ = ToyImagePipeline.from_pretrained(str(folder)).dit
    for part in ("transformer does not fit the model (6 tensors expected, 6 found)",
                 "1 missing: layer_1.weight (near: layer_one.weight)", "1 superfluous: layer_one.weight",
                 "1 of the wrong shape: layer_2.bias (3,), expected (16,)"):
        assert part in str(error.value)


def test_a_missing_shard_is_named_with_what_it_holds(folder):
    target = folder / "transformer"
    weights, config = load_state_dict(target), json.loads((target / "config.json").read_text())
    save_sharded(target, weights, max_shard_bytes=1100, config=config, replace=True)
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2
    assert np.array_equal(ToyImagePipeline.from_pretrained(str(folder)).dit.layer_1.weight.asnumpy(),
                          weights["layer_1.weight"])
    lost = load_state_dict(shards[1])
    shards[1].unlink()
    with pytest.raises(WeightError) as error:
        _ = ToyImagePipeline.from_pretrained(str(folder)).dit
    assert shards[1].name in str(error.value) and all(name in str(error.value) for name in lost)


# -- units -----------------------------------------------------------------------------------------------------------


def test_a_unit_that_touches_a_model_it_did_not_declare(tiny):
    class Peek(PipelineUnit):
        input_params, output_params = ("prompt",), ("seen",)

        def process(self, pipe, prompt):
            return {"seen": pipe.dit}

    with pytest.raises(ProgramError, match="'peek' touches the model 'dit' without declaring it"):
        ToyImagePipeline.from_pretrained(str(tiny)).run([Peek()], {"prompt": "a"})


class Count(PipelineUnit):
    """Writes how often it ran, and what it saw."""

    def __init__(self, reads, writes):
        super().__init__(input_params=reads, output_params=(writes,))
        self.seen = []

    def process(self, pipe, **inputs):
        self.seen.append(inputs)
        return {self.output_params[0]: len(self.seen)}


def test_the_three_dictionaries(tiny):
    pipe = ToyImagePipeline.from_pretrained(str(tiny))
    shared, posi, nega = {"height": 8, "cfg_scale": 4.0}, {"prompt": "cat"}, {"negative_prompt": "dog"}
    both, later, once = Count(("prompt", "height"), "ids"), Count(("ids",), "embeds"), Count(("height",), "rows")
    for unit in (both, later, once):
        given = (dict(shared), dict(posi), dict(nega))
        result = pipe.unit_runner(unit, pipe, shared, posi, nega)
        assert (shared, posi, nega) == given, "what was given is not changed"
        shared, posi, nega = result
    assert both.seen == [{"prompt": "cat", "height": 8}, {"prompt": "dog", "height": 8}]
    assert (posi["ids"], nega["ids"]) == (1, 2) and later.seen == [{"ids": 1}, {"ids": 2}]
    assert shared["rows"] == 1 and "rows" not in posi and len(once.seen) == 1
    one = Count(("prompt",), "ids")
    _, posi, nega = pipe.unit_runner(one, pipe, {"cfg_scale": 1}, {"prompt": "cat"}, {"negative_prompt": ""})
    assert len(one.seen) == 1 and posi["ids"] == nega["ids"] == 1


class Scale(TensorUnit):
    def __init__(self, name, reads, writes, factor):
        super().__init__()
        self.name, self.input_params, self.output_params, self.factor = name, reads, writes, factor

    def construct(self, x, offset=None):
        y = x * self.factor
        if offset is not None:
            y = y + offset
        return (y, -y)


def test_a_sequence_is_wired_by_position_and_absent_slots_are_none():
    first, second = Scale("a", ("x", "absent?"), ("y", "z"), 2.0), Scale("b", ("z", "x"), ("u", "v"), 3.0)
    cut = Program([first, second], (), ("x",)).cut(("v", "y"))
    x = Tensor(np.float32([1, 2]))
    v, y = UnitSequence(cut, None).positional(x)
    assert y.asnumpy().tolist() == [2, 4] and v.asnumpy().tolist() == [5, 10]  # -(3 * -2x + x)


def test_pictures_and_sizes(tiny, caplog):
    pipe = ToyImagePipeline.from_pretrained(str(tiny))
    with caplog.at_level(logging.WARNING):
        assert pipe.check_resize_height_width(17, 24) == (24, 24)
        assert pipe.check_resize_height_width(24, 24) == (24, 24)
    assert len(caplog.records) == 1 and "17 x 24 pixels" in caplog.text


def test_without_a_seed_draws_are_fresh_and_of_a_known_kind():
    first, second = (_fresh_random("noise", "normal", (4, 3)) for _ in range(2))
    assert first.dtype == np.float32 and first.shape == (4, 3) and not np.array_equal(first, second)
    uniform = _fresh_random("density", "uniform", (100,))
    assert 0 <= uniform.min() and uniform.max() < 1
    with pytest.raises(ProgramError, match="unknown kind 'gauss'"):
        _fresh_random("noise", "gauss", (1,))


def test_the_condition_says_what_it_lacks(tiny):
    with pytest.raises(ProgramError, match=r"condition\(\) needs guidance: pass guidance=Tensor"):
        ToyImagePipeline.from_pretrained(str(tiny)).condition("a cat")


def test_what_a_family_must_provide():
    pipe = ToyImagePipeline()
    for method, args in (("build_units", ()), ("build_denoise", ()), ("latent_shape", (8, 8)),
                         ("training_schedule", ("sft",))):
        with pytest.raises(TypeError, match=f"ToyImagePipeline has no {method}: implement it"):
            getattr(Pipeline, method)(pipe, *args)
