"""``ms-diffsynth tiny FAMILY DIR``: write a tiny model with random weights in the family's real checkpoint format."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ms_diffsynth import runtime
from ms_diffsynth.registry import FAMILIES, family


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("tiny", allow_abbrev=False, help="write a tiny model with random weights, for first runs and tests")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path, help="where to write; kept as it is when it already holds a model")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Write the model, unless the folder already holds one."""
    if (args.folder / "model_index.json").is_file():
        sys.stderr.write(f"{args.folder} already holds a model: kept\n")
        return 0
    runtime.configure("pynative", "CPU")
    family(args.family).write_tiny(args.folder, args.seed)
    size = sum(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    sys.stderr.write(f"wrote a tiny {args.family} model with random weights to {args.folder} ({size / 1e6:.1f} MB)\n")
    return 0
