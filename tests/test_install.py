"""Each extra, in a fresh environment of its own: it installs, brings what it is for, and breaks nothing."""
from __future__ import annotations

import importlib.util
import json
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
    "fonts": "from ms_diffsynth.data.fonts import font_for; assert font_for('\u4e00\u53ea\u7ea2\u732b', 20)",
    "wandb": "import os; os.environ['WANDB_MODE'] = 'offline'; import wandb; wandb.init(dir='.').finish()",
    "swanlab": "import swanlab; swanlab.init(mode='offline', logdir='swanlab'); swanlab.finish()",
    "logging": "from tensorboardX import SummaryWriter; SummaryWriter('logs').add_scalar('loss', 1.0, 0)",
    "modelscope": "import modelscope; from modelscope_hub import HubApi; HubApi()",
    "data": "import datasets; assert datasets.Dataset.from_list([{'a': 1}])[0] == {'a': 1}",
    "eval": "from ms_diffsynth.evaluate.weights import load_weights; assert load_weights()",
    "video": "import numpy; from ms_diffsynth.data.previews import mp4_bytes; "
             "mp4_bytes(numpy.zeros((5, 32, 32, 3), 'u1'), 16)",
    "docs": "import mkdocs, material, mkdocs_static_i18n, mkdocstrings",
    "test": "import pytest, xdist, ruff",
}


def test_every_extra_is_tried():
    assert EXTRAS and set(USES) == set(EXTRAS)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(word, ...)`` runs a command in ``tmp_path``, where nothing of this environment is seen."""
    monkeypatch.chdir(tmp_path)
    clean = {name: value for name, value in os.environ.items()
             if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MS_DIFFSYNTH_URL")}

    def call(*command, **more):
        done = subprocess.run(command, cwd=tmp_path, env=clean | more, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return call


def copy_sources(to, *more):
    """What a package is built from."""
    to.mkdir(exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", *more):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "ms_diffsynth", to / "ms_diffsynth", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_in_a_fresh_environment(extra, tmp_path, run):
    run(sys.executable, "-m", "venv", "v")
    copy_sources(tmp_path)  # pip builds where the sources are
    run("v/bin/pip", "install", "-q", f".[{extra}]")
    run("v/bin/pip", "check")
    run("v/bin/python", "-c", USES[extra])
    # networks import most of mindone
    for family in ("toy", "flux", "flux2", "qwen_image", "sd3", "sdxl", "wan", "z_image", "ddpm_unet"):
        run("v/bin/ms-diffsynth", "tiny", family, family)
    run("v/bin/ms-diffsynth", "sample", "flux", "flux", "--prompt", "a cat", "--height", "32", "--width", "32",
        "--num_inference_steps", "1")


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment_trains_the_first_run(tmp_path, run):
    sources = tmp_path / "sources"
    copy_sources(sources, "MANIFEST.in", "LICENSE", "NOTICE", "CHANGELOG.md", "README.zh.md")
    shutil.copytree(ROOT / "examples", sources / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "venv", "tools")
    run("tools/bin/pip", "install", "-q", "build", "twine")
    run("tools/bin/python", "-m", "build", "-o", "dist", "sources", MS_DIFFSYNTH_URL="https://example.org/ms_diffsynth")
    wheel, archive = sorted(map(str, Path("dist").iterdir()), key=lambda name: not name.endswith(".whl"))
    assert "PASSED" in run("tools/bin/twine", "check", "--strict", wheel, archive)
    shutil.rmtree(sources)
    run(sys.executable, "-m", "venv", "v")
    run("v/bin/pip", "install", "-q", wheel)
    about = json.loads(run("v/bin/python", "-c", "import importlib.metadata as m, json; "
                           "print(json.dumps(m.metadata('ms_diffsynth').json))"))
    assert "Issues, https://example.org/ms_diffsynth/issues" in about["project_url"]
    assert "Typing :: Typed" in about["classifier"] and "](docs/" not in about["description"]
    assert "(https://example.org/ms_diffsynth/raw/main/docs/images/emoji_cat.png)" in about["description"]
    assert "examples/flux/emoji_dreambooth.yaml" in run("v/bin/ms-diffsynth", "examples")
    run("v/bin/ms-diffsynth", "train", "examples/flux/emoji_dreambooth.yaml", "--max_train_steps", "2",
        "--num_inference_steps", "2", "--sample_prompts", "a 3d render of koala", "--lr_warmup_steps", "0")
    assert Path("runs/emoji-cat/step-2.safetensors").is_file() and Path("runs/emoji-cat/report.html").is_file()


def test_links_of_the_readme_on_a_package_index(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("installation", ROOT / "setup.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    text = "![a cat](docs/images/cat.png) [more](docs/README.md#documentation) [MIT](https://x.org) [below](#b)"
    assert module.for_package_index(text, "https://h.org/p") == (
        "![a cat](https://h.org/p/raw/main/docs/images/cat.png) "
        "[more](https://h.org/p/blob/main/docs/README.md#documentation) [MIT](https://x.org) [below](#b)")
    assert module.for_package_index(text, "") == "a cat more [MIT](https://x.org) [below](#b)"


def test_a_package_that_does_not_fit_is_named():
    with pytest.raises(DeviceError, match=r"cannot be imported.*NumPy 2\.0 or newer, found 1.*install 'pyarrow<26'"):
        with quiet_imports():
            raise ImportError("pyarrow requires NumPy 2.0 or newer, found 1.26.4")
    with pytest.raises(DeviceError, match=r"No module named 'x'.*install the package in a version that fits"):
        with quiet_imports():
            raise ModuleNotFoundError("No module named 'x'")
