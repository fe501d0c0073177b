"""The tables of kernels in these modules must hold ours, so they are installed before the modules are collected."""
from __future__ import annotations

import mindspore as ms

from ms_diffsynth.ops import install_cpu_kernels

ms.set_device("CPU")
install_cpu_kernels()
