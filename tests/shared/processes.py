"""Python in a process of its own, with this package on its path."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ms_diffsynth


def environment(*folders: object, **variables: str) -> dict[str, str]:
    """This process's, with the package and ``folders`` on Python's path."""
    path = [*map(str, folders), str(Path(ms_diffsynth.__file__).parents[1]),
            *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)} | variables


def run_python(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python word ...`` to its end."""
    given = {"capture_output": True, "text": True, "timeout": 300, "env": environment()} | options
    return subprocess.run([sys.executable, *map(str, words)], check=False, **given)
