"""Tiny models, written once a session."""
from __future__ import annotations

from pathlib import Path

import pytest

from ms_diffsynth.registry import family


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Folder of a tiny FLUX.1 with random weights."""
    folder = tmp_path_factory.mktemp("models") / "flux"
    family("flux").write_tiny(folder, 0)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """Folder of a tiny Qwen-Image with random weights."""
    folder = tmp_path_factory.mktemp("models") / "qwen_image"
    family("qwen_image").write_tiny(folder, 0)
    return folder


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory):
    """Folder of a tiny FLUX.2 klein with random weights."""
    folder = tmp_path_factory.mktemp("models") / "flux2"
    family("flux2").write_tiny(folder, 0)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """Folder of a tiny Stable Diffusion 3 with random weights."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    family("sd3").write_tiny(folder, 0)
    return folder


@pytest.fixture(scope="session")
def golden():
    """Folder of the recorded numbers."""
    return Path(__file__).parents[1] / "golden"
