"""The device that tests run on: a variable, so that one suite serves the CPU, the stand-in for CANN, and an Ascend."""
from __future__ import annotations

import os

DEVICE = os.environ.get("MS_DIFFSYNTH_TEST_DEVICE", "CPU")
