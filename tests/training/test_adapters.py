"""What holds for every adapter of the registry, from training mode to a fused file, and for one that a test adds."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops
from toy_run import Module, rows, train

from ms_diffsynth.errors import CheckpointError, ConfigError
from ms_diffsynth.formats.adapters import LORA
from ms_diffsynth.nn.adapters import ADAPTERS, adapter
from ms_diffsynth.nn.adapters.layer import AdaptedLinear, adapted_layers
from ms_diffsynth.nn.adapters.linear import LinearAdapter
from ms_diffsynth.registry import family
from ms_diffsynth.storage.checkpoint import latest
from ms_diffsynth.training import same_run


class GainLinear(AdaptedLinear):
    def construct(self, x):
        y = self.base(x)
        return y + (y - self.base.bias) * self.gain * self.scale


class Gain(LinearAdapter):
    """The smallest there is: a factor for each output feature."""

    name = "gain"
    format = replace(LORA, name="gain", group="vector", shapes="gain [out]", parts={"gain": ("gain",)}, scaled="gain",
                     rank=lambda parts: 1, fits=lambda parts, weight: parts["gain"].shape == weight[:1], product=None,
                     fused=lambda weight, parts, scale: weight * (1 + np.float32(scale) * parts["gain"][:, None]))

    def layer(self, base, name, rank, scale, uniform):
        return GainLinear(base, {"gain": np.zeros(base.weight.shape[0], np.float32)}, scale, name)


@pytest.fixture(params=[*ADAPTERS, "gain"])
def name(request, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "gain", Gain)
    return request.param


def module_of(folder, name, **how):
    return Module(folder, lora_base_model="dit", lora_rank=2, adapter=name, **how)


def moved(module):
    """Away from its start, where an adapter changes nothing."""
    dit, rng = module.pipe.dit, np.random.default_rng(3)
    module.adapter.load(dit, {n: array + 0.3 * rng.standard_normal(array.shape).astype(np.float32)
                              for n, array in module.adapter.tensors(dit).items()})
    return module


def velocity(dit):
    rng = np.random.default_rng(5)
    width = dit.condition.weight.shape[1] - 1  # of the text; the noise level is one more
    tokens = Tensor(rng.standard_normal((2, 16, width)).astype(np.float32))
    return dit(Tensor(rng.standard_normal((2, 4, 4, 4)).astype(np.float32)), Tensor(np.array([0.3, 0.9], np.float32)),
               tokens).asnumpy()


def test_saved_resumed_and_fused_it_computes_the_same(folder, name, tmp_path):
    module = module_of(folder, name)
    base = velocity(module.pipe.dit)
    expected = velocity(moved(module).pipe.dit)
    assert np.abs(expected - base).max() > 1e-3
    module.save(tmp_path / "a.safetensors")
    other = module_of(folder, name, lora_alpha=3.0, lora_checkpoint=tmp_path / "a.safetensors")
    np.testing.assert_allclose(velocity(other.pipe.dit), expected, rtol=1e-5, atol=1e-5)
    fresh = family("toy").pipeline.from_pretrained(str(folder))
    assert fresh.load_lora(fresh.dit, tmp_path / "a.safetensors") == len(adapted_layers(module.pipe.dit))
    np.testing.assert_allclose(velocity(fresh.dit), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.few(1)
def test_it_trains_and_a_killed_run_goes_on_to_the_bit(folder, name, tmp_path):
    modules = [module_of(folder, name) for _ in range(3)]
    before = modules[0].adapter.tensors(modules[0].pipe.dit)
    train(tmp_path / "whole", modules[0], rows(3), num_epochs=None, max_train_steps=3)
    assert all(np.abs(array - before[n]).max() > 0 for n, array in modules[0].adapter.tensors(
        modules[0].pipe.dit).items() if "lora_A" not in n)
    train(tmp_path / "run", modules[1], rows(3), num_epochs=None, max_train_steps=1)
    train(tmp_path / "run", modules[2], rows(3), num_epochs=None, max_train_steps=3, resume="auto")
    whole, again = (m.adapter.tensors(m.pipe.dit) for m in (modules[0], modules[2]))
    assert all((again[n] == array).all() for n, array in whole.items())


@pytest.mark.fault
def test_another_adapter_is_refused(folder, tmp_path):
    train(tmp_path / "run", module_of(folder, "dora"), rows(3), num_epochs=None, max_train_steps=1)
    with pytest.raises(CheckpointError, match=r'adapter: "dora" when saved, "lora" now'):
        train(tmp_path / "run", module_of(folder, "lora"), rows(3), num_epochs=None, max_train_steps=2, resume="auto")
    module_of(folder, "dora").save(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"a\.safetensors holds the adapter dora: expected lora.*Set adapter=dora"):
        module_of(folder, "lora", lora_checkpoint=tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"adapter='dorra' is unknown: expected one of lora, dora.*mean 'dora'"):
        module_of(folder, "dorra")


def test_a_checkpoint_from_before_there_were_adapters_is_that_of_a_lora(folder, tmp_path, monkeypatch):
    identity = same_run.identity
    monkeypatch.setattr(same_run, "identity",
                        lambda *args: {n: v for n, v in identity(*args).items() if n != "adapter"})
    train(tmp_path / "run", module_of(folder, "lora"), rows(3), num_epochs=None, max_train_steps=1)
    monkeypatch.undo()
    assert "adapter" not in latest(tmp_path / "run/checkpoints").state["identity"]
    with pytest.raises(CheckpointError, match=r'adapter: "lora" when saved, "dora" now'):
        train(tmp_path / "run", module_of(folder, "dora"), rows(3), num_epochs=None, max_train_steps=2, resume="auto")
    train(tmp_path / "run", module_of(folder, "lora"), rows(3), num_epochs=None, max_train_steps=2, resume="auto")


def test_what_is_frozen_stays_out_of_training_and_files(folder, tmp_path):
    """The norms that DoRA keeps of a frozen weight."""
    module = module_of(folder, "dora")
    trained = {p.name for p in module.trainable_parameters()}
    assert trained == set(adapter("dora").tensors(module.pipe.dit))
    assert [p.name for p in module.pipe.dit.trainable_params()] == [p.name for p in module.trainable_parameters()]
    squares = [cell.squares for cell in adapted_layers(module.pipe.dit).values()]
    assert all(isinstance(p, Parameter) and not p.requires_grad for p in squares)
    layer = next(iter(adapted_layers(module.pipe.dit).values()))
    ops.assign(layer.base.weight, layer.base.weight * 2)
    layer.weight_changed()
    norms = layer.tensors()["lora_magnitude_vector"]
    np.testing.assert_allclose(np.sqrt(layer.squares.asnumpy()), 2 * norms, rtol=1e-6)
