"""Building the native kernels at their first use: what cannot be built or trusted is not used, and a line says why."""
from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth.ops.cpu.native import build

pytestmark = pytest.mark.fault
REAL = build.library()
if REAL is None:
    pytest.skip("there are no native kernels here", allow_module_level=True)

START = "from ms_diffsynth.ops.cpu.native import build; print(build.library())"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """``compiler(script)`` puts a compiler in place that runs it, or without one copies the library of this machine;
    the file it returns has a line for each time that it compiled."""
    built, log = tmp_path / "built.so", tmp_path / "compiled"
    built.write_bytes(REAL.read_bytes()[:-32])
    log.write_text("")
    path = tmp_path / "compiler"

    def put(script=f'while [ "$1" != -o ]; do shift; done; echo once >> {log}; sleep 1; cp {built} "$2"'):
        path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\n{script}\n')
        path.chmod(0o755)
        return log

    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    put()
    return put


@pytest.fixture
def library(caplog):
    """``library()`` decides anew, and says what was logged."""
    def decide():
        caplog.clear()
        build.library.cache_clear()
        with caplog.at_level(logging.INFO, "ms_diffsynth"):
            found = build.library()
        return found, [r for r in caplog.records if r.name == build.__name__]

    yield decide
    build.library.cache_clear()


def refused(decided, *words):
    found, lines = decided
    assert found is None
    assert [line.levelno for line in lines] == [logging.WARNING]
    assert all(word in lines[0].getMessage() for word in words), lines[0].getMessage()
    assert "\n" not in lines[0].getMessage()


def test_is_built_once_and_announced(compiler, library):
    log = compiler()
    found, lines = library()
    assert found.parent == build.cache_folder()
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert len(lines) == 1 and "built the native CPU kernels in" in lines[0].getMessage()
    assert build.kind() == f"native {found.stem.rpartition('-')[2]}"
    assert library() == (found, [])
    assert log.read_text() == "once\n"
    assert sorted(path.name for path in found.parent.iterdir()) == [".lock", found.name]


def test_the_switch_turns_it_off(compiler, library, monkeypatch):
    log = compiler()
    monkeypatch.setenv(build.SWITCH, "0")
    assert library() == (None, [])
    assert (log.read_text(), build.kind()) == ("", "composed")


def test_no_compiler(compiler, library, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(library(), "no-such-compiler", "apt-get install g++")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    refused(library(), "c++, g++, clang++")


def test_a_broken_compiler(compiler, library):
    compiler("echo 'no space left on device' >&2; exit 3")
    refused(library(), "ended with 3", "no space left on device")
    compiler("exit 0")  # and no file
    refused(library())
    compiler('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"')
    refused(library(), "selftest.py")
    assert [path.name for path in build.cache_folder().iterdir()] == [".lock"]


def test_a_compiler_that_does_not_end(compiler, library, monkeypatch):
    monkeypatch.setattr(build, "SECONDS", 0.5)
    compiler("exec sleep 60")
    refused(library(), "had not ended after 0.5 s")


def test_a_library_that_computes_wrongly_is_not_used(compiler, library, tmp_path):
    sources = tmp_path / "wrong.cc"
    sources.write_text("\n".join(f'extern "C" int {name}(int, void **, int *, void **, void *, void *, void *) '
                                 "{ return 0; }" for name in ("linear_forward", "attention_forward",
                                                              "rms_norm_forward")))
    wrong = tmp_path / "wrong.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(sources), "-o", str(wrong)], check=True)
    compiler(f'while [ "$1" != -o ]; do shift; done; cp {wrong} "$2"')
    refused(library(), "selftest.py", "ended with 1")


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"",
                                    lambda content: content[:5000] + b"\0" + content[5001:]],
                         ids=["half", "empty", "one byte"])
def test_a_damaged_library_is_built_again(compiler, library, damage):
    log = compiler()
    found, _ = library()
    whole = found.read_bytes()
    found.write_bytes(damage(whole))
    assert library()[0] == found
    assert (found.read_bytes(), log.read_text()) == (whole, "once\n" * 2)


def test_a_cache_that_cannot_be_written(compiler, library, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(library(), str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1")  # not even for root
    refused(library(), "/proc/1")


def test_a_folder_that_others_may_write_to(compiler, library):
    log = compiler()
    found, _ = library()
    for path in (found.parent, found.parents[1]):
        path.chmod(0o777)
        refused(library(), str(path), "chmod go-w")
        path.chmod(0o700)
    found.chmod(0o722)  # the file itself: it is not trusted, but built again
    assert library()[0] == found
    assert (stat.S_IMODE(found.stat().st_mode), log.read_text()) == (0o700, "once\n" * 2)


def test_a_path_that_mindspore_does_not_take(compiler, library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    refused(library(), "a:b", "XDG_CACHE_HOME")


def test_another_compiler_makes_another_library(compiler, library, monkeypatch):
    first, _ = library()
    monkeypatch.setattr(build, "_processor", lambda: ["another"])
    second, _ = library()
    assert first != second and first.parent == second.parent


def test_two_processes_build_at_once(compiler):
    log = compiler()
    both = [subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in both}
    assert len(answers) == 1 and Path(answers.pop().strip()).is_file()
    assert log.read_text() == "once\n"


NETWORK = """
import ms_diffsynth
from ms_diffsynth import runtime
runtime.configure("graph", "CPU")
import mindspore as ms
from mindspore import mint
from ms_diffsynth.ops import network
x = ms.ops.ones((1, 2, 4, 4))
print(network.device.__name__, mint.nn.GroupNorm(2, 2)(mint.nn.Conv2d(2, 2, 3, padding=1)(x)).shape)
"""


def test_composed_operations_serve_without_a_compiler(compiler, python, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = python("-c", NETWORK, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.split() == ["ms_diffsynth.ops.cpu.network", "(1,", "2,", "4,", "4)"], done.stderr
    assert done.stderr.count("native CPU kernels cannot be used") == 1
