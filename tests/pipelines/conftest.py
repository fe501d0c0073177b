"""Tiny models by the names of their families, and sampling without compilation."""
from __future__ import annotations

from pathlib import Path

import pytest
from device import DEVICE

from ms_diffsynth import runtime


@pytest.fixture(scope="session")
def tiny_flux(tiny_model):
    return tiny_model("flux")


@pytest.fixture(scope="session")
def tiny_qwen(tiny_model):
    return tiny_model("qwen_image")


@pytest.fixture(scope="session")
def tiny_flux2(tiny_model):
    return tiny_model("flux2")


@pytest.fixture(scope="session")
def tiny_sd3(tiny_model):
    return tiny_model("sd3")


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_model):
    return tiny_model("sdxl")


@pytest.fixture(scope="session")
def tiny_z_image(tiny_model):
    return tiny_model("z_image")


@pytest.fixture(scope="module")
def eager():
    """Without compilation, which tests/pipelines/test_contract.py covers."""
    runtime.configure("pynative", DEVICE)


@pytest.fixture(scope="session")
def golden():
    """Folder of the recorded numbers."""
    return Path(__file__).parents[1] / "golden"
