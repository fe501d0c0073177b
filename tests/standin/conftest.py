"""Tests of the stand-in for CANN build it once, into the user's cache."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def standin(on_standin, tmp_path_factory):
    """A function that runs a Python script on the stand-in: (script, *arguments, **settings of environment())."""
    folder = tmp_path_factory.mktemp("standin")

    def run(script: Path, *arguments: object, timeout: float = 600, **settings: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=folder, capture_output=True,
                              text=True, timeout=timeout, env=on_standin(**settings), check=False)

    return run
