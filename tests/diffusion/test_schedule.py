"""Grids equal to the reference cases', and the algebra of warps.

The sampled values of the two training grids were computed by PyTorch 2.13 (CPU) in float32, as torch.linspace shifted
by 3s / (1 + 2s); the hashes are of all 1000 values, which were compared with PyTorch's when the hashes were made.
"""
from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest

from ms_diffsynth.debug.parity import OBJECTIVES, Case, read_case
from ms_diffsynth.diffusion import schedule as sch
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.registry import family as family_called

GOLDEN = Path(__file__).parents[1] / "golden"

PLACES = [0, 1, 2, 100, 333, 499, 500, 501, 750, 997, 998, 999]
GRIDS = {
    "diffsynth_flux": ("2431695469ecc709", [
        1.0, 0.999667108, 0.999333858, 0.964362025, 0.857692361, 0.751493931, 0.75074774, 0.75, 0.501991987,
        0.0148221338, 0.0118811885, 0.00892857183]),
    "flow_match_euler": ("240edbe067da1bfe", [
        1.0, 0.999666393, 0.999332428, 0.964285672, 0.857326388, 0.75074929, 0.75, 0.74924922, 0.5, 0.00894632097,
        0.0059760958, 0.00299401209]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_training_grids_equal_the_reference_cases_to_the_last_bit(name):
    sigmas = getattr(sch, name)(3.0).sigmas
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (1000,)
    assert np.array_equal(sigmas[PLACES], np.array(GRIDS[name][1], np.float32))
    assert hashlib.blake2b(sigmas.tobytes(), digest_size=8).hexdigest() == GRIDS[name][0]
    assert (np.diff(sigmas) < 0).all()
    assert sigmas.min() > 0  # a weight of s^-2 is finite everywhere
    with pytest.raises(ValueError, match="read-only"):
        sigmas[0] = 0


@pytest.mark.parametrize("case", [path.parent.name for path in sorted(GOLDEN.glob("*/inputs.safetensors"))
                                  if "grid.sigmas" in load_state_dict(path)])
def test_training_grids_of_all_families_equal_the_recorded_ones_to_the_last_bit(case):
    folder = GOLDEN / case
    recorded = Case(folder, read_case(folder))
    grid = recorded.pipeline().training_schedule(OBJECTIVES[recorded.info["objective"]]).sigmas
    assert grid.tobytes() == recorded.inputs["grid.sigmas"].tobytes()


@pytest.mark.parametrize("family, shift, steps, side, digest", [
    ("flux", None, 28, 256, "1693c1659e2a0748"), ("flux", None, 28, 1024, "d5a6e66ebed60700"),
    ("flux", 1.0, 50, 1024, "2be27cb2a9080f5b"), ("sd3", 3.0, 28, 1024, "2428afa0bf4b189d"),
    ("z_image", 6.0, 50, 1024, "58f70f9b2a0c066c")])
def test_sampling_sigmas_equal_those_of_diffusers_to_the_last_bit(family, shift, steps, side, digest):
    """The hashes are of what FlowMatchEulerDiscreteScheduler 0.42.1 was given by its pipelines."""
    pipe = family_called(family).pipeline()
    if shift is not None:
        pipe._scheduler_settings = sch.FlowMatchSettings(shift=shift)
    found = pipe.sampling_sigmas(steps, (16, side // 8, side // 8))
    assert hashlib.blake2b(found.tobytes(), digest_size=8).hexdigest() == digest


def test_levels_of_wan_equal_those_of_diffusers_to_the_last_bit():
    """The hash is of what UniPCMultistepScheduler 0.42.1 has with flow_shift 5, but for the first, its 1 - 1e-6."""
    found = family_called("wan").pipeline().sampling_sigmas(50, (16, 5, 8, 8))
    assert hashlib.blake2b(found[1:].tobytes(), digest_size=8).hexdigest() == "2be1c9cd4f528030" and found[0] == 1


def test_diffsynth_four_steps():
    """DiffSynth-Studio 2.1.12, FlowMatchScheduler("FLUX.1").set_timesteps(4)."""
    np.testing.assert_allclose(sch.diffsynth_flux().sampling(4), [1, 0.857692, 0.602151, 0.00892857, 0], atol=5e-7)


def test_flux_dev_shifts_by_the_size_of_the_image():
    """diffusers: calculate_shift(4096) = 1.15, then exp(mu) / (exp(mu) + 1/s - 1) of 1, 3/4, 1/2, 1/4."""
    dev = sch.FLUX_DEV.schedule()
    for seq_len, mu in ((256, 0.5), (4096, 1.15), (1024, 0.63)):
        assert sch.LinearMu()(seq_len) == pytest.approx(mu, rel=1e-12)
        wanted = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)] + [0]
        np.testing.assert_allclose(dev.sampling(4, seq_len), wanted, rtol=2e-7)
    with pytest.raises(ConfigError, match="seq_len=None"):
        dev.sampling(4)


def test_flux_schnell_is_not_shifted():
    schnell = sch.FLUX_SCHNELL.schedule()
    assert np.array_equal(schnell.sampling(4), np.array([1, 0.75, 0.5, 0.25, 0], np.float32))
    assert np.array_equal(schnell.sampling(1), [1, 0])


LN_3 = math.log(3)
# settings; sigmas of training at 1, 500 and 998; sampling in 4 steps of 1024 tokens: diffusers 0.42.1,
# FlowMatchEulerDiscreteScheduler, with mu by calculate_shift of its pipelines
FILES = {
    "FLUX.1-dev": ({"shift": 3.0, "use_dynamic_shifting": True}, [0.999, 0.5, 0.002],
                   [1.0, 0.8492348, 0.6524894, 0.3849447, 0.0]),
    "fixed shift": ({"shift": 5.0}, [0.9997998, 0.8333333, 0.009920635], [1.0, 0.9375, 0.8333333, 0.625, 0.0]),
    "Qwen-Image": ({"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
                   [0.999, 0.5, 0.002], [1.0, 0.7492682, 0.4325879, 0.01999992, 0.0]),
    "Qwen-Image-Lightning": ({"use_dynamic_shifting": True, "base_shift": LN_3, "max_shift": LN_3,
                              "max_image_seq_len": 8192, "shift_terminal": None},
                             [0.999, 0.5, 0.002], [1.0, 0.9, 0.75, 0.5, 0.0]),
    "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, [0.999, 0.5, 0.002],
               [1.0, 0.6539792, 0.3865031, 0.1735537, 0.0]),
    "terminal": ({"shift": 2.5, "shift_terminal": 0.1}, [0.9995998, 0.7142857, 0.004985045],
                 [1.0, 0.8058823, 0.5285714, 0.1, 0.0]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_scheduler_config_is_obeyed(name):
    given, training, sampling = FILES[name]
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.42.1",
              "num_train_timesteps": 1000, "invert_sigmas": False, "use_karras_sigmas": False, **given}
    settings = sch.FlowMatchSettings.from_config(config)
    schedule = settings.schedule()
    np.testing.assert_allclose(schedule.sigmas[[1, 500, 998]], training, rtol=0, atol=2e-7)
    np.testing.assert_allclose(schedule.sampling(4, 1024), sampling, rtol=0, atol=3e-7)
    assert sch.FlowMatchSettings.from_config(settings.to_config()) == settings
    assert settings.training_shift == (1.0 if given.get("use_dynamic_shifting") else given["shift"])


def test_a_mu_of_the_model_takes_the_place_of_the_file_s():
    schedule = sch.FLUX_DEV.schedule(lambda tokens, steps: tokens / 1000 + steps)
    wanted = sch.ExponentialShift(4.256)(sch.to_one_nth_by_numpy(4))
    assert np.array_equal(schedule.sampling(4, 256)[:-1], wanted)


@pytest.mark.parametrize("given, expected", [
    ({"_class_name": "UniPCMultistepScheduler"}, "describes a UniPCMultistepScheduler: expected a FlowMatchEuler"),
    ({"use_karras_sigmas": True}, "sets use_karras_sigmas=True, which is not computed here"),
    ({"invert_sigmas": True, "num_train_timesteps": 500}, "sets invert_sigmas=True, num_train_timesteps=500, which"),
    ({"sigma_min": 0.1}, "sets sigma_min=0.1, which is not computed here"),
    ({"shift": "3"}, 'shift="3": expected a number'),
    ({"shift": float("nan")}, "shift=nan: expected a finite number"),
    ({"shift": 0}, "shift=0: expected a number above 0"),
    ({"base_shift": None}, "base_shift=null: expected a number"),
    ({"use_dynamic_shifting": 1}, "use_dynamic_shifting=1: expected true or false"),
    ({"shift_terminal": 1.5}, "shift_terminal=1.5: expected null, or a number from 0 to below 1"),
    ({"time_shift_type": "cubic"}, "time_shift_type='cubic': expected one of exponential, linear"),
    ({"max_image_seq_len": 256}, "max_image_seq_len=256: expected more than base_image_seq_len=256"),
])
def test_a_scheduler_config_that_is_not_computed_is_refused_by_name(given, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        sch.FlowMatchSettings.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"} | given)


@pytest.mark.parametrize("schedule", [sch.diffsynth_flux(), sch.flow_match_euler(1.0),
                                      sch.FLUX_DEV.schedule(), sch.FLUX_SCHNELL.schedule()])
@pytest.mark.parametrize("n", [1, 2, 3, 28, 1000])
def test_sampling_falls_from_pure_noise_to_zero(schedule, n):
    sigmas = schedule.sampling(n, 1024)
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (n + 1,)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (np.diff(sigmas) < 0).all()


def test_steps_below_one_are_refused():
    with pytest.raises(ConfigError, match="num_inference_steps=0"):
        sch.FLUX_SCHNELL.schedule().sampling(0)


def test_linspace_against_numpy():
    for n in (1, 2, 3, 10, 1000):
        np.testing.assert_allclose(sch.linspace(1.0, 0.25, n), np.linspace(1.0, 0.25, n), rtol=1e-7)


def test_warps():
    s = sch.to_one_nth(50)
    np.testing.assert_allclose(sch.Shift(math.exp(0.8))(s), sch.ExponentialShift(0.8)(s), rtol=5e-7)
    assert np.array_equal(sch.Shift(1.0)(s), s)
    stretched = sch.TerminalStretch(0.02)(s)
    np.testing.assert_allclose(stretched, 1 - (1 - s) * 0.98 / (1 - 1 / 50), atol=2e-7)
    assert stretched[-1] == pytest.approx(0.02, abs=1e-7)  # 1 - 0.98, rounded at the size of 1
    assert np.array_equal(sch.TerminalStretch(0.02)(s[:1]), [1])


def test_a_new_schedule_is_two_grids():
    """Qwen-Image as DiffSynth-Studio 2.1.12 trains it: mu 0.8, last sigma 0.02, middle 0.6955."""
    grid = sch.Grid(sch.to_one_nth, (sch.ExponentialShift(0.8), sch.TerminalStretch(0.02)))
    sigmas = sch.Schedule(training=grid, inference=grid).sigmas
    np.testing.assert_allclose(sigmas[[0, 500, 999]], [1, 0.6955, 0.02], atol=1e-4)


# -- from an image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, strength, kept", [
    (10, 0.3, 3), (10, 0.6, 6), (10, 1.0, 10), (10, 1, 10), (28, 0.6, 17), (4, 0.25, 1), (4, 0.26, 2), (50, 0.01, 1),
    (1, 0.1, 1), (7, 0.5, 4), (10, 0.7, 7), (10, np.float32(0.5), 5)])
def test_of_the_steps_the_last_ones_are_walked(steps, strength, kept):
    """The counts are those of diffusers 0.39: num_inference_steps - t_start of FluxImg2ImgPipeline.get_timesteps."""
    sigmas = sch.FLUX_SCHNELL.schedule().sampling(steps)
    found = sch.last_steps(sigmas, strength)
    assert len(found) == kept + 1 and np.array_equal(found, sigmas[-kept - 1:])


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, math.nan, math.inf, "0.5", None, True])
def test_strengths_that_are_refused(strength):
    with pytest.raises(ConfigError, match="denoising_strength="):
        sch.last_steps(np.linspace(1, 0, 5), strength)
