"""Kernels the CPU lacks, so that mindone's networks run unchanged on a laptop. No effect on Ascend.

MindSpore's CPU back end registers no kernel for some seventy `mint` functions that nearly every network of mindone
calls. :func:`install_cpu_kernels` puts a composition of primitives that do have one in the place of each::

    import ms_diffsynth                                     # installs them when mindone is imported
    from mindone.diffusers import FluxTransformer2DModel    # forward and backward, PyNative and compiled

The replacements are plain functions, because the graph compiler parses their source; each is compared with NumPy in
value and gradient by tests/ops.
"""
from __future__ import annotations

from importlib import import_module
from types import ModuleType

import mindspore as ms

__all__ = ["install_cpu_kernels", "native_kernels"]


def install_cpu_kernels() -> bool:
    """Make mindone's networks run on the CPU; a second call does nothing.

    Returns: True when the CPU kernels are in force after this call, False on every other device.
    Raises: DeviceError when mindone was imported before ms_diffsynth on a CPU.
    """
    if ms.get_context("device_target") != "CPU":
        return False
    from ms_diffsynth.ops.cpu.install import install

    install()
    return True


def native_kernels() -> ModuleType | None:
    """`ops.cpu.native.kernels`, or None on another device than the CPU and where it has none."""
    if not install_cpu_kernels():
        return None
    from ms_diffsynth.ops.cpu.native.build import library

    return import_module("ms_diffsynth.ops.cpu.native.kernels") if library() else None
