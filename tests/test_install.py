"""Each extra, in a fresh environment of its own: it installs, brings what it is for, and breaks nothing."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

ROOT = Path(__file__).parents[1]
EXTRAS = re.findall(r'(?m)^        "(\w+)": \[', (ROOT / "setup.py").read_text())
USES = {
    "logging": "from tensorboardX import SummaryWriter; SummaryWriter('logs').add_scalar('loss', 1.0, 0)",
    "modelscope": "import modelscope; from modelscope_hub import HubApi; HubApi()",
    "data": "import datasets; assert datasets.Dataset.from_list([{'a': 1}])[0] == {'a': 1}",
    "eval": "from ms_diffsynth.evaluate.weights import load_weights; assert load_weights()",
    "docs": "import mkdocs, material, mkdocstrings",
    "test": "import pytest, xdist, ruff",
}


def test_every_extra_is_tried():
    assert EXTRAS and set(USES) == set(EXTRAS)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_in_a_fresh_environment(extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run(sys.executable, "-m", "venv", "v")
    for name in ("setup.py", "pyproject.toml", "README.md"):  # pip builds where the sources are
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "ms_diffsynth", "ms_diffsynth", ignore=shutil.ignore_patterns("__pycache__"))
    run("v/bin/pip", "install", "-q", f".[{extra}]")
    run("v/bin/pip", "check")
    run("v/bin/python", "-c", USES[extra])
    # networks import most of mindone
    for family in ("toy", "flux", "flux2", "qwen_image", "sd3", "z_image", "ddpm_unet"):
        run("v/bin/ms-diffsynth", "tiny", family, family)
    run("v/bin/ms-diffsynth", "sample", "flux", "flux", "--prompt", "a cat", "--height", "32", "--width", "32",
        "--num_inference_steps", "1")


def test_a_package_that_does_not_fit_is_named():
    with pytest.raises(DeviceError, match=r"cannot be imported.*NumPy 2\.0 or newer, found 1.*install 'pyarrow<26'"):
        with quiet_imports():
            raise ImportError("pyarrow requires NumPy 2.0 or newer, found 1.26.4")
    with pytest.raises(DeviceError, match=r"No module named 'x'.*install the package in a version that fits"):
        with quiet_imports():
            raise ModuleNotFoundError("No module named 'x'")
