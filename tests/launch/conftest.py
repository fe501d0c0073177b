"""A launcher in a process of its own; see launched.py."""
from __future__ import annotations

import os

import pytest
from launched import Launched, processes


@pytest.fixture
def launch():
    """``launch(code of a worker, setting=value ...)``"""
    started = []

    def start(*words, **settings):
        started.append(Launched(*words, **settings))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        for pid in processes(launched.mark):
            os.kill(pid, 9)
