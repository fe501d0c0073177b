"""The only reader of the environment and the only writer of MindSpore's context: device, mode, dtype, rank.

``configure()`` is called once, before any network is built. The process always stays in PyNative mode: in mode
``"graph"`` the training and sampling steps are compiled by `compile`, and everything else (``prepare``) runs
eagerly. On the CPU it runs blocking too, which makes its many small operations forty times faster (1240 ms -> 29 ms for
a tiny FLUX forward, MindSpore 2.10, 2026-11-21). On an Ascend blocking would wait after every kernel of the compiled
step as well: ``MS_LAUNCH_BLOCKING=1`` in the environment turns it on, to find an error.
"""
from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor

from ms_diffsynth import __version__
from ms_diffsynth.errors import ConfigError, DataError, DeviceError, UserError, is_memory_short, nearest, shortened
from ms_diffsynth.ops import install_cpu_kernels

logger = logging.getLogger(__name__)

MODES = ("graph", "pynative")
DEVICES = ("CPU", "Ascend")
ASCEND = Path("/usr/local/Ascend")  # where CANN and its driver are installed unless the environment says otherwise
DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What the process runs on, decided once."""

    device: str  # "CPU" or "Ascend"
    mode: str  # "graph" or "pynative"
    rank: int
    world_size: int
    jit_level: str = "O0"


_current: Runtime | None = None
_chosen: dict[str, str] = {}  # by the script, through MindSpore's own function


def _note_mode(set_context: Any) -> Any:
    """MindSpore's `set_context`, noting a mode: PyNative is MindSpore's default, so nothing else tells a choice."""
    @functools.wraps(set_context)
    def noted(**settings: Any) -> Any:
        if "mode" in settings:
            _chosen["mode"] = "graph" if settings["mode"] == ms.GRAPH_MODE else "pynative"
        return set_context(**settings)

    return noted


_set_context = ms.set_context
if ms.get_context("mode") == ms.GRAPH_MODE:
    _chosen["mode"] = "graph"
ms.set_context = _note_mode(_set_context)


def configure(mode: str | None = None, device: str | None = None, *, jit_level: str | None = None,
              device_memory: float | None = None) -> Runtime:
    """Choose device and mode. ``device=None`` takes an Ascend where there is one, else the CPU.

    Args:
        mode: ``"graph"`` or ``"pynative"``; None is what the script chose by ``mindspore.set_context(mode=...)`` after
            ms_diffsynth was imported, else ``"graph"``. The process itself stays in PyNative mode.
        jit_level: of what is compiled afterwards: ``"O0"``, or ``"O1"``, which fuses element-wise operators; None
            leaves it.
        device_memory: most GiB that MindSpore may take of an Ascend's memory; None is all. Read when the device is
            first used.

    Raises: ConfigError for an unknown mode or device, or with MindSpore's compile cache; DeviceError when the device
        cannot be used here.
    """
    global _current
    _refuse_compile_cache()
    mode = mode or _chosen.get("mode", "graph")
    if mode not in MODES:
        raise ConfigError(f"mode='{mode}': expected one of {', '.join(MODES)}.{nearest(mode, MODES)}")
    if device is not None and device.lower() not in [d.lower() for d in DEVICES]:
        raise ConfigError(f"device='{device}': expected one of {', '.join(DEVICES)}.{nearest(device, DEVICES)}")
    target = _set_device(device)
    if target == "CPU":
        # Read when MindSpore first runs something. Without it the main thread hands a compiled step to another thread
        # and spins on a core until it is done: 0.32 s a step of the tiny FLUX run instead of 0.11 (2026-11-21).
        os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")
    if _current is None or _current.device != target:
        _set_context(mode=ms.PYNATIVE_MODE)
    if target == "CPU":
        ms.runtime.launch_blocking()
    elif _current is None or _current.device != target:  # what MindSpore reads before it first uses the device
        if device_memory is not None:
            ms.runtime.set_memory(max_size=f"{device_memory:g}GB")
        ms.device_context.ascend.op_precision.conv_allow_hf32(False)  # or float32 convolutions keep 12 bits of a number
        if os.environ.get("MS_LAUNCH_BLOCKING") == "1":
            ms.runtime.launch_blocking()
    install_cpu_kernels()
    rank, world_size = _join(target)
    _current = Runtime(device=target, mode=mode, rank=rank, world_size=world_size,
                       jit_level=jit_level or (_current.jit_level if _current else "O0"))
    return _current


def _refuse_compile_cache() -> None:
    """MindSpore's cache of compiled graphs compares the code, not the numbers in it (2.10, 2026-11-30)."""
    if os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1" or ms.get_context("enable_compile_cache"):
        raise ConfigError("MS_COMPILER_CACHE_ENABLE=1 (or enable_compile_cache=True): MindSpore would take a step that "
                          "was compiled for other settings, without a word, because it compares the code alone. "
                          "Expected its compile cache to be off. Unset MS_COMPILER_CACHE_ENABLE.")


def current() -> Runtime:
    """The runtime of this process; configures the defaults at first use."""
    return _current or configure()


def use_device(device: str | None) -> None:
    """Take another device, in the same mode; None keeps the present one. Raises: as `configure`."""
    if device is not None and device.lower() != current().device.lower():
        configure(current().mode, device)


def _join(device: str) -> tuple[int, int]:
    """Rank and number of ranks; the first call in a worker of msrun, or of our launcher, waits for all others."""
    world_size = _number_in("RANK_SIZE") or _number_in("MS_WORKER_NUM") or 1
    if world_size == 1:
        return 0, 1
    from mindspore import communication

    if device == "CPU" and _current is None and "DEVICE_ID" in os.environ:
        _take_cores(_number_in("DEVICE_ID") or 0, _number_in("LOCAL_WORLD_SIZE") or world_size)
    # On the CPU also how long a rank waits in a collective, while rank 0 makes images: 30 s by default.
    os.environ.setdefault("MS_NODE_TIMEOUT", "1800")
    try:
        communication.init()  # HCCL or MCCL, as the device has it; again, it does nothing
    except (RuntimeError, ValueError) as error:
        cause = str(error).strip().splitlines()[0].rstrip(". ")
        raise DeviceError(f"rank {os.environ.get('RANK_ID')} of {os.environ.get('RANK_SIZE')} cannot join the others: "
                          f"MindSpore {ms.__version__} says: {cause}. Start all ranks by msrun or ms-diffsynth launch "
                          "(see docs/how_to/several_devices.md), or unset RANK_SIZE.") from error
    if _current is None:
        atexit.register(_yield_to_others)  # runs before what MindSpore registered at its import: it leaves the others
    return communication.get_rank(), communication.get_group_size()


def _number_in(name: str) -> int | None:
    """A number of ranks, or the number of one, that the environment says; None where it says none.

    Raises: ConfigError for what is no such number.
    """
    text = os.environ.get(name) or ""
    if text and not (text.isascii() and text.isdecimal() and len(text) <= 6):
        raise ConfigError(f"{name}={shortened(text)} in the environment: expected a whole number, as msrun and "
                          f"ms-diffsynth launch set it. Unset {name} to train in one process.")
    return int(text) if text else None


def _yield_to_others() -> None:
    """From now on, let the threads that this one wakes run first.

    A thread of MindSpore tells a rank that it may end; the rank then frees the connection while that thread may still
    read it. Of ranks that shared busy cores 3 of 44 ended in a segmentation fault, after all was
    saved; with this 0 of 170 (MindSpore 2.10, 2026-11-21).
    """
    with contextlib.suppress(AttributeError, OSError):  # no Linux; a sandbox that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _take_cores(rank: int, ranks: int) -> None:
    """Keep this process to its share of the cores: ranks whose threads share one wait for each other by spinning.

    Args:
        rank, ranks: among those of this machine.
    """
    cores = sorted(os.sched_getaffinity(0))
    if rank >= ranks:
        raise ConfigError(f"DEVICE_ID={rank} and {ranks} ranks on this machine, as the environment says: expected 0 to "
                          f"{ranks - 1}. Start all ranks by msrun or ms-diffsynth launch.")
    first, last = rank * len(cores) // ranks, (rank + 1) * len(cores) // ranks
    own = cores[first:last] or [cores[first]]
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended this moment
            os.sched_setaffinity(int(thread), own)


def _set_device(device: str | None) -> str:
    """Set the device target and return it as MindSpore spells it."""
    wanted = {d.lower(): d for d in DEVICES}[(device or ms.get_context("device_target")).lower()]
    if _current is not None and _current.device == wanted:
        return wanted  # once ranks have joined each other, MindSpore refuses even the same device
    try:
        ms.set_device(wanted)
    except (RuntimeError, ValueError) as error:
        if "has been initialized" in str(error) and ms.get_context("device_target") == wanted:
            return wanted  # a script has computed something already
        cause = str(error).strip().splitlines()[0].rstrip(". ")
        raise DeviceError(f"device='{wanted}' cannot be used on this machine: MindSpore {ms.__version__} says: "
                          f"{cause}. Expected an Ascend driver, firmware and CANN that fit this MindSpore. "
                          "Install them (see docs/get_started/install.md), or run with --device CPU.") from error
    return wanted


def versions() -> dict[str, str]:
    """What a report of numbers must say of where they come from: packages, and on an Ascend device, CANN and driver."""
    found = {"ms_diffsynth": __version__} | {name: version(name) for name in ("mindspore", "mindone", "numpy")}
    found |= {"python": platform.python_version(), "machine": platform.machine(), "device": current().device}
    if kernels():
        found["kernels"] = kernels()
    if current().device == "Ascend":
        found["device"] = ms.hal.get_device_name(0)
        found |= {"cann": cann_version(), "driver": driver_version()}
    return found


def cann_version() -> str:
    """Of the CANN that the environment names, or the usual place has; ``unknown`` where there is none."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return _version_in(Path(home or ASCEND / "ascend-toolkit/latest") / "compiler" / "version.info")


def driver_version() -> str:
    """Of the NPU's driver; ``unknown`` where there is none."""
    return _version_in(ASCEND / "driver" / "version.info")


def kernels() -> str:
    """What computes on the CPU: ``composed``, or ``native`` and the key of their library; empty on an Ascend."""
    if current().device != "CPU":
        return ""
    from ms_diffsynth.ops.cpu.native.build import kind

    return kind()


def _version_in(file: Path) -> str:
    """The version in a file of CANN or of its driver, as MindSpore's own check reads it."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return next((line.partition("=")[2].strip() for line in lines if line.lower().startswith("version=")), "unknown")


def to_device(value: Any) -> Tensor:
    """An array, or a Tensor, where the device computes. The host does not wait for an Ascend to have it.

    A Tensor that lies on the host is copied when it is first used, and the host waits before that and after.
    """
    tensor = value if isinstance(value, Tensor) else Tensor(value)
    return tensor.move_to("Ascend", blocking=False) if current().device == "Ascend" else tensor


def compute_dtype(name: str | None) -> ms.Type:
    """The dtype to compute in. None means bfloat16 on Ascend and float32 on the CPU.

    The CPU has no bfloat16 matrix product and a slow float16 one: there every request falls back to float32, logged.
    """
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype='{name}': expected one of {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    if current().device == "CPU":
        if name not in (None, "float32"):
            logger.warning("dtype=%s: the CPU has no %s matrix product, so everything is computed in float32 "
                           "(twice the memory for weights). On Ascend the setting is used.", name, name)
        return ms.float32
    return DTYPES[name or "bfloat16"]


def model_base_path() -> str | None:
    """Folder that holds downloaded models, from MS_DIFFSYNTH_MODEL_BASE_PATH; None uses the hub's own cache."""
    return os.environ.get("MS_DIFFSYNTH_MODEL_BASE_PATH") or None


@contextlib.contextmanager
def memory_for(**settings: Any) -> Iterator[None]:
    """Inside the block, want of memory is a DeviceError that names the settings which ask for it, but for None."""
    try:
        yield
    except Exception as error:
        if (isinstance(error, UserError) and not isinstance(error, DataError)) or not is_memory_short(error):
            raise
        asked = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        raise DeviceError(f"the memory does not suffice for {asked}: choose less of it (docs/reference/memory.md), or "
                          "a smaller model.") from error


def memory_text(size: int) -> str:
    """Bytes as ``1.3 GiB``, or as ``20 MiB`` where that is little."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.0f} MiB"


def peak_memory_bytes() -> int:
    """The largest size so far, in bytes: of what MindSpore holds on the Ascend, or of this process on the CPU."""
    if current().device == "Ascend":
        return ms.runtime.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
