"""``ms-diffsynth doctor``: every check on a machine that is right, and on one that is not."""
from __future__ import annotations

import http.server
import os
import sys
import threading
from importlib.metadata import PackageNotFoundError

import pytest
from hub_server import only_this_machine

from ms_diffsynth.cli import doctor
from ms_diffsynth.errors import DeviceError


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; ``hub(code)`` is its answer."""
    only_this_machine(monkeypatch)

    class Answer(http.server.BaseHTTPRequestHandler):
        code = 200

        def do_HEAD(self):
            self.send_response(self.code)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield lambda code: setattr(Answer, "code", code)
    server.shutdown()
    server.server_close()


def only(check):
    found = list(check())
    assert len(found) == 1
    return found[0]


def test_this_machine_is_ready(run, hub, tmp_path):
    code, out, _ = run("doctor", "--device", "CPU")
    lines = out.splitlines()
    assert code == 0 and lines[-1] == "ready: ms-diffsynth train"
    assert all(line[:6].strip() in ("ok", "note", "->", "") or line.startswith("ready") for line in lines)
    for mode in ("graph", "pynative"):
        assert any(line.startswith(f"ok    a training step in mode {mode}: ") for line in lines)
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


def test_what_is_wrong_is_counted_and_everything_else_still_checked(run, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 10**6)
    monkeypatch.setattr(doctor, "command", lambda words, folder: "DeviceError: no")
    code, out, _ = run("doctor", "--offline")
    assert code == 69 and out.count("\nwrong ") == 3 and out.endswith("3 of these must be mended first.\n")
    assert "wrong a training step in mode pynative fails: DeviceError: no" in out
    assert "      -> end other programs: a first run needs 1000000 GiB\n" in out
    assert "answer" not in out  # offline: nobody is asked


@pytest.mark.parametrize("changed, expected", [
    ({"numpy": "2.1.0"}, [("wrong", "numpy 2.1.0: needed is numpy<2", "pip install 'numpy<2'")]),
    ({"mindone": None}, [("wrong", "mindone is not installed: needed is mindone==0.5.0",
                          "pip install 'mindone==0.5.0'")]),
    ({"numpy": "1.26.4", "pyarrow": "26.0.0"}, [
        ("wrong", "pyarrow 26.0.0 does not work with NumPy 1: every import of it fails", "pip install 'pyarrow<26'")]),
    ({"numpy": "1.26.4", "pyarrow": "25.0.0"}, []),
])
def test_packages_that_do_not_fit(monkeypatch, changed, expected):
    real = doctor.version

    def version(name):
        if name in changed and changed[name] is None:
            raise PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(doctor, "version", version)
    assert [tuple(found) for found in doctor.packages() if found.level == "wrong"] == expected


def test_a_python_without_wheels(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert only(doctor.python).level == "wrong"


@pytest.mark.parametrize("cann, home, levels", [
    ("9.1.0", "/usr/local/Ascend", ["ok"]), ("7.0.0", "/usr/local/Ascend", ["wrong"]), ("9.1.0", "", ["wrong", "ok"]),
])
def test_npus_and_their_cann(monkeypatch, cann, home, levels):
    from ms_diffsynth import runtime
    monkeypatch.setattr(doctor.glob, "glob", lambda pattern: ["/dev/davinci0", "/dev/davinci1"])
    monkeypatch.setattr(runtime, "cann_version", lambda: cann)
    monkeypatch.setattr(runtime, "driver_version", lambda: "25.2")
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.setenv(name, home)
    found = list(doctor.ascend())
    assert [f.level for f in found] == levels
    assert f"2 NPU, driver 25.2, CANN {cann}; this MindSpore accepts CANN 8." in found[-1].text


@pytest.mark.parametrize("code", [200, 401, 503])
def test_a_hub_that_answers(hub, code):
    hub(code)
    assert only(doctor.hubs).level == "ok"


def test_a_hub_that_does_not_answer(monkeypatch):
    only_this_machine(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    found = only(doctor.hubs)
    assert found.level == "note" and "127.0.0.1:9 does not answer" in found.text and "HF_ENDPOINT" in found.remedy


def test_a_folder_that_cannot_be_written_to(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert [f.level for f in doctor.room()][1:] == ["wrong", "wrong"]


def test_the_last_line_of_a_command_that_fails(tmp_path):
    said = doctor.command(["tiny", "flx", "m"], str(tmp_path))
    assert said.startswith("ConfigError: family='flx' is unknown") and DeviceError.exit_code == 69
    assert doctor.command(["--help"], str(tmp_path)) == ""
