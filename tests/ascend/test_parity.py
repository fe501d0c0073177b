"""``ms-diffsynth parity --device Ascend`` on the stand-in: reference cases in both modes and both dtypes.

Of some families the first evaluation is repeated eagerly in float32, which is fast; whole cases are slow.
"""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth.debug.parity import CASES

GOLDEN = Path(__file__).parents[1] / "golden"


def parity(variables, folder, cases, mode, dtype):
    """The reports of cases: for each the errors by quantity; everything is within its tolerance."""
    command = ["-m", "ms_diffsynth.cli.main", "parity", *cases, "--mode", mode, "--device", "Ascend",
               "--dtype", dtype, "--report", folder / "report.json"]
    done = subprocess.run([sys.executable, *command], cwd=folder, env=variables, text=True, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["is_standin"] and report["versions"]["device"].startswith("Ascend")
    return {run["case"]: {q["name"].split(" (")[0]: q["error"] for q in run["quantities"]} for run in report["runs"]}


def test_flux_eagerly_in_float32(on_standin, tmp_path):
    errors = parity(on_standin(), tmp_path, [CASES / "flux"], "pynative", "float32")["flux"]
    assert 0 < errors["velocity"] < 2e-6 and errors["gradients"] < 1e-5  # 3e-6 and 6e-5 by sinusoids of a device's exp


# case -> what its network predicts
FIRST = {"wan_ti2v_5b": "velocity", "flux_controlnet": "velocity", "qwen_image_edit_2511": "velocity",
         "z_image": "velocity"}


@pytest.fixture(scope="module")
def first_evaluations(on_standin, tmp_path_factory):
    """The errors of FIRST, whose cases are without samples and training."""
    root = tmp_path_factory.mktemp("cases")
    for name in FIRST:
        (root / name).mkdir()
        for part in (GOLDEN / name).iterdir():
            if part.name != "case.json":
                (root / name / part.name).symlink_to(part)
        info = json.loads((GOLDEN / name / "case.json").read_text())
        kept = {key: value for key, value in info.items() if key not in ("optimizer", "sample")}
        (root / name / "case.json").write_text(json.dumps(kept))
    return parity(on_standin(), root, [root / name for name in FIRST], "pynative", "float32")


@pytest.mark.parametrize("case", FIRST)
def test_the_first_evaluation_of_every_network(first_evaluations, case):
    errors = first_evaluations[case]
    assert 0 < errors[FIRST[case]] < 4e-6 and errors["gradients"] < 5e-5


# (case, mode, dtype) that fast tests do not run; cases without a dtype are in float32 whatever is asked for
WHOLE = [CASES / "flux", CASES / "ddpm_unet", *(GOLDEN / name for name in (
    "sdxl", "sdxl_text", "wan_i2v", "wan_ti2v_5b", "wan_vae", "wan22_vae", "flux_controlnet", "qwen_image_controlnet",
    "flux_kontext", "qwen_image_edit", "qwen_image_edit_2509", "qwen_image_edit_2511", "qwen_vl_text", "z_image"))]
CALLS = [pytest.param(folder, mode, dtype, id=f"{folder.name}-{mode}-{dtype}") for folder in WHOLE
         for mode in ("graph", "pynative") for dtype in ("float32", "bfloat16")
         if (folder.name, mode, dtype) != ("flux", "pynative", "float32")]


@pytest.mark.slow
@pytest.mark.parametrize("folder, mode, dtype", CALLS)
def test_whole_cases(on_standin, tmp_path, folder, mode, dtype):
    errors = parity(on_standin(), tmp_path, [folder], mode, dtype)[folder.name]
    value = next(errors[name] for name in ("velocity", "noise pred", "prompt embeds", "latents") if name in errors)
    assert value > (1e-3 if dtype == "bfloat16" and not folder.name.endswith("vae") else 0)  # or it was float32
