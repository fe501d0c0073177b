"""Tests of the stand-in for CANN build it once, into the user's cache; they are skipped where it cannot be built."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.standin import environment


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    """A function that runs a Python script on the stand-in: (script, *arguments, **settings of environment())."""
    try:
        environment()
    except DeviceError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NOT TESTED, the stand-in for CANN cannot be built here: {error}")
    folder = tmp_path_factory.mktemp("standin")

    def run(script: Path, *arguments: object, timeout: float = 600, **settings: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=folder, capture_output=True,
                              text=True, timeout=timeout, env=environment(**settings), check=False)

    return run
