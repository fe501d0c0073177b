"""Installed once, on the CPU only, and before mindone."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mindspore as ms
import mindspore.mint.nn.functional as F
import pytest
from mindspore import mint

import ms_diffsynth.ops
from ms_diffsynth.ops.cpu import functional, install, tensor

ROOT = Path(ms_diffsynth.ops.__file__).parents[2]


def test_a_second_call_changes_nothing():
    before = dict(vars(mint)), dict(vars(F)), len(sys.meta_path)
    assert ms_diffsynth.ops.install_cpu_kernels()
    assert before == (dict(vars(mint)), dict(vars(F)), len(sys.meta_path))


def test_every_kernel_is_in_place():
    for space, module in install.KERNELS:
        for name in module.__all__:
            assert getattr(space, name) is getattr(module, name), f"{space.__name__}.{name}"
    assert mint.nn.functional.gelu is functional.gelu and mint.stack is tensor.stack


def test_nothing_happens_on_another_device(monkeypatch):
    monkeypatch.setattr(ms, "get_context", lambda name: "Ascend")
    monkeypatch.setattr(install, "install", lambda: pytest.fail("installed on Ascend"))
    assert ms_diffsynth.ops.install_cpu_kernels() is False


def test_mindone_first_is_an_error_that_says_what_to_do():
    code = ("import sys, types; sys.modules['mindone.diffusers'] = types.ModuleType('mindone.diffusers')\n"
            "from ms_diffsynth.ops import install_cpu_kernels\ninstall_cpu_kernels()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "DeviceError: mindone was imported before" in done.stderr and "mindone.diffusers" in done.stderr


def test_importing_the_package_alone_changes_nothing():
    code = ("from mindspore import mint; before = dict(vars(mint))\n"
            "import ms_diffsynth.ops; assert before == dict(vars(mint))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
