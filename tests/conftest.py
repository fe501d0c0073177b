"""Every test runs in a folder of its own (a failed compilation drops files into the current one), eagerly blocking."""
from __future__ import annotations

import os

os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def configured():
    from ms_diffsynth import runtime

    return runtime.configure("graph", "CPU")
