"""What the stand-in's operators compute, in NumPy: one function for each, registered under its name.

``install()`` is called by the stand-in itself, before the first kernel. A call comes as JSON (see
``native/kernels.cc``) with the addresses of its tensors; it is looked up in the table, its tensors are given to the
function as arrays, and what the function returns is rounded to the dtypes of the outputs, to nearest, ties to even.

Tensors of float16 and bfloat16 are given as float32: products and sums are accumulated in float32, as an Ascend does.
"""
from __future__ import annotations

import ctypes
import json

from ms_diffsynth.standin import library
from ms_diffsynth.standin.compute import (  # noqa: F401  (they fill the table)
    aclop,
    attention,
    convolution,
    elementwise,
    movement,
    norms,
    optimizers,
    reductions,
)
from ms_diffsynth.standin.compute.table import run

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


def _compute(call: bytes) -> int:
    """Compute one call; 0, or 1 with the reason passed to the stand-in, which MindSpore then raises as an error."""
    try:
        run(json.loads(call))
    except Exception as error:  # whatever it is must become the kernel's error: no caller could catch it
        name = json.loads(call).get("name")
        reason = str(error) if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {error}"
        library().standin_set_error(f"{name}: {reason}".encode())
        return 1
    return 0


_compute_callback = _CALLBACK(_compute)


def install() -> None:
    """Hand the functions of this folder to the loaded stand-in."""
    library().standin_install(_compute_callback)
