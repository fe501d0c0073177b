"""Builds the stand-in from its sources, once per MindSpore, into the user's cache folder."""
from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from ms_diffsynth.errors import DeviceError
from ms_diffsynth.standin import symbols

NATIVE = Path(__file__).parent / "native"
LIBRARY = symbols.LIBRARY  # the one library; CANN's other names are links to it
CANN = "8.5"  # the release that every MindSpore from 2.7.2 to 2.10 accepts
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w"]

# Doing nothing would be wrong where data moves or is computed; elsewhere it is a setting that has no effect here.
_MUST_WORK = re.compile(r"Mem(cpy|set)|^Hccl(All|Broadcast|Reduce|Send|Recv|Scatter|Gather|Batch)|^acl(mdl|op)Execute|"
                        r"RunGraph")
# Constructors of GE's classes that hold one shared pointer: MindSpore destroys it, so it must be empty.
_EMPTY = re.compile(r"_ZN2ge(10TensorType|7Promote|5Shape|10TensorDesc|6Tensor|5Graph|11GraphBuffer)C[12]E")
_NAMES = """// Written by build.py: every name that is left to CANN and has no function of its own in the other sources.
#include "kernels.h"
#include "standin.h"
extern "C" long standin_unimplemented(const char* name);
extern "C" long standin_refused(const char* name);
#define UNIMPLEMENTED(NAME) EXPORT long NAME() { static bool told = false; \\
  if (told) return 0; told = true; return standin_unimplemented(#NAME); }
#define REFUSED(NAME) EXPORT long NAME() { return standin_refused(#NAME); }
#define EMPTY(NAME) EXPORT void NAME(void** object) { object[0] = object[1] = nullptr; }
"""


def cache_folder() -> Path:
    """Where built libraries are: ``$XDG_CACHE_HOME/ms_diffsynth/standin``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ms_diffsynth" / "standin"


def build() -> Path:
    """The folder of the libraries; built where this MindSpore, machine and these sources have none yet.

    Two processes may build at once, and either may be killed: a build appears under its name when it is whole.

    Raises: DeviceError without a compiler, without MindSpore's plugin, or when the compiler fails.
    """
    folder = symbols.mindspore_libraries()
    home = cache_folder() / _key()
    libraries = home / "cann" / "lib64"  # MindSpore looks for CANN by these two names
    if libraries.is_dir():
        return libraries
    compiler = _compiler()
    home.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(home.parent)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=home.parent) as temporary:
        work = Path(temporary)
        _compile(compiler, folder, work)
        finished = work / home.name
        _lay_out(symbols.library_names(folder), work / LIBRARY, finished / "cann" / "lib64")
        _write_hccl(finished / "python" / "hccl")
        try:
            finished.rename(home)
        except OSError:
            if not libraries.is_dir():  # no other process was faster, so something is wrong
                raise
    return libraries


def _key() -> str:
    """Names a build: a digest of what goes into it."""
    digest = hashlib.sha256()
    for path in [*sorted(NATIVE.iterdir()), Path(__file__), Path(symbols.__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"mindspore-{version('mindspore')}-{platform.machine()}-{digest.hexdigest()[:16]}"


def _compiler() -> str:
    name = os.environ.get("CXX") or "c++"
    if shutil.which(name) is None:
        raise DeviceError(f"the stand-in for CANN is built by a C++ compiler, and '{name}' is not on PATH. Expected: "
                          "any of C++17. Install one (apt-get install g++, dnf install gcc-c++), or set CXX.")
    return name


def _remove_leftovers(folder: Path) -> None:
    """What a killed build left, once it is an hour old."""
    for path in folder.glob(".building-*"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _compile(compiler: str, folder: Path, work: Path) -> None:
    needed = symbols.linked(folder)
    strings = "1" if any("__cxx11" in name for name in needed) else "0"  # the std::string that MindSpore was built with
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={strings}", f"-I{NATIVE}"]

    def one(source: Path) -> Path:
        made = work / f"{source.stem}.o"
        _run([compiler, *flags, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(max_workers=2) as pool:
        made = list(pool.map(one, sorted(NATIVE.glob("*.cc"))))
    own = {name for kind, name in symbols.nm("--defined-only", made) if kind in "TWVD"}
    kernels = symbols.operators(folder)
    of_kernels = kernels | {f"{name}GetWorkspaceSize" for name in kernels}
    names = work / "names.cc"
    names.write_text(_names((needed | symbols.looked_up(folder)) - own - of_kernels, kernels - own))
    made.append(one(names))
    _run([compiler, "-shared", "-o", str(work / LIBRARY), *map(str, made), f"-Wl,-soname,{LIBRARY}", "-ldl",
          "-lpthread"])


def _names(functions: set[str], kernels: set[str]) -> str:
    lines = [_NAMES]
    for name in sorted(functions):
        kind = "EMPTY" if _EMPTY.match(name) else "REFUSED" if _MUST_WORK.search(name) else "UNIMPLEMENTED"
        lines.append(f"{kind}({name})\n")
    return "".join(lines) + "".join(f"STANDIN_KERNEL({name})\n" for name in sorted(kernels))


def _lay_out(names: set[str], library: Path, target: Path) -> None:
    """The library, and CANN's names for it: one file, so that the loader takes them for the same."""
    (target / "driver").mkdir(parents=True)
    library.rename(target / LIBRARY)
    for name in sorted(names - {LIBRARY}):
        (target / name).symlink_to(LIBRARY)
    (target / "driver" / "libascend_hal.so").symlink_to(f"../{LIBRARY}")


def _write_hccl(package: Path) -> None:
    """CANN's Python package hccl, of which MindSpore reads a version before it joins ranks."""
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sys_version.py").write_text(f'__sys_version__ = "{CANN}"\n')


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(f"the stand-in for CANN cannot be built: {' '.join(command)} ended with {done.returncode}:\n"
                          f"{done.stderr[-2000:]}\nExpected: a compiler of C++17 for this machine. Set CXX to one.")
