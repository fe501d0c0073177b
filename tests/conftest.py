"""Every test runs in a folder of its own (a failed compilation drops files into the current one), eagerly blocking."""
from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter

from device import DEVICE
from processes import run_python

os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # a core each: on shared ones MindSpore waits by spinning
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

from pathlib import Path

import pytest

# a shell starts what is in its background, or after nohup, with these ignored, and children inherit that
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL),
                        (signal.SIGHUP, signal.SIG_DFL), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The mark ``few(n)``: of the cases of a test, those after the first n are slow."""
    counts = Counter()
    for item in items:
        if mark := item.get_closest_marker("few"):
            counts[item.path, item.originalname] += 1
            if counts[item.path, item.originalname] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_open_gradient():
    """One that never ended would enclose every later one of the process: see `compile.eagerly`."""
    from ms_diffsynth.compile import _pynative_executor

    yield
    is_open = _pynative_executor.grad_flag()
    if is_open:
        _pynative_executor.clear_res()  # the test that left it fails, no other
    assert not is_open


@pytest.fixture(scope="session")
def on_standin():
    """`standin.environment`, of a stand-in for CANN that is built. Where it cannot be, a skip; in CI, an error."""
    from ms_diffsynth.errors import DeviceError
    from ms_diffsynth.standin import environment

    try:
        environment()
    except DeviceError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NOT TESTED, the stand-in for CANN cannot be built here: {error}")
    return environment


@pytest.fixture
def python():
    """``python(word, ...)`` runs Python in a process of its own, with this package on its path."""
    return run_python


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, configured):
    """``tiny_model(family)``: the folder of a tiny model with random weights of seed 0, which no test may change."""
    from ms_diffsynth.registry import family

    root = tmp_path_factory.mktemp("models")

    def folder(name):
        if not (root / name).exists():
            family(name).write_tiny(root / name, 0)
        return root / name

    return folder


@pytest.fixture(scope="session")
def small_base(tiny_model, tmp_path_factory):
    """A folder of bundled models whose emoji-flux has random weights, and samples and reads as the real one does."""
    folder = tmp_path_factory.mktemp("bundled")
    shutil.copytree(tiny_model("flux"), folder / "emoji-flux")
    says = {"height": 64, "width": 64, "max_sequence_length": 16, "cfg_scale": 2.0, "num_inference_steps": 20}
    (folder / "emoji-flux/sampling_config.json").write_text(json.dumps(says))
    return folder


@pytest.fixture
def emoji_flux(small_base, monkeypatch):
    """Makes it the emoji-flux of this test."""
    from ms_diffsynth.hub import bundled

    monkeypatch.setattr(bundled, "FOLDER", small_base)
    return small_base / "emoji-flux"


@pytest.fixture(scope="session", autouse=True)
def configured():
    from ms_diffsynth import runtime

    return runtime.configure("graph", DEVICE)


@pytest.fixture(scope="module", autouse=True)
def graph_mode(configured):
    """In which every file of tests begins, whatever the one before did."""
    from ms_diffsynth import runtime

    runtime.configure("graph", DEVICE)
