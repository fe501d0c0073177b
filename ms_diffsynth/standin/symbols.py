"""Which names MindSpore's Ascend plugin leaves to CANN: found in the installed wheel, for whatever version it is."""
from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ms_diffsynth.errors import DeviceError

# Functions that the plugin looks up by name while it runs: their names are somewhere in its libraries. (One pattern for
# each beginning: a constant beginning is what makes a search through 100 MB fast.)
_LOOKED_UP = [re.compile(text + rb"\w+(?=\0)") for text in (
    rb"acl[A-Z]", rb"aclrt", rb"aclop", rb"aclmdl", rb"aclprof", rb"acltdt", rb"aclsys", rb"Acl", rb"Hccl", rb"Hcom",
    rb"rt[A-Z]", rb"Msprof", rb"hal[A-Z]")]
_OPERATOR = [re.compile(rb"aclnn[A-Z]\w*(?=\0)")]
_SYSTEM = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6",
           "libgomp.so.1")
LIBRARY = "libascendcl.so"
# Libraries of CANN that the plugin opens by name, beside those that it is linked with. Not ATB, which is a package of
# its own: without it MindSpore leaves its kernels for it alone.
_OPENED = ("libacl_op_compiler.so", "libacl_tdt_channel.so", "libacl_tdt_queue.so", "libascend_hal.so",
           "libascend_ml.so", "libcust_opapi.so", "libhccl.so", "libmsprofiler.so", "libnnopbase.so", "libopapi.so",
           "libplatform.so", "libruntime.so")


def mindspore_libraries() -> Path:
    """The folder ``lib`` of the installed MindSpore, which is not imported for that."""
    spec = find_spec("mindspore")
    if spec is None or not spec.submodule_search_locations:
        raise DeviceError("MindSpore is not installed. Expected: the MindSpore whose Ascend plugin the stand-in "
                          "serves. Run pip install mindspore.")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    if not list(folder.glob("plugin/libmindspore_ascend.so*")):
        raise DeviceError(f"the MindSpore in {folder.parent} has no Ascend plugin (lib/plugin/libmindspore_ascend.so). "
                          "Expected: a MindSpore for Linux, which has one. Use --device CPU here.")
    return folder


def plugin(folder: Path) -> list[Path]:
    """The libraries that are linked with CANN."""
    inside = [p for p in folder.glob("plugin/ascend/*.so") if "cpu_kernels" not in p.name]
    kernels = folder.glob("plugin/ascend/ms_kernels*/**/*.so*")
    return [*folder.glob("plugin/libmindspore_ascend.so*"), *folder.glob("plugin/libmindspore_ops_ascend.so"), *inside,
            *kernels, *folder.glob("libmindspore_ge_backend.so")]


def linked(folder: Path) -> set[str]:
    """Symbols that the plugin's libraries need and neither MindSpore nor the system has."""
    libraries = plugin(folder)
    needed = {name for kind, name in nm("--undefined-only", libraries) if kind == "U" and not name.startswith("Py")}
    others = [*folder.glob("*.so*"), folder / "plugin/libmindspore_ops_cpu.so", *folder.parent.glob("*.so")]
    needed -= {name for _, name in nm("--defined-only", {*libraries, *others})}
    system = []
    for name in (None, *_SYSTEM):
        try:
            system.append(ctypes.CDLL(name))
        except OSError:  # on a system that keeps it elsewhere it is part of another
            continue
    return {name for name in needed if not any(hasattr(library, name) for library in system)}


def looked_up(folder: Path) -> set[str]:
    """Names of functions that the plugin may look up while it runs."""
    return _texts(_LOOKED_UP, [p for p in plugin(folder) if "ms_kernels" not in str(p)])


def operators(folder: Path) -> set[str]:
    """Names of the aclnn operators that MindSpore knows, without GetWorkspaceSize."""
    found = _texts(_OPERATOR, folder.glob("plugin/libmindspore_ops_ascend.so"))
    return {name.removesuffix("GetWorkspaceSize") for name in found} - {"aclnnInit", "aclnnFinalize"}


def library_names(folder: Path) -> set[str]:
    """File names of CANN's libraries: those opened, and those that the plugin's two first libraries are linked with."""
    own = {p.name: p for p in [*folder.rglob("*.so*"), *folder.parent.glob("*.so*")]}
    waiting = ["libhccl_plugin.so", *(p.name for p in folder.glob("plugin/libmindspore_ascend.so*"))]
    seen = set(_OPENED)
    while waiting:
        library = own.get(waiting.pop())
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _run(["readelf", "-d", str(library)])) if library else []
        waiting += [n for n in needed if n not in seen]
        seen |= set(needed)
    return {n for n in seen if n not in own and re.fullmatch(r"lib\w+\.so", n)} | {LIBRARY}  # the system's end in .so.N


def nm(option: str, files: Iterable[Path]) -> list[tuple[str, str]]:
    """(kind, name) of the dynamic symbols of libraries, or of all symbols of objects."""
    files = [str(f) for f in files if f.is_file()]
    dynamic = [] if files[0].endswith(".o") else ["-D"]
    rows = (line.split() for line in _run(["nm", *dynamic, option, *files]).splitlines())
    return [(row[-2], row[-1].split("@")[0]) for row in rows if len(row) > 1]


def _texts(patterns: list[re.Pattern[bytes]], files: Iterable[Path]) -> set[str]:
    """Whole words that end a string."""
    found: set[str] = set()
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found |= {m[0].decode() for pattern in patterns for m in pattern.finditer(content)
                      if not re.match(rb"\w", content[m.start() - 1:m.start()])}
    return found


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError as error:
        raise DeviceError(f"'{command[0]}' is not on PATH. Expected: the GNU binutils, which come with every compiler; "
                          "the stand-in for CANN needs them once, to build. Install them (apt-get install "
                          "g++).") from error
