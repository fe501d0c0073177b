"""Building: in a temporary folder, renamed when whole; and what is said where it cannot be done."""
from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.standin import build as build_module, environment, symbols
from ms_diffsynth.standin.build import build, cache_folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache of the test's own; and a skip where there is nothing to build for."""
    try:
        symbols.mindspore_libraries()
    except DeviceError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NOT TESTED: {error}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def quick(compiler: str, folder: Path, work: Path) -> None:
    """Instead of a compilation."""
    (work / symbols.LIBRARY).write_text("library")


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeviceError, match=r"'no-such-compiler' is not on PATH.*apt-get install"):
        build()


def test_a_compiler_that_fails_is_quoted(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(DeviceError, match=r"cannot be built: false .* ended with 1"):
        build()
    assert not list(cache_folder().iterdir())


def test_without_the_plugin_it_says_so(monkeypatch, tmp_path):
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(symbols, "find_spec", lambda name: spec)
    with pytest.raises(DeviceError, match="has no Ascend plugin"):
        build()
    monkeypatch.setattr(symbols, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="MindSpore is not installed"):
        build()


def test_a_build_is_kept_and_all_names_are_one_library(monkeypatch):
    monkeypatch.setattr(build_module, "_compile", quick)
    libraries = build()
    assert libraries.parts[-2:] == ("cann", "lib64")
    assert {p.resolve() for p in libraries.glob("*.so")} == {(libraries / symbols.LIBRARY).resolve()}
    monkeypatch.setattr(build_module, "_compile", lambda *arguments: pytest.fail("built again"))
    assert build() == libraries
    assert environment()["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(libraries)


def test_a_build_that_was_killed_leaves_nothing_that_counts(monkeypatch):
    def killed(compiler: str, folder: Path, work: Path) -> None:
        quick(compiler, folder, work)
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "_compile", killed)
    with pytest.raises(KeyboardInterrupt):
        build()
    leftover = cache_folder() / ".building-old"
    leftover.mkdir()
    os.utime(leftover, (time.time() - 7200, time.time() - 7200))
    monkeypatch.setattr(build_module, "_compile", quick)
    assert build().is_dir()
    assert not leftover.exists()


def test_two_builds_at_once_are_one(monkeypatch):
    def slower(compiler: str, folder: Path, work: Path) -> None:
        quick(compiler, folder, work)
        monkeypatch.setattr(build_module, "_compile", quick)
        build()  # another process, which is done first

    monkeypatch.setattr(build_module, "_compile", slower)
    assert build().is_dir()
    assert len(list(cache_folder().iterdir())) == 1
