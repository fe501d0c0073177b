"""``ms-diffsynth examples [DIR]``: the configurations, scripts and small data sets of examples/, copied to here."""
from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import ms_diffsynth
from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.errors import OutputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.description += " The commands of the documentation then work as they are written."
    parser.add_argument("folder", nargs="?", type=path_argument, default=Path("examples"), metavar="DIR",
                        help="folder that is made (default: examples)")


def execute(args: argparse.Namespace) -> int:
    """Copy them. Nothing that exists is overwritten."""
    package = Path(ms_diffsynth.__file__).parent
    source = next((found for found in (package / "examples", package.parent / "examples") if found.is_dir()), None)
    if source is None:
        raise OutputError(f"{package} has no examples: it was not built from the whole repository. Install a wheel of "
                          "this package, or clone the repository.")
    if os.path.lexists(args.folder):
        raise OutputError(f"{args.folder} exists already, and is kept. Choose another name: ms-diffsynth examples DIR.")
    shutil.copytree(source, args.folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    sys.stdout.write(f"{args.folder}: {sum(1 for _ in args.folder.rglob('*.yaml'))} configurations, such as "
                     f"{args.folder / 'flux/emoji_dreambooth.yaml'}\n")
    return 0
