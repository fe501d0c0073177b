"""Broken inputs over the real commands: `run.py` tries them, in children of a process of its own."""
from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"


def try_cases(python, *words):
    done = python(RUN, *words, timeout=None)
    counted = re.search(r"(\d+) cases of seed \d+, \d+ s of CPU: (.*)", done.stdout)
    assert counted, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 and counted[2] == "no failure", done.stdout
    return int(counted[1])


def test_a_share_of_the_broken_inputs(python):
    assert try_cases(python, "--cases", 25, "--seed", 1) == 25


@pytest.mark.slow
def test_broken_inputs(python):
    count, seed = os.environ.get("BROKEN_CASES", "10000"), os.environ.get("BROKEN_SEED", "1")
    assert try_cases(python, "--cases", count, "--seed", seed) == int(count)
