"""``ms-diffsynth parity --device Ascend`` on the stand-in: the cases of the package, in both dtypes."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ms_diffsynth.debug.parity import CASES


def parity(variables, folder, case, mode, dtype):
    """The report of one case; every quantity is within its tolerance."""
    command = ["-m", "ms_diffsynth.cli.main", "parity", CASES / case, "--mode", mode, "--device", "Ascend",
               "--dtype", dtype, "--report", folder / "report.json"]
    done = subprocess.run([sys.executable, *command], cwd=folder, env=variables, text=True, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["is_standin"] and report["versions"]["device"].startswith("Ascend")
    return {q["name"].split(" (")[0]: q["error"] for run in report["runs"] for q in run["quantities"]}


def test_flux_eagerly_in_float32(on_standin, tmp_path):
    errors = parity(on_standin(), tmp_path, "flux", "pynative", "float32")
    assert 0 < errors["velocity"] < 1e-5


CALLS = [(case, mode, dtype) for case in ("flux", "ddpm_unet") for mode in ("graph", "pynative")
         for dtype in ("float32", "bfloat16") if (case, mode, dtype) != ("flux", "pynative", "float32")]


@pytest.mark.slow
@pytest.mark.parametrize("case, mode, dtype", CALLS)
def test_the_cases_of_the_package(on_standin, tmp_path, case, mode, dtype):
    errors = parity(on_standin(), tmp_path, case, mode, dtype)
    value = errors["velocity" if case == "flux" else "noise pred"]
    assert value > (1e-3 if dtype == "bfloat16" else 0)  # or it was float32
