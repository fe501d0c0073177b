"""``ms-diffsynth parity [DIR...]``: recompute reference cases and compare every number; see `debug.parity`."""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from ms_diffsynth import runtime
from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.debug.compare import TOLERANCES, tolerances
from ms_diffsynth.debug.parity import CASES, check_case
from ms_diffsynth.errors import ConfigError, UserError
from ms_diffsynth.standin import active
from ms_diffsynth.storage.files import write_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cases, and where and how to run them."""
    parser.add_argument("cases", nargs="*", metavar="DIR", type=path_argument,
                        help="folders that hold a case.json (default: those that come with the package)")
    parser.add_argument("--mode", choices=[*runtime.MODES, "both"], default="both",
                        help="graph, pynative or both (default: both)")
    parser.add_argument("--device", choices=runtime.DEVICES,
                        help="what to run them on (default: an Ascend where there is one, else the CPU)")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32",
                        help="what the network computes in (default: float32)")
    parser.add_argument("--report", metavar="FILE", type=path_argument,
                        help="also write every number, and the versions of everything, as JSON: to send to us")


def execute(args: argparse.Namespace) -> int:
    """Check every case in every mode; 0 only when every quantity is within its tolerance."""
    checked = []
    for folder in args.cases or sorted(path for path in CASES.iterdir() if (path / "case.json").is_file()):
        for mode in runtime.MODES if args.mode == "both" else (args.mode,):
            runtime.configure(mode, args.device)
            if runtime.current().device == "CPU" and args.dtype != "float32":
                raise ConfigError(f"--dtype {args.dtype} on the CPU, which has no {args.dtype} matrix product: "
                                  "expected --dtype float32, or --device Ascend.")
            _say(f"{folder} ({mode})")
            try:
                quantities = check_case(folder, mode, args.dtype)
            except UserError as error:
                raise type(error)(f"case {folder}: {error}") from error
            for quantity in quantities:
                _say(str(quantity))
            # JSON has no number for an infinite error
            checked.append({"case": folder.name, "mode": mode, "quantities": [
                asdict(q) | {"error": q.error if q.error < float("inf") else None, "passes": q.passes}
                for q in quantities]})
    failures = sum(not q["passes"] for run in checked for q in run["quantities"])
    verdict = f"{failures} quantities are out of tolerance" if failures else "all quantities are within tolerance"
    if args.report is not None:
        report = {"verdict": verdict, "versions": runtime.versions(), "is_standin": active(), "dtype": args.dtype,
                  "tolerances": asdict(tolerances(args.dtype, runtime.current().device)), "runs": checked}
        write_file(args.report, (json.dumps(report, indent=1) + "\n").encode())
    _say(verdict)
    return 1 if failures else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
