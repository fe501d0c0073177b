"""Heartbeats: one system call, nothing outside a launch, read whole or not at all."""
from __future__ import annotations

import json
import threading
import time

import pytest

from ms_diffsynth.launch import worker
from ms_diffsynth.launch.diagnosis import Pulse
from ms_diffsynth.launch.worker import BEAT_BYTES, HEARTBEAT, beat, still


@pytest.fixture
def pulse(tmp_path, monkeypatch):
    monkeypatch.setenv(HEARTBEAT, str(tmp_path / "worker-0.beat"))
    worker._file.cache_clear()
    yield Pulse(tmp_path / "worker-0.beat")
    worker._file.cache_clear()


def test_outside_a_launch_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.delenv(HEARTBEAT, raising=False)
    beat(3)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_and_read(pulse):
    began, before = time.time(), worker._steps
    pulse.look(1.0)
    assert pulse.step is None and str(pulse) == ""
    beat(7, "compile")
    pulse.look(2.0)
    pulse.look(3.0)
    assert (pulse.step, pulse.phase, pulse.since) == (7, "compile", 2.0)
    beat(8)
    pulse.look(4.0)
    assert str(pulse) == " in phase 'step' of step 8"
    still()
    found = json.loads(pulse.path.read_text())
    assert found["steps"] == before + 1, "one step was begun"
    assert began - 0.001 <= found["time"] <= time.time() + 0.001 and pulse.path.stat().st_size == BEAT_BYTES


def test_a_phase_of_many_parts(pulse):
    beat(7, "records")
    pulse.look(1.0)
    time.sleep(0.01)
    still()
    pulse.look(50.0)
    assert (pulse.step, pulse.phase, pulse.since) == (7, "records", 50.0)


def test_a_shorter_one_covers_a_longer_one(pulse):
    beat(123456789, "p" * 100)
    assert pulse.path.stat().st_size == BEAT_BYTES
    beat(1)
    assert json.loads(pulse.path.read_text())["step"] == 1


def test_half_written(pulse):
    beat(1)
    pulse.look(1.0)
    pulse.path.write_text('{"step": 2, "pha')
    pulse.look(2.0)
    assert (pulse.step, pulse.since) == (1, 1.0)


def test_several_threads(pulse):
    threads = [threading.Thread(target=lambda k=k: [beat(k, f"phase {k}") for _ in range(300)]) for k in range(4)]
    for thread in threads:
        thread.start()
    wrong = 0
    while any(thread.is_alive() for thread in threads):
        text = pulse.path.read_text()
        if text.strip():
            found = json.loads(text)
            wrong += found["phase"] != f"phase {found['step']}"
    assert wrong == 0
