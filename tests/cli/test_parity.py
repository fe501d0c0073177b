"""``ms-diffsynth parity``: passes on the reference cases, and fails on everything else."""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ms_diffsynth.debug.compare import Quantity, relative_error, together, worst
from ms_diffsynth.errors import DataError
from ms_diffsynth.io.weights import load_state_dict, save_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("flux", "flux_dreambooth_cosmap", "flux2_klein", "qwen_image")


@pytest.mark.parametrize("case", [case if case == "flux" else pytest.param(case, marks=pytest.mark.slow)
                                  for case in CASES])
def test_the_reference_cases_pass_eagerly(run, case):
    code, out, _ = run("parity", GOLDEN / case, "--mode", "pynative")
    assert code == 0 and "FAIL" not in out and out.endswith("all quantities are within tolerance\n")
    assert all(f"ok   {name}" in out for name in ("loss", "gradients", "velocity", "input latents", "sigma grid"))
    assert ("LoRA after 5 steps" in out) == (case != "flux_dreambooth_cosmap")


def test_the_keys_and_values_of_a_template_and_their_gradients(run, tmp_path):
    code, out, _ = run("parity", GOLDEN / "flux2_template_kv", "--mode", "pynative")
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in ("noisy", "velocity", "loss", "gradients (53 tensors)"))
    folder = shutil.copytree(GOLDEN / "flux2_template_kv", tmp_path / "case")
    expected = load_state_dict(folder / "expected.safetensors")
    (folder / "expected.safetensors").unlink()
    expected["grad.kv_cache.double_0.v"] = expected["grad.kv_cache.double_0.v"] * np.float32(1.01)
    save_state_dict(folder / "expected.safetensors", expected)
    code, out, _ = run("parity", folder, "--mode", "pynative")
    assert code == 1 and out.count("FAIL") == 1 and "(kv_cache.double_0.v)" in out


@pytest.mark.slow
def test_a_network_whose_every_weight_is_trained(run):
    code, out, _ = run("parity", GOLDEN / "ddpm_unet", "--mode", "pynative")
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in ("noisy images", "noise pred", "loss", "gradients (144 tensors)",
                                                  "losses of 5 steps", "weights after 5 steps (144 tensors)"))


@pytest.mark.slow
def test_the_reference_cases_pass_compiled(run):
    cases = [GOLDEN / case for case in (*CASES, "flux2_template_kv", "ddpm_unet")]
    code, out, _ = run("parity", *cases, "--mode", "graph")
    assert code == 0 and "FAIL" not in out


def test_a_wrong_number_fails(run, tmp_path):
    folder = shutil.copytree(GOLDEN / "flux_dreambooth_cosmap", tmp_path / "case")
    expected = {k: np.array(v) for k, v in load_state_dict(folder / "expected.safetensors").items()}
    expected["loss"] = np.asarray(expected["loss"] * np.float32(1.001))
    (folder / "expected.safetensors").unlink()
    save_state_dict(folder / "expected.safetensors", expected)
    code, out, _ = run("parity", folder, "--mode", "pynative")
    assert code == 1 and "  FAIL loss  " in out and out.count("FAIL") == 1
    assert out.endswith("1 quantities are out of tolerance\n")


@pytest.mark.parametrize("text, expected", [
    (None, "is no reference case: it has no case.json"),
    ('{"objective": "ddpm"}', "objective 'ddpm' cannot be run; expected one of flow_match_sft, flux_dreambooth, "
     "ddpm_epsilon."),
    ("{", "case.json is not JSON"),
])
def test_a_folder_that_is_no_case(run, tmp_path, text, expected):
    if text:
        (tmp_path / "case.json").write_text(text)
    code, out, err = run("parity", tmp_path, "--mode", "pynative")
    assert code == 65 and expected in err and "tolerance" not in out


def test_a_sum_that_cancels_is_measured_against_the_largest():
    def error(noise, found=1.0):
        pairs = {"weight": (np.array([found]), np.array([1.0])), "bias": (np.array([noise]), np.array([1e-11]))}
        return worst("gradients", pairs, 1e-4).error

    assert error(5e-11) < 1e-10 and error(1e-3) > 9e-4 and error(0.0, found=1.01) == pytest.approx(0.01)


def test_how_errors_are_counted():
    one = np.ones(3, np.float32)
    assert relative_error(one * 2, one * 4) == 0.5 and relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(one * np.nan, one) == float("inf")
    assert not Quantity("x", float("nan"), 1.0).passes and "FAIL" in str(Quantity("x", 2.0, 1.0))
    with pytest.raises(DataError):
        relative_error(one, np.ones(4))
    pairs = {"a": (np.array([1.0, 0.0]), np.array([1.0, 0.0])), "b": (np.array([0.0]), np.array([2.0]))}
    assert together("x", pairs, 1e-4).error == pytest.approx(2 / np.sqrt(5))
