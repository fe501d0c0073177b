"""What serves where there are no native kernels: the numeric tests of this folder, with those turned off."""
from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("test_cpu_attention.py", "test_cpu_functional.py", "test_cpu_spatial.py", "test_fast.py")


def test_the_compositions_pass_the_same_tests(python):
    from ms_diffsynth.ops.cpu.native.build import SWITCH

    done = python("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *(HERE / name for name in FILES),
                  env=os.environ | {SWITCH: "0", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
