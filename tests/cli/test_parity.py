"""``ms-diffsynth parity``: passes on the reference cases, and fails on everything else."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ms_diffsynth.debug.compare import Quantity, relative_error, together, worst
from ms_diffsynth.debug.parity import CASES as CASES_OF_PACKAGE
from ms_diffsynth.errors import DataError
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
FLUX, UNET = CASES_OF_PACKAGE / "flux", CASES_OF_PACKAGE / "ddpm_unet"
CASES = ("flux", "flux_dreambooth_cosmap", "flux2_klein", "qwen_image", "sd3", "wan_i2v", "wan_ti2v_5b", "z_image")
EDITING = ("flux_kontext", "qwen_image_edit", "qwen_image_edit_2509", "qwen_image_edit_2511")


@pytest.mark.parametrize("case", [case if case == "flux" else pytest.param(case, marks=pytest.mark.slow)
                                  for case in CASES])
def test_the_reference_cases_pass_eagerly(run, case):
    code, out, _ = run("parity", FLUX if case == "flux" else GOLDEN / case, "--mode", "pynative")
    assert code == 0 and "FAIL" not in out and out.endswith("all quantities are within tolerance\n")
    assert all(f"ok   {name}" in out for name in ("loss", "gradients", "velocity", "input latents", "sigma grid"))
    assert ("LoRA after 5 steps" in out) == (case != "flux_dreambooth_cosmap")


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", EDITING)
@pytest.mark.few(1)
def test_references_of_edit_models(run, case, mode):
    code, out, _ = run("parity", GOLDEN / case, "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in (
        "velocity ", "loss", "gradients", "reference latents", "velocity without reference", "sampling sigmas",
        "sampled latents", "losses of 5 steps", "LoRA after 5 steps"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_denoising_diffusion_of_latents(run, mode):
    code, out, _ = run("parity", GOLDEN / "sdxl", "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in (
        "alphas_cumprod", "loss weights", "input latents", "noise pred", "loss ", "gradients (618 tensors)",
        "noise_offset: latents", "noise_offset: loss", "min_snr: weights", "min_snr: loss", "LoRA after 5 steps"))


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
def test_two_text_encoders(run, mode):
    code, out, _ = run("parity", GOLDEN / "sdxl_text", "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in (
        "hidden states of text_encoder_1", "hidden states of text_encoder_2", "prompt embeds", "pooled prompt embeds",
        "loss", "gradients (105 tensors)"))


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["wan_vae", "wan22_vae"])
def test_the_autoencoders_of_films(run, case, mode):
    code, out, _ = run("parity", GOLDEN / case, "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in (
        "moments of 5 frames", "moments of 1 frames", "moments of 9 frames", "latents", "5 decoded frames",
        "1 decoded frames"))


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case, tensors", [("flux_controlnet", 103), ("qwen_image_controlnet", 79)])
@pytest.mark.few(1)
def test_controlnets(run, case, tensors, mode):
    """Velocity and loss of the network with a ControlNet, and the gradients of the ControlNet."""
    code, out, _ = run("parity", GOLDEN / case, "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in ("noisy latents", "velocity ", "velocity without control", "loss",
                                                  f"gradients ({tensors} tensors)"))


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
def test_a_text_encoder_that_sees_pictures(run, mode):
    code, out, _ = run("parity", GOLDEN / "qwen_vl_text", "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in ("pixel values", "positions", "picture tokens", "hidden states",
                                                  "prompt embeds", "loss", "gradients (68 tensors)"))


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


def test_without_folders_the_cases_of_the_package_and_a_report_of_them(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ms_diffsynth.cli.parity.CASES", tmp_path / "cases")
    shutil.copytree(GOLDEN / "flux2_template_kv", tmp_path / "cases" / "one")
    code, out, _ = run("parity", "--mode", "pynative", "--report", tmp_path / "report.json")
    assert code == 0 and out.endswith("all quantities are within tolerance\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "all quantities are within tolerance" and not report["is_standin"]
    assert {"ms_diffsynth", "mindspore", "mindone", "device", "python"} <= set(report["versions"])
    (one,) = report["runs"]
    assert (one["case"], one["mode"], report["dtype"]) == ("one", "pynative", "float32")
    assert all(q["passes"] and q["error"] <= q["tolerance"] for q in one["quantities"]) and len(one["quantities"]) > 3


def test_the_package_has_cases_of_two_kinds_of_network():
    assert sorted(path.name for path in CASES_OF_PACKAGE.iterdir()) == ["ddpm_unet", "flux"]


def test_a_dtype_that_the_cpu_has_not(run):
    code, _, err = run("parity", "--device", "CPU", "--dtype", "bfloat16")
    assert code != 0 and "no bfloat16 matrix product: expected --dtype float32, or --device Ascend" in err


@pytest.mark.slow
def test_a_network_whose_every_weight_is_trained(run):
    code, out, _ = run("parity", UNET, "--mode", "pynative")
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {name}" in out for name in ("noisy images", "noise pred", "loss", "gradients (144 tensors)",
                                                  "losses of 5 steps", "weights after 5 steps (144 tensors)"))


@pytest.mark.slow
def test_the_reference_cases_pass_compiled(run):
    cases = [FLUX, UNET, *(GOLDEN / case for case in (*CASES[1:], "flux2_template_kv"))]
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
    (None, "is not a reference case: case.json is missing"),
    ('{"objective": "ddpm"}', "objective 'ddpm' cannot be run; expected one of flow_match_sft, flux_dreambooth, "
     "ddpm_epsilon, ddpm_v_prediction."),
    ("{", "case.json is not JSON"),
])
def test_a_folder_that_is_no_case(run, tmp_path, text, expected):
    if text:
        (tmp_path / "case.json").write_text(text)
    code, out, err = run("parity", tmp_path, "--mode", "pynative")
    assert code == 65 and expected in err and "tolerance" not in out


# -- from end to end -------------------------------------------------------------------------------------------------


def end_to_end(folder, name, **kept):
    """A copy of a case from end to end with ``kept`` in the place of what case.json says; None takes a part out."""
    folder = shutil.copytree(GOLDEN / f"{name}_end_to_end", folder / name)
    info = json.loads((folder / "case.json").read_text()) | kept
    (folder / "case.json").write_text(json.dumps({key: part for key, part in info.items() if part is not None}))
    return folder


def change(folder, name, index, value):
    """Another expected number in a case."""
    expected = {k: np.array(v) for k, v in load_state_dict(folder / "expected.safetensors").items()}
    expected[name].reshape(-1)[index] += expected[name].dtype.type(value)
    (folder / "expected.safetensors").unlink()
    save_state_dict(folder / "expected.safetensors", expected)


TEXT_LINES = {
    "flux": ("clip ids", "t5 ids", "prompt embeds (10 tensors)", "pooled prompt embeds", "buckets of distances",
             "sigmas, schnell 4 steps"),
    "flux2": ("prompt ids", "prompt mask", "prompt embeds (9 tensors)", "sigmas, klein 9 steps"),
    "qwen_image": ("prompt ids", "prompt embeds (9 tensors)", "sigmas, lightning 4 steps"),
    "sd3": ("clip l ids", "clip g ids", "t5 ids", "prompt embeds (9 tensors)", "pooled prompt embeds",
            "sigmas, sd3 9 steps", "sigmas, dynamic 4 steps"),
    "sdxl": ("clip l ids", "clip g ids", "prompt embeds (9 tensors)", "pooled prompt embeds", "sigmas, leading 9 steps",
             "sigmas, trailing 4 steps", "sigmas, linspace 9 steps", "sigmas, v 4 steps"),
    "z_image": ("prompt ids", "prompt mask", "prompt embeds (9 tensors)", "sigmas, base 9 steps",
                "sigmas, turbo 4 steps")}


@pytest.mark.parametrize("name", TEXT_LINES)
@pytest.mark.few(1)
def test_texts_files_and_schedules_give_what_the_references_give(run, tmp_path, name):
    code, out, _ = run("parity", end_to_end(tmp_path, name, samples=[], training=[]), "--mode", "pynative")
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {line}" in out for line in (*TEXT_LINES[name], "pixels of 5 files", "latents of files"))


@pytest.mark.parametrize("name, lines", [
    ("flux2_dev", ("prompt ids", "prompt mask", "prompt embeds (9 tensors)")),
    ("ddpm_unet", ("pixels of 5 files", "image ddim eta, 24x40", "image ddpm trailing, 24x24", "ddpm: first loss",
                   "ddpm: gradients (144 tensors)", "ddpm: losses of 5 updates", "ddpm: weights after 5")),
])
@pytest.mark.few(1)
def test_a_small_case_from_end_to_end(run, name, lines):
    code, out, _ = run("parity", GOLDEN / f"{name}_end_to_end", "--mode", "pynative")
    assert code == 0 and "FAIL" not in out and all(f"ok   {line}" in out for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.parametrize("name, runs", [("flux", ("dreambooth", "sft")), ("flux2", ("sft", "edit")),
                                        ("qwen_image", ("sft",)), ("sd3", ("dreambooth", "sft")),
                                        ("z_image", ("sft", "dreambooth"))])
def test_images_and_training_give_what_the_references_give(run, name, runs, mode):
    code, out, _ = run("parity", GOLDEN / f"{name}_end_to_end", "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {line}" in out for line in ("image plain, 128x128", "image negative, 160x96",
                                                  "image chinese, 96x64"))
    assert all(f"ok   {name}: {line}" in out for name in runs for line in (
        "sigma grid", "loss weights", "first loss", "gradients", "losses of 5 updates", "grad norms of 5 updates",
        "learning rates of 5 updates", "LoRA after 5"))
    assert name != "flux" or all(f"ok   dreambooth: EMA after {count}" in out for count in ("1 update", "5"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_images_and_training_of_denoising_diffusion(run, mode):
    code, out, _ = run("parity", GOLDEN / "sdxl_end_to_end", "--mode", mode)
    assert code == 0 and "FAIL" not in out
    assert all(f"ok   {line}" in out for line in (
        "image plain, 128x128", "image negative, 160x96", "image chinese, 96x64", "image linspace", "image v"))
    assert all(f"ok   {name}: {line}" in out for name in ("sft", "options") for line in (
        "sigma grid", "first loss", "gradients", "losses of 5 updates", "LoRA after 5"))


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_images_made_from_an_image_are_those_of_the_reference(run, mode):
    code, out, _ = run("parity", GOLDEN / "flux_from_image_end_to_end", "--mode", mode)
    assert code == 0 and "FAIL" not in out
    for name in ("strength 0.3", "strength 0.6", "strength 1.0", "negative"):
        assert all(f"ok   {line}" in out for line in (f"sigmas of image {name}", f"latents of image {name}",
                                                      f"image {name}, "))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux2_dev", "ddpm_unet"])
def test_a_small_case_from_end_to_end_compiled(run, name):
    code, out, _ = run("parity", GOLDEN / f"{name}_end_to_end", "--mode", "graph")
    assert code == 0 and "FAIL" not in out


@pytest.mark.parametrize("name, key, value, line", [
    ("flux2_dev", "tokens.prompt_ids", 1, "prompt ids                                   1  <= 0 of 48 texts  (plain)"),
    ("flux2_dev", "encoded.curly.prompt_embeds", 1.0, "prompt embeds (9 tensors)"),
    ("ddpm_unet", "pixels.turned.jpg", 1, "pixels of 5 files                            1  <= 0 of 255  (turned.jpg)"),
    ("ddpm_unet", "latents.gray.png", 0.01, "latents of files (5 tensors)"),
    ("ddpm_unet", "image.ddim trailing", 3, "image ddim trailing, 24x24"),
    ("ddpm_unet", "ddpm.first_loss", 0.01, "ddpm: first loss"),
    ("ddpm_unet", "ddpm.grad_norms", 0.01, "ddpm: grad norms of 5 updates"),
    ("ddpm_unet", "ddpm.trained.conv_in.weight", 1.0, "ddpm: weights after 5 (144 tensors)"),
])
@pytest.mark.few(1)
def test_a_wrong_number_from_end_to_end_fails(run, tmp_path, name, key, value, line):
    needs_training = key.startswith("ddpm.")
    folder = end_to_end(tmp_path, name, **({"samples": []} if needs_training else {"training": []}))
    change(folder, key, 0, value)
    code, out, _ = run("parity", folder, "--mode", "pynative")
    assert code == 1 and out.count("FAIL") == 1 and f"  FAIL {line}" in out


@pytest.mark.parametrize("kept, expected", [
    ({"model": {"tiny_seed": 1, "digests": {"unet": "0" * 64}}},
     "ms-diffsynth tiny ddpm_unet writes other weights than this case was made with: unet."),
    ({"files": {"height": 32, "width": 32, "images": ["turned.jpg", "new.png"]}}, "new.png"),
    ({"training": [{"name": "other"}]}, "holds no"),
])
def test_a_case_that_does_not_fit_the_code(run, tmp_path, kept, expected):
    if "training" in kept:
        recorded = json.loads((GOLDEN / "ddpm_unet_end_to_end/case.json").read_text())["training"][0]
        kept = {"training": [recorded | {"name": "other", "batches": []}]}
    folder = end_to_end(tmp_path, "ddpm_unet", **{"samples": []} | kept)
    code, out, err = run("parity", folder, "--mode", "pynative")
    assert code == 65 and expected in err and "tolerance" not in out


# -- how errors are counted ------------------------------------------------------------------------------------------


def test_a_sum_that_cancels_is_measured_against_a_thousandth_of_the_largest():
    def error(found, expected, weight=1.0):
        pairs = {"weight": (np.array([weight]), np.array([1.0])), "bias": (np.array([found]), np.array([expected]))}
        return worst("gradients", pairs, 1e-4).error

    assert error(5e-11, 1e-11) < 1e-7 and error(1e-11, 1e-11, weight=1.01) == pytest.approx(0.01)
    assert error(1.1e-5, 1e-5) == pytest.approx(1e-3) and error(1.1e-2, 1e-2) == pytest.approx(0.1)


def test_how_errors_are_counted():
    one = np.ones(3, np.float32)
    assert relative_error(one * 2, one * 4) == 0.5 and relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(one * np.nan, one) == float("inf")
    assert str(Quantity("x", 2, 1, "curly", "of 48 texts")).split() == "FAIL x 2 <= 1 of 48 texts (curly)".split()
    assert not Quantity("x", float("nan"), 1.0).passes and "FAIL" in str(Quantity("x", 2.0, 1.0))
    with pytest.raises(DataError):
        relative_error(one, np.ones(4))
    pairs = {"a": (np.array([1.0, 0.0]), np.array([1.0, 0.0])), "b": (np.array([0.0]), np.array([2.0]))}
    assert together("x", pairs, 1e-4).error == pytest.approx(2 / np.sqrt(5))
