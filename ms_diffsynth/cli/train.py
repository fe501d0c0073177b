"""``ms-diffsynth train CONFIG.yaml [--flag value ...]``: one training run from a configuration."""
from __future__ import annotations

import argparse

from ms_diffsynth.config import load_config
from ms_diffsynth.config.flags import add_flags, overrides_of, path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration file, and a flag for every setting in it."""
    parser.usage = "ms-diffsynth train [CONFIG.yaml] [--setting value ...]"
    parser.description += " Every setting of the file is also a flag; a flag wins."
    parser.add_argument("config", nargs="?", type=path_argument, metavar="CONFIG.yaml")
    add_flags(parser)


def execute(args: argparse.Namespace) -> int:
    """Train as configured."""
    config = load_config(args.config, overrides_of(args))
    from ms_diffsynth.run.task import train  # a mistake in the file is told before MindSpore is imported

    train(config)
    return 0
