"""The memory that FLUX.2 klein's configuration promises."""
from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
