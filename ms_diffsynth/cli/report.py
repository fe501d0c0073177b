"""``ms-diffsynth report RUN [RUN ...]``: one page of HTML about a run, or about several beside each other."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.report.page import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where to write."""
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="output_path of a run")
    parser.add_argument("--output", type=path_argument, help="file to write (default: report.html in the first folder)")


def execute(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    file: Path = write_report(args.runs, args.output)
    sys.stdout.write(f"{file}\n")
    return 0
