"""DDPM: diffusers' schedules and samplers number by number; identities of predictions, weights and samplers."""
from __future__ import annotations

import hashlib
import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.diffusion.ddpm import (
    AddNoise,
    DDPMObjective,
    LookupNoise,
    NoiseSchedule,
    RandomFlip,
    ddim,
    ddpm,
    ddpm_units,
)
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.pipelines.sdxl.published import SCHEDULE
from ms_diffsynth.pipelines.shared.denoising import integrate
from ms_diffsynth.units import TensorUnit

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
START = np.linspace(-1.5, 1.5, 4, dtype=np.float32).reshape(1, 1, 2, 2)


def noise(k):
    values = [np.sin(7 * k + 1), np.cos(3 * k), np.sin(k), -np.cos(5 * k)]
    return Tensor(np.array(values, np.float32).reshape(1, 1, 2, 2))


def predict(latents, timestep):
    return 0.6 * latents + float(0.1 * timestep.asnumpy()[0] / 1000)


# -- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, digest, first, last", [
    ({}, "b5555536933367c4", 0.9998999834060669, 4.035830352222547e-05),
    (COSINE, "f32ff0b43921c312", 0.9999586939811707, 2.4287349909002387e-09),
    ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "b0c6833c866f3aae",
     0.9991499781608582, 0.00466009508818388),
])
def test_alphas_cumprod_are_those_of_diffusers_to_the_bit(settings, digest, first, last):
    found = NoiseSchedule(**settings).alphas_cumprod
    assert found.dtype == np.float32 and (found[0], found[-1]) == (np.float32(first), np.float32(last))
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("settings, n, expected", [
    ({}, 4, [750, 500, 250, 0]),
    ({"steps_offset": 1}, 3, [667, 334, 1]),
    ({"timestep_spacing": "linspace"}, 6, [999, 799, 599, 400, 200, 0]),
    ({"timestep_spacing": "trailing"}, 7, [999, 856, 713, 570, 428, 285, 142]),
])
def test_timesteps_of_sampling(settings, n, expected):
    assert NoiseSchedule(**settings).timesteps(n).tolist() == expected


@pytest.mark.parametrize("total", [999, 1000])
def test_trailing_timesteps_are_as_many_as_asked_for_and_never_below_zero(total):
    schedule = NoiseSchedule(timestep_spacing="trailing", num_train_timesteps=total)
    for n in range(1, total + 1):
        timesteps = schedule.timesteps(n)
        assert len(timesteps) == n and timesteps[0] == total - 1 and timesteps[-1] >= 0, n
        assert (np.diff(timesteps) < 0).all()


def test_trailing_timesteps_of_61_steps():
    """diffusers 0.42.1, DDIMScheduler: 62 timesteps, of which the last is -1; the others are these."""
    found = NoiseSchedule(timestep_spacing="trailing").timesteps(61)
    assert found[:3].tolist() == [999, 983, 966] and found[-3:].tolist() == [48, 32, 15]


def test_an_offset_that_leads_beyond_the_last_timestep_is_refused():
    schedule = NoiseSchedule(steps_offset=1)
    assert schedule.timesteps(999)[0] == 999
    with pytest.raises(ConfigError, match="num_inference_steps=1000 with timestep_spacing=leading and steps_offset=1"):
        schedule.timesteps(1000)


@pytest.mark.parametrize("n", [0, 1001])
def test_more_steps_than_timesteps(n):
    with pytest.raises(ConfigError, match=f"num_inference_steps={n}: expected 1 to 1000"):
        NoiseSchedule().timesteps(n)


def test_a_configuration_goes_out_and_comes_back():
    schedule = NoiseSchedule(**COSINE, prediction_type="v_prediction", clip_sample=False, num_train_timesteps=500)
    config = json.loads(json.dumps(schedule.to_config()))
    assert config["_class_name"] == "DDPMScheduler" and NoiseSchedule.from_config(config) == schedule
    # as diffusers 0.39 writes one of DDIM, all at what is computed here
    config |= {"_class_name": "DDIMScheduler", "thresholding": False, "trained_betas": None, "set_alpha_to_one": True,
               "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "rescale_betas_zero_snr": False,
               "a_setting_that_is_off": False}
    assert NoiseSchedule.from_config(config) == schedule


@pytest.mark.parametrize("change, expected", [
    ({"thresholding": True, "use_karras_sigmas": True}, "sets thresholding=True, use_karras_sigmas=True, which is not"),
    ({"trained_betas": [0.1]}, "trained_betas="), ({"a_new_setting": 3}, "a_new_setting=3"),
    ({"_class_name": "PNDMScheduler"}, "describes a PNDMScheduler"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid': expected one of linear"),
    ({"prediction_type": "v_predicton"}, "Did you mean 'v_prediction'"),
    ({"variance_type": "learned"}, "variance_type='learned': expected one of fixed_small, fixed_large"),
])
def test_a_configuration_that_would_not_be_obeyed(change, expected):
    with pytest.raises(ConfigError, match=expected):
        NoiseSchedule.from_config({"_class_name": "DDPMScheduler"} | change)


# -- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, steps, settings, options, expected", [
    (ddpm, 10, {}, {}, [-0.640034199, -0.115613192, -0.168173656, 0.0346936472]),
    (ddpm, 1000, {**COSINE, "variance_type": "fixed_large"}, {},
     [-0.159426272, -0.168357402, -0.157854274, -0.158992156]),
    (ddpm, 7, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {},
     [-0.361825466, -0.118194357, -0.355001271, -0.275073111]),
    (ddpm, 6, {"prediction_type": "sample", "timestep_spacing": "linspace", "clip_sample": False}, {},
     [0.297303557, -0.036356546, 0.341008961, 0.280788898]),
    (ddim, 10, {}, {}, [-0.578609347, -0.384611398, 0.585148931, 0.774420738]),
    (ddim, 9, {"clip_sample_range": 0.8, "steps_offset": 1}, {"eta": 1.0},
     [-0.548195839, 0.037493933, -0.337320179, -0.125331938]),
    (ddim, 7, {"prediction_type": "v_prediction", "timestep_spacing": "trailing", **COSINE}, {"eta": 0.5},
     [-0.156819537, -0.0953966156, 0.12457341, 0.143877327]),
    (ddim, 6, {"prediction_type": "sample", "timestep_spacing": "linspace"}, {},
     [-0.689382911, -0.211602628, 0.266177684, 0.702006102]),
])
def test_samplers_give_the_numbers_of_diffusers(sampler, steps, settings, options, expected):
    """diffusers 0.39, the scheduler's step with this noise and this prediction (torch 2.13, CPU)."""
    seen = []
    found = sampler(predict, Tensor(START), NoiseSchedule(**settings), steps, noise=noise,
                    on_step=lambda k, n: seen.append((k, n)), **options)
    np.testing.assert_allclose(found.asnumpy().ravel(), expected, rtol=0, atol=2e-6)
    assert seen == [(k + 1, steps) for k in range(steps)]


@pytest.mark.parametrize("sampler", [ddpm, ddim])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_leads_to_the_picture(sampler, kind):
    schedule = NoiseSchedule(prediction_type=kind)
    picture = np.float32([[0.5, -0.25], [1.0, -1.0]]).reshape(1, 1, 2, 2)

    def perfect(latents, timestep):
        t = timestep.asnumpy()[0]
        a, s = np.sqrt(schedule.alphas_cumprod[t]), schedule.sigmas[t]
        n = (latents.asnumpy() - a * picture) / s
        return Tensor({"epsilon": n, "v_prediction": a * n - s * picture, "sample": picture}[kind])

    found = sampler(perfect, Tensor(START), schedule, 5, noise=noise).asnumpy()
    np.testing.assert_allclose(found, picture, rtol=0, atol=2e-4)  # at t = 800 an error of n is divided by 0.04


def test_ddim_with_all_its_noise_is_ddpm():
    schedule = NoiseSchedule(clip_sample=False)
    wanted = ddpm(predict, Tensor(START), schedule, 20, noise=noise).asnumpy()
    np.testing.assert_allclose(ddim(predict, Tensor(START), schedule, 20, 1.0, noise).asnumpy(), wanted, atol=1e-5)
    assert np.abs(ddim(predict, Tensor(START), schedule, 20, 0.0).asnumpy() - wanted).max() > 0.1


SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
LEADING, LINSPACE = {"steps_offset": 1, "set_alpha_to_one": False}, {"timestep_spacing": "linspace"}
V = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
ZERO = V | {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize("sampler, settings, sigmas, first, expected", [
    ("euler", LEADING, [4.1166983, 1.623693, 0.6983986, 0.0413145, 0], 4.236413955688477,
     [-2.057607412338257, -0.775388777256012, 0.5068297982215881, 1.7890483140945435]),
    ("heun", LEADING, [4.1166983, 1.623693, 0.6983986, 0.0413145, 0], 4.236413955688477,
     [-1.786475419998169, -0.6361332535743713, 0.5142093896865845, 1.6645516157150269]),
    ("euler", LINSPACE, [14.6146469, 2.9183085, 0.9323584, 0.0291675, 0], 14.614646911621094,
     [-4.690073013305664, -1.9188969135284424, 0.8522788286209106, 3.623455286026001]),
    ("heun", LINSPACE, [14.6146469, 2.9183085, 0.9323584, 0.0291675, 0], 14.614646911621094,
     [-1.1580724716186523, -0.32777178287506104, 0.5025290250778198, 1.3328291177749634]),
    ("euler", ZERO, [4096.0, 5.3987408, 1.7680811, 0.7270561, 0], 4096.0,
     [-0.3321847915649414, -0.13442093133926392, 0.06334805488586426, 0.26110199093818665]),
    ("heun", V, [14.6146469, 4.0817308, 1.612887, 0.6932054, 0], 14.614646911621094,
     [-0.5524293184280396, -0.20143947005272912, 0.14955013990402222, 0.5005395412445068]),
    ("ddim", LEADING, [4.1166983, 1.623693, 0.6983986, 0.0413145, 0], 4.236413955688477,
     [-2.0936062335968018, -0.7889528274536133, 0.5157008171081543, 1.8203543424606323]),
])
def test_sampling_by_noise_levels_gives_the_numbers_of_diffusers(sampler, settings, sigmas, first, expected):
    """diffusers 0.39: EulerDiscreteScheduler, HeunDiscreteScheduler and DDIMScheduler with this prediction."""
    schedule = NoiseSchedule(**SDXL, **settings)
    found = schedule.sampling_sigmas(4)
    # PyTorch's square roots of a zero terminal SNR are off by a bit at 182 of 1000 timesteps
    np.testing.assert_allclose(found, sigmas, rtol=1e-6, atol=1e-7)
    assert schedule.first_scale(float(found[0])) == pytest.approx(first, rel=1e-6)
    latents = integrate(schedule, predict, Tensor(START * np.float32(schedule.first_scale(float(found[0])))), found,
                        sampler)
    np.testing.assert_allclose(latents.asnumpy().ravel(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_last_steps_alone_are_those_of_all(sampler):
    schedule, seen = NoiseSchedule(**SDXL, **LEADING), []

    def watched(latents, timestep):
        seen.append(int(timestep.asnumpy()[0]))
        return predict(latents, timestep)

    integrate(schedule, watched, Tensor(START), schedule.sampling_sigmas(10)[7:], sampler, lambda k: noise(k).asnumpy())
    assert seen == schedule.timesteps(10).tolist()[7:]


def test_a_zero_terminal_snr_is_that_of_diffusers():
    """diffusers 0.39: rescale_zero_terminal_snr."""
    schedule = NoiseSchedule(**SDXL, **ZERO)
    a = schedule.alphas_cumprod
    np.testing.assert_allclose(a[[0, 500, 998, 999]], [0.99915, 0.24101864, 1.9679634e-07, 0], rtol=2e-6)
    assert a[999] == 0 and schedule.loss_weights(5.0)[999] == 0 and np.isfinite(schedule.loss_weights(5.0)).all()
    with pytest.raises(ConfigError, match="prediction_type=epsilon: expected v_prediction or sample"):
        NoiseSchedule(rescale_betas_zero_snr=True)


def test_the_published_configuration_of_sdxl_is_read():
    assert SCHEDULE == NoiseSchedule(**SDXL, **LEADING)
    # EulerDiscreteScheduler's defaults are others than DDPM's
    other = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "zero"})
    assert (other.timestep_spacing, other.clip_sample) == ("linspace", False)


def test_timesteps_are_found_again_from_noise_levels():
    schedule = NoiseSchedule(**SDXL, **LINSPACE)
    exact = np.linspace(0, 999, 30, dtype=np.float32)[::-1]
    found = [schedule.timestep_at(float(s)) for s in schedule.sampling_sigmas(30)[:-1]]
    np.testing.assert_allclose(found, exact, atol=2e-3)
    leading = NoiseSchedule(**SDXL, **LEADING)
    assert [leading.timestep_at(float(s)) for s in leading.sampling_sigmas(50)[:-1]] == leading.timesteps(50).tolist()


# -- training --------------------------------------------------------------------------------------------------------


class Chain(TensorUnit):
    """Lookup and path as one compiled function."""

    def __init__(self, schedule):
        super().__init__()
        self.lookup, self.path = LookupNoise(schedule, 5.0), AddNoise(schedule.prediction_type)

    def construct(self, picture, noise, timestep_index):
        a, s, weight = self.lookup(timestep_index)
        return self.path(picture, noise, a, s) + (weight,)


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize("kind, target", [
    ("epsilon", [1.0, -2.0, 0.5]), ("sample", [0.5, -0.25, 1.0]),
    ("v_prediction", [0.9949495792388916, -0.31776243448257446, -0.9968034029006958]),
])
def test_noisy_latents_and_targets_are_those_of_diffusers(mode, kind, target):
    """diffusers 0.39: DDPMScheduler.add_noise and get_velocity."""
    picture, n = (Tensor(np.float32(v).reshape(3, 1, 1, 1)) for v in ([0.5, -0.25, 1.0], [1.0, -2.0, 0.5]))
    step = CompiledStep(Chain(NoiseSchedule(prediction_type=kind)), "the chain", mode)
    latents, found, weights = step(picture, n, Tensor([0, 500, 999], ms.int32))
    expected = [0.5099758505821228, -1.990358591079712, 0.5063427090644836]
    np.testing.assert_allclose(latents.asnumpy().ravel(), expected, rtol=2e-7)
    np.testing.assert_allclose(found.asnumpy().ravel(), target, rtol=2e-7)
    np.testing.assert_array_equal(weights.asnumpy(),
                                  NoiseSchedule(prediction_type=kind).loss_weights(5.0)[[0, 500, 999]])


def test_min_snr_weights():
    """Whatever is predicted, an error of the picture counts min(snr, gamma) times its square."""
    a = NoiseSchedule().alphas_cumprod.astype(np.float64)
    snr = a / (1 - a)
    error = 0.1  # of the picture; the noise is then wrong by sqrt(snr) of it, and v by both together
    errors = {"sample": error, "epsilon": error * np.sqrt(snr),
              "v_prediction": np.sqrt(a) * error * np.sqrt(snr) + np.sqrt(1 - a) * error}
    for kind, e in errors.items():
        weights = NoiseSchedule(prediction_type=kind).loss_weights(5.0)
        np.testing.assert_allclose(weights * e**2, np.minimum(snr, 5.0) * error**2, rtol=1e-6)
        assert np.all(NoiseSchedule(prediction_type=kind).loss_weights(None) == 1)
    weights = NoiseSchedule().loss_weights(5.0)
    assert weights[999] == 1 and weights[0] == pytest.approx(5.0 / snr[0])


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_pictures_are_mirrored_where_the_draw_is_below_one_half(mode):
    pictures = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    step = CompiledStep(RandomFlip(), "the flip", mode)
    found = step(Tensor(pictures), Tensor(np.float32([0.49, 0.5])))[0].asnumpy()
    assert np.array_equal(found[0], pictures[0, :, :, ::-1]) and np.array_equal(found[1], pictures[1])


def test_what_an_objective_draws_and_runs():
    plain, mirrored = DDPMObjective(), DDPMObjective(random_flip=True, snr_gamma=5.0)
    assert plain.draws == ("noise", "timestep_index") and mirrored.draws == (*plain.draws, "flip_draw")
    denoise = TensorUnit()
    names = [u.name for u in ddpm_units(mirrored, NoiseSchedule(), denoise)]
    assert names == ["random_flip", "lookup_noise", "add_noise", "tensor_unit", "prediction_loss"]
    assert [u.name for u in ddpm_units(plain, NoiseSchedule(), denoise)] == names[1:]
    kinds = {name: mirrored.draw(name, (3, 3, 4, 4), 1000, lambda stream, kind, shape: np.zeros(shape, np.float32))
             for name in mirrored.draws}
    assert {name: (value.dtype.name, value.shape) for name, value in kinds.items()} == {
        "noise": ("float32", (3, 3, 4, 4)), "timestep_index": ("int32", (3,)), "flip_draw": ("float32", (3,))}


@pytest.mark.parametrize("wrong, expected", [
    ({"prediction_type": "noise"}, "prediction_type='noise': expected one of epsilon, v_prediction, sample"),
    ({"snr_gamma": 0.0}, "snr_gamma=0.0: expected a number above 0. Try 5"),
])
def test_an_objective_that_cannot_be(wrong, expected):
    with pytest.raises(ConfigError, match=expected):
        DDPMObjective(**wrong)
