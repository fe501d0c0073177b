"""``ms-diffsynth doctor``: is this machine ready? One line a check, and below what is wrong, what to do."""
from __future__ import annotations

import argparse
import glob
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from ms_diffsynth import __version__

LEAST_MEMORY, LEAST_DISK = 4, 5  # GiB: of a first run, and of what it writes
SHOWN = 3  # packages named: MindSpore, mindone, NumPy
WAIT = 5  # seconds for a hub to answer
STEP_SECONDS = 300  # most for a step in a process of its own


class Finding(NamedTuple):
    """``ok``, ``note`` or ``wrong``; what was found; and what to do about it."""

    level: str
    text: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which device, and whether the network is asked."""
    parser.add_argument("--device", help="CPU or Ascend (default: what is there)")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub")


def execute(args: argparse.Namespace) -> int:
    """Run every check, each whatever the others found. The exit code is 69 when something is wrong."""
    checks: list[Callable[[], Iterator[Finding]]] = [python, packages, ascend, kernels, room]
    checks += [] if args.offline else [hubs]
    wrong = 0
    for check in [*checks, *(lambda mode=mode: step(mode, args.device) for mode in ("graph", "pynative"))]:
        for found in check():
            wrong += found.level == "wrong"
            sys.stdout.write(f"{found.level:<6}{found.text}\n" + (f"      -> {found.remedy}\n" if found.remedy else ""))
            sys.stdout.flush()
    sys.stdout.write(f"\n{wrong} of these must be mended first.\n" if wrong else "\nready: ms-diffsynth train\n")
    return 69 if wrong else 0


# ---- checks ----

def python() -> Iterator[Finding]:
    """Python and this package."""
    text = f"ms_diffsynth {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    fits = (3, 10) <= sys.version_info[:2] < (3, 13)
    yield Finding("ok" if fits else "wrong", text,
                  "" if fits else "use Python 3.10, 3.11 or 3.12: MindSpore has wheels for these")


def packages() -> Iterator[Finding]:
    """What is required is there in a version that fits; and packages that break others."""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in requires("ms_diffsynth") or []]
    fits: list[str] = []
    for need in needed:
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        found = installed(need.name)
        if found and need.specifier.contains(found, prereleases=True):
            fits.append(f"{need.name} {found}")
        else:
            yield Finding("wrong", f"{need.name} {found or 'is not installed'}: needed is {need}",
                          f"pip install '{need}'")
    yield Finding("ok", f"{', '.join(fits[:SHOWN])}" + (f"; {len(fits) - SHOWN} more fit" if len(fits) > SHOWN else ""))
    arrow = installed("pyarrow")
    if arrow and int(arrow.split(".")[0]) >= 26 and (installed("numpy") or "").startswith("1."):
        yield Finding("wrong", f"pyarrow {arrow} does not work with NumPy 1: every import of it fails",
                      "pip install 'pyarrow<26'")
    try:
        importlib.import_module("mindspore")
    except Exception as error:
        yield Finding("wrong", f"MindSpore cannot be imported: {str(error).strip().splitlines()[0]}",
                      "install it again: docs/get_started/install.md")


def ascend() -> Iterator[Finding]:
    """NPUs, their driver, and the CANN that this MindSpore accepts."""
    devices = sorted(glob.glob("/dev/davinci[0-9]*"))
    if not devices:
        yield Finding("note", "no Ascend NPU (/dev/davinci*): everything runs on the CPU")
        return
    from mindspore.run_check._check_version import AscendEnvChecker

    from ms_diffsynth import runtime

    accepted = AscendEnvChecker(None).version
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    cann, driver = runtime.cann_version(), runtime.driver_version()
    text = f"{len(devices)} NPU, driver {driver}, CANN {cann}; this MindSpore accepts CANN {', '.join(accepted)}"
    if not home:
        yield Finding("wrong", f"{text}; ASCEND_HOME_PATH is not set",
                      "source /usr/local/Ascend/cann/set_env.sh before every run; of a CANN before 8.5 it is "
                      "/usr/local/Ascend/ascend-toolkit/set_env.sh")
    fits = any(cann.startswith(known) for known in accepted)
    yield Finding("ok" if fits else "wrong", text,
                  "" if fits else "install one of these: docs/get_started/install_ascend.md")


def kernels() -> Iterator[Finding]:
    """What computes on the CPU."""
    from ms_diffsynth.ops.cpu.native.build import cache_folder, kind

    began = time.perf_counter()
    found = kind()
    seconds = time.perf_counter() - began
    if found.startswith("native"):
        yield Finding("ok", f"CPU kernels: {found}, in {cache_folder()} ({seconds:.1f} s)")
    else:
        yield Finding("note", f"CPU kernels: {found}; a step takes up to twice as long",
                      "install a C++ compiler (apt-get install g++), and unset MS_DIFFSYNTH_NATIVE")


def room() -> Iterator[Finding]:
    """Memory, and disk where models and runs are put."""
    from huggingface_hub import constants

    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = available_memory() or pages * size / 2**30
    level = "ok" if free >= LEAST_MEMORY else "wrong"
    yield Finding(level, f"memory: {free:.1f} GiB free, {len(os.sched_getaffinity(0))} cores",
                  "" if level == "ok" else f"end other programs: a first run needs {LEAST_MEMORY} GiB")
    for what, folder in (("this folder", Path.cwd()), ("models of the hub", Path(constants.HF_HUB_CACHE))):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        disk, can_write = shutil.disk_usage(there).free / 2**30, os.access(there, os.W_OK)
        level = "ok" if disk >= LEAST_DISK and can_write else "wrong"
        yield Finding(level, f"disk: {disk:.0f} GiB free for {what} ({folder})" + ("" if can_write else ", read-only"),
                      "" if level == "ok" else "choose another folder: --output_path, HF_HOME")


def hubs() -> Iterator[Finding]:
    """Whether the hub answers; a first run needs none."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    from ms_diffsynth.hub.download import NETWORK_ERRORS

    address = constants.ENDPOINT
    try:
        code = get_session().head(address, timeout=WAIT).status_code  # whatever it says, it answers
        yield Finding("ok", f"{address} answers" + (f" ({code})" if code >= 400 else ""))
    except NETWORK_ERRORS as error:
        yield Finding("note", f"{address} does not answer ({type(error).__name__}): models must be on this machine",
                      "set HF_ENDPOINT to a mirror, or MS_DIFFSYNTH_DOWNLOAD_SOURCE=modelscope")


def step(mode: str, device: str | None) -> Iterator[Finding]:
    """One training step of a toy model, in a process of its own: what breaks there breaks nothing here."""
    with tempfile.TemporaryDirectory() as folder:
        from PIL import Image

        (Path(folder) / "images").mkdir()
        Image.new("RGB", (16, 16), "white").save(Path(folder) / "images/one.png")
        words = ["train", "--family", "toy", "--model_paths", "toy", "--dataset_base_path", "images",
                 "--instance_prompt", "a", "--max_train_steps", "1", "--output_path", "run", "--mode", mode]
        words += ["--device", device] if device else []
        began = time.perf_counter()
        problem = command(["tiny", "toy", "toy"], folder) or command(words, folder)
        text = f"a training step in mode {mode}: {time.perf_counter() - began:.1f} s, its process included"
        if problem:
            yield Finding("wrong", f"{text.partition(':')[0]} fails: {problem}", "docs/reference/errors.md")
        else:
            yield Finding("ok", text)


# ---- helpers ----

def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def available_memory() -> float:
    """GiB that a new process can have, as Linux estimates it; 0 where it does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(found) / 2**20


def command(words: list[str], folder: str) -> str:
    """Run one of ours; the last line it says when it fails, else nothing."""
    try:
        done = subprocess.run([sys.executable, "-m", "ms_diffsynth.cli.main", *words], cwd=folder, text=True,
                              capture_output=True, timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end after {STEP_SECONDS} s"
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return said[-1] if done.returncode else ""
