"""The units of flow matching against NumPy in float64, and chained."""
from __future__ import annotations

import types

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.diffusion import density, weighting
from ms_diffsynth.diffusion.schedule import diffsynth_flux, flow_match_euler
from ms_diffsynth.diffusion.units import (
    EmbeddedGuidance,
    FlowMatchLoss,
    FlowMatchPath,
    LookupSigma,
    Objective,
    SampleLatents,
    flow_match_units,
)
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.registry import TASKS
from ms_diffsynth.units import TensorUnit, run_units

SHAPE = (3, 2, 4, 4)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_objective_says_which_draws_it_needs():
    assert Objective().draws == ("noise", "timestep_index")
    sampled = Objective(posterior="sample", weighting_scheme="cosmap", density="logit_normal")
    assert sampled.draws[-1] == "posterior_noise"
    asked = []

    def zeros(stream, kind, shape):
        asked.append((stream, kind, shape))
        return np.zeros(shape, np.float32)

    assert sampled.draw("noise", (2, 4, 3, 3), 1000, zeros).shape == (2, 4, 3, 3)
    index = sampled.draw("timestep_index", (2, 4, 3, 3), 1000, zeros)
    assert index.dtype == np.int32 and index.tolist() == [500, 500]
    Objective().draw("timestep_index", (2, 4, 3, 3), 1000, zeros)
    assert asked == [("noise", "normal", (2, 4, 3, 3)), ("density_draw", "normal", (2,)),
                     ("density_draw", "uniform", (2,))]
    with pytest.raises(ConfigError, match="Did you mean 'cosmap'"):
        Objective(weighting_scheme="cosmab").draw("timestep_index", (2, 4), 1000, zeros)


def test_what_a_run_says_of_its_objective():
    assert str(Objective(**TASKS["dreambooth"].defaults, prior_loss_weight=0.5)) == (
        "noise levels by none, loss weights by none, sample of the VAE's posterior, class images weigh 0.5")
    assert "mean of the VAE's posterior" in str(Objective(**TASKS["sft"].defaults))


def test_a_draw_becomes_an_index_of_the_grid():
    index = Objective(weighting_scheme="none").timestep_index(np.float32([0, 0.0005, 0.5, 0.9995, 1 - 2**-24]), 1000)
    assert index.dtype == np.int32 and index.tolist() == [0, 0, 500, 999, 999]
    for scheme in density.SCHEMES:
        draw = random(500) if density.draw_kind(scheme) == "normal" else np.random.default_rng(1).random(500)
        index = Objective(weighting_scheme=scheme).timestep_index(draw.astype(np.float32), 1000)
        assert 0 <= index.min() and index.max() <= 999 and len(set(index.tolist())) > 100
    # the density may be another than the weighting's
    objective = Objective(weighting_scheme="cosmap", density="logit_normal", logit_mean=50.0)
    assert objective.timestep_index(np.float32([0.0]), 10).tolist() == [9]


@pytest.mark.parametrize("schedule", [diffsynth_flux(3.0), flow_match_euler(3.0)])
@pytest.mark.parametrize("scheme", weighting.SCHEMES)
def test_sigma_and_weight_are_looked_up_to_the_last_bit(schedule, scheme):
    indices = np.int32([0, 1, 499, 998, 999])
    sigma, weight = LookupSigma(schedule.sigmas, scheme)(Tensor(indices))
    assert sigma.dtype == weight.dtype == ms.float32
    assert np.array_equal(sigma.asnumpy(), schedule.sigmas[indices])
    assert np.array_equal(weight.asnumpy(), weighting.table(scheme, schedule.sigmas)[indices])
    assert sigma.asnumpy()[0] > 0.99 and np.all(np.diff(sigma.asnumpy()) < 0)  # index 0 is the noisy end


def test_latents_from_moments():
    moments, noise = random(3, 4, 4, 4), random(*SHAPE, seed=1)
    moments[0, 2:, 0, 0], moments[1, 2:, 0, 0] = -1e3, 1e3  # limited to -30 and 20, as diffusers does
    mean, log_variance = moments[:, :2].astype(np.float64), np.clip(moments[:, 2:].astype(np.float64), -30, 20)
    found, = SampleLatents("mean", 0.5, 0.1)(Tensor(moments))
    np.testing.assert_allclose(found.asnumpy(), (mean - 0.1) * 0.5, rtol=0, atol=5e-7)
    unit = SampleLatents("sample", 0.5, 0.1)
    assert unit.input_params == ("moments", "posterior_noise")
    found, = unit(Tensor(moments), Tensor(noise))
    wanted = (mean + np.exp(log_variance / 2) * noise - 0.1) * 0.5
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=2e-6, atol=1e-6)


def test_latents_may_have_a_shift_and_a_scale_for_each_channel():
    class Pipe:
        def config(self, name):
            return {"vae": {"latents_mean": [1.0, -2.0], "latents_std": [2.0, 0.5]}}[name]

    unit, moments = SampleLatents("mean"), random(3, 4, 4, 4)
    unit.attach(Pipe())
    found, = unit(Tensor(moments))
    wanted = np.stack([(moments[:, 0] - 1) / 2, (moments[:, 1] + 2) / 0.5], 1)
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=0, atol=2e-6)


def test_each_sample_has_a_point_of_its_own_on_the_path():
    x, noise, sigma = random(*SHAPE), random(*SHAPE, seed=1), np.float32([0.0, 0.25, 1.0])
    latents, target = FlowMatchPath()(Tensor(x), Tensor(noise), Tensor(sigma))
    assert np.array_equal(latents.asnumpy()[0], x[0]) and np.array_equal(latents.asnumpy()[2], noise[2])
    np.testing.assert_allclose(latents.asnumpy()[1], 0.75 * x[1] + 0.25 * noise[1], rtol=0, atol=3e-7)
    np.testing.assert_allclose(target.asnumpy(), noise - x, rtol=0, atol=3e-7)
    guidance, = EmbeddedGuidance(3.5)(Tensor(sigma))
    assert guidance.dtype == ms.float32 and guidance.asnumpy().tolist() == [3.5] * 3


def test_the_loss_weights_samples_and_class_images():
    velocity, target, weight = random(4, 2, 4, 4), random(4, 2, 4, 4, seed=1), np.float32([1, 0, 3, 10])
    errors = weight * ((velocity.astype(np.float64) - target) ** 2).mean((1, 2, 3))
    inputs = Tensor(velocity), Tensor(target), Tensor(weight)
    loss, each = FlowMatchLoss()(*inputs)
    assert float(loss.asnumpy()) == pytest.approx(errors.mean(), rel=1e-6)
    np.testing.assert_allclose(each.asnumpy(), errors, rtol=1e-6)
    loss, each = FlowMatchLoss(0.5)(*inputs)
    assert float(loss.asnumpy()) == pytest.approx(errors[:2].mean() + 0.5 * errors[2:].mean(), rel=1e-6)
    np.testing.assert_allclose(each.asnumpy(), errors, rtol=1e-6)


class PredictsTarget(TensorUnit):
    """The velocity from latents, for data that is zero: noise = latents / sigma."""

    input_params, output_params = ("latents", "sigma", "guidance?"), ("velocity",)

    def construct(self, latents, sigma, guidance):
        return (latents / sigma.reshape(-1, 1, 1, 1) + guidance.reshape(-1, 1, 1, 1) - 2.0,)


def test_the_chain_is_exact_where_the_network_is():
    objective = Objective(weighting_scheme="cosmap", guidance_scale=2.0)
    sigmas = flow_match_euler(3.0).sigmas
    units = flow_match_units(objective, sigmas, PredictsTarget())
    slots = {"input_latents": Tensor(np.zeros(SHAPE, np.float32)), "noise": Tensor(random(*SHAPE)),
             "timestep_index": Tensor(np.int32([100, 500, 900]))}
    slots = run_units(tuple(units), types.SimpleNamespace(model_names=(), function_of=lambda unit: unit), slots)
    assert np.array_equal(slots["sigma"].asnumpy(), sigmas[[100, 500, 900]])
    assert float(slots["loss"].asnumpy()) < 1e-11
    assert slots["loss_weight"].asnumpy().std() > 0
