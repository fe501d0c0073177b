"""The arguments of a function of unknown signature, on this processor and, where it can be emulated, on the other."""
from __future__ import annotations

import json
import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from ms_diffsynth.standin import Log
from ms_diffsynth.standin.build import FLAGS, NATIVE

COMPILERS = {"aarch64": ("aarch64-linux-gnu-g++", ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]),
             "x86_64": ("x86_64-linux-gnu-g++", ["qemu-x86_64-static", "-L", "/usr/x86_64-linux-gnu"])}
COMPILERS[platform.machine()] = ("c++", [])


@pytest.fixture(params=COMPILERS)
def program(request, tmp_path):
    """The built program and how it is run."""
    compiler, emulator = COMPILERS[request.param]
    if any(shutil.which(tool) is None for tool in (compiler, *emulator[:1])):
        if os.environ.get("CI") and not emulator:
            pytest.fail(f"no {compiler}")
        pytest.skip(f"NOT TESTED on {request.param}: no {compiler} and {emulator[:1]}")
    sources = [NATIVE / f"{name}.cc" for name in ("kernels", "handles", "record", "arithmetic")]
    sources.append(Path(__file__).with_name("capture.cc"))
    built = tmp_path / "capture"
    subprocess.run([compiler, *FLAGS, f"-I{NATIVE}", *sources, "-o", built, "-rdynamic", "-ldl", "-lpthread"],
                   check=True)
    return [*emulator, str(built)]


def test_arguments_are_recognised_in_order(program, tmp_path):
    log = tmp_path / "log.jsonl"
    done = subprocess.run(program, env=os.environ | {"MS_DIFFSYNTH_STANDIN_LOG": str(log)}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    many, few = Log.read(log).kernels()
    tensor, transposed = ({"dtype": "float32", "shape": [2, 3]},
                          {"dtype": "bfloat16", "shape": [2, 3], "strides": [1, 2], "offset": 0})
    arguments = many.record["arguments"]
    kept = [a & 0xFF if i in (3, 7) else a & 0xFFFFFFFF if i == 11 else a for i, a in enumerate(arguments)]
    assert kept == [tensor, 0, {"scalar": 0.5, "dtype": "float32"}, 1, 2147483647, "BSND", [7, -8], 256 - 3, 2**63 - 1,
                    transposed, 0, 17, tensor]  # of smaller numbers only their own bits count
    assert few.record["arguments"] == [transposed]
    call = json.loads(done.stdout.splitlines()[0])
    bits = [struct.pack("<q", b) for b in call["floats"]]
    assert struct.unpack("<d", bits[0])[0] == 1.25
    assert struct.unpack("<f", bits[1][:4])[0] == 2.5
    assert struct.unpack("<d", bits[2])[0] == -4.5
    assert many.tensors()[1] == transposed
