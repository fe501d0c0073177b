"""``ms-diffsynth parity DIR...``: recompute reference cases and compare every number; see `debug.parity`."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ms_diffsynth import runtime
from ms_diffsynth.debug.parity import check_case
from ms_diffsynth.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cases, and the modes to run them in."""
    parser.add_argument("cases", nargs="+", metavar="DIR", type=Path, help="folders that hold a case.json")
    parser.add_argument("--mode", choices=[*runtime.MODES, "both"], default="both",
                        help="graph, pynative or both (default: both)")


def execute(args: argparse.Namespace) -> int:
    """Check every case in every mode; 0 only when every quantity is within its tolerance."""
    failures = 0
    for folder in args.cases:
        for mode in runtime.MODES if args.mode == "both" else (args.mode,):
            runtime.configure(mode)
            _say(f"{folder} ({mode})")
            try:
                quantities = check_case(folder, mode)
            except UserError as error:
                raise type(error)(f"case {folder}: {error}") from error
            for quantity in quantities:
                _say(str(quantity))
            failures += sum(not q.passes for q in quantities)
    _say(f"{failures} quantities are out of tolerance" if failures else "all quantities are within tolerance")
    return 1 if failures else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
