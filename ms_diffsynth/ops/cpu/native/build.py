"""Builds the native kernels at their first use, once per kind of machine, into the user's cache folder.

A library is named by what it depends on: the sources, the compiler and its flags, the features of the processor (a home
folder may be shared by several kinds), and the version of MindSpore's oneDNN. It gets that name when it has passed a
test of its own, and ends with a digest of itself: one that was cut short, or changed, is built again. Where there is
none and none can be built, a line says why, and the compositions of `ops.cpu` serve. ``MS_DIFFSYNTH_NATIVE=0`` turns
the native kernels off.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import getpass
import grp
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import mindspore as ms
from filelock import FileLock

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SWITCH = "MS_DIFFSYNTH_NATIVE"
MARCH = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
# -ffast-math is not among them: NaN and infinity must stay what they are, the guard of the optimizer looks for them
FLAGS = ("-O3", MARCH, "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-shared",
         "-fno-trapping-math",  # nobody reads floating-point exceptions, for which GCC makes branches
         # no loop begins with single elements until its addresses are aligned: sums would depend on where an array lies
         "--param=vect-max-peeling-for-alignment=0",
         "-Wl,-z,nodelete")  # MindSpore unloads it at exit, where the threads of its pool still spin or sleep
SECONDS = 300  # until a compiler is taken for one that never ends
_FEATURES = ("model name", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")


class _Unavailable(Exception):
    """Why there are no native kernels."""


@functools.cache
def library() -> Path | None:
    """The library of native kernels, or None where the compositions serve; decided once per process."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _library()
    except (_Unavailable, OSError, RuntimeError) as error:
        logger.warning("native CPU kernels cannot be used: %s. Composed ones serve, which are slower; %s=0 turns this "
                       "message off.", str(error).strip().rstrip("."), SWITCH)
        return None


def has_convolutions() -> bool:
    """Whether MindSpore's oneDNN has those that the kernels call; without, those of `ops.cpu.spatial` serve."""
    return library() is not None and _onednn().name == "libdnnl.so.3"


def kind() -> str:
    """For reports: ``composed``, or ``native`` and the library's key. Another key may mean other last digits."""
    found = library()
    return "composed" if found is None else f"native {found.stem.rpartition('-')[2]}"


def cache_folder() -> Path:
    """Where libraries are: ``$XDG_CACHE_HOME/ms_diffsynth/native``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms_diffsynth" / "native"


def _library() -> Path:
    onednn = _onednn()
    compiler = _compiler()
    folder = cache_folder()
    allowed = os.environ.get("MS_CUSTOM_AOT_WHITE_LIST")
    if allowed and not folder.resolve().is_relative_to(Path(allowed).resolve()):
        raise _Unavailable(f"MS_CUSTOM_AOT_WHITE_LIST={allowed} does not allow {folder}")
    if ":" in str(folder):
        raise _Unavailable(f"MindSpore takes no library from a path with a colon, {folder}: set XDG_CACHE_HOME to "
                           "another")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    _check_owner(folder)
    path = folder / f"kernels-{_key(onednn, compiler)}.so"
    if not _is_whole(path):
        with _locked(folder):
            if not _is_whole(path):  # no other process was faster
                _build(onednn, compiler, path)
    return path


def _onednn() -> Path:
    """The oneDNN of MindSpore's wheel: version 3 since MindSpore 2.9, version 2 before."""
    for number in (3, 2):
        path = Path(ms.__file__).parent / "lib" / f"libdnnl.so.{number}"
        if path.is_file():
            return path
    raise _Unavailable(f"MindSpore {ms.__version__} carries neither libdnnl.so.3 nor libdnnl.so.2")


def _compiler() -> list[str]:
    """The compiler's command."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name):
            return [name]
    raise _Unavailable(f"no C++ compiler on PATH ({', '.join(names)}). Install one, e.g. apt-get install g++, or set "
                       "CXX")


def _key(onednn: Path, compiler: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".cc", ".h", ".inc") or path.name == "selftest.py":
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    release = (ctypes.c_int * 3).from_address(_version_of(onednn))
    about = (FLAGS, compiler, _run([*compiler, "--version"]), list(release), _processor())
    return hashlib.sha256(digest.digest() + repr(about).encode()).hexdigest()[:16]


def _version_of(onednn: Path) -> int:
    function = ctypes.CDLL(str(onednn)).dnnl_version
    function.restype = ctypes.c_void_p
    return function()


def _processor() -> list[str]:
    """What the compiler makes of ``native``."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return [platform.machine(), platform.processor()]
    return [line for line in first.splitlines() if line.partition(":")[0].strip() in _FEATURES]


def _check_owner(folder: Path) -> None:
    """Raise unless this user alone, and root, can change what is in the folder, or put another in its place."""
    for path in (folder, *folder.parents):
        status = path.stat()
        is_sticky = status.st_mode & stat.S_ISVTX and path != folder
        if status.st_uid not in (os.geteuid(), 0) or (_is_writable_by_others(status) and not is_sticky):
            raise _Unavailable(f"others may write to {path}, and a library there is not trusted. Make it yours alone "
                               "(chmod go-w), or set XDG_CACHE_HOME to another folder")


def _is_writable_by_others(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    try:  # a user's own group, in which is nobody else
        group = grp.getgrgid(status.st_gid)
        return group.gr_name != getpass.getuser() or any(name != group.gr_name for name in group.gr_mem)
    except (KeyError, OSError):
        return True


def _is_whole(path: Path) -> bool:
    """Whether the file is a library of ours as it was written. It may not be loaded before: a cut one ends the process.
    """
    try:
        status = path.stat()
        content = path.read_bytes()
    except OSError:
        return False
    return (status.st_uid in (os.geteuid(), 0) and not _is_writable_by_others(status)
            and content[-32:] == hashlib.sha256(content[:-32]).digest())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time, where the file system has locks; without, two build the same."""
    lock = FileLock(folder / ".lock", timeout=2 * SECONDS)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        logger.debug("%s cannot be locked: %s", folder, error)
    try:
        yield
    finally:
        lock.release()


def _command(onednn: Path, compiler: list[str], flags: Iterable[str], made: Path) -> list[str]:
    return [*compiler, *flags, f"-DONEDNN={onednn.name[-1]}", str(HERE / "kernels.cc"), "-o", str(made),
            f"-L{onednn.parent}", f"-l:{onednn.name}", "-lpthread"]


def _build(onednn: Path, compiler: list[str], path: Path) -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        _run(_command(onednn, compiler, FLAGS, made))
        _run([sys.executable, "-I", str(HERE / "selftest.py"), str(onednn), str(made)])
        content = made.read_bytes()
        with open(made, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        made.chmod(0o700)
        made.replace(path)
    logger.info("built the native CPU kernels in %.1f s: %s", time.monotonic() - begun, path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"'{' '.join(command)}' had not ended after {SECONDS} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise _Unavailable(f"'{' '.join(command)}' ended with {done.returncode} and said: {said[0][:300]}")
    return done.stdout
