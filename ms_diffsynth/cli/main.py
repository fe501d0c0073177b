"""Entry point of the command ``ms-diffsynth``."""
from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

# MindSpore and transformers print warnings that no user of this command can act on
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from ms_diffsynth.errors import ConfigError, UserError, nearest

COMMANDS = ("train", "sample", "tiny", "parity", "describe")


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a file of this folder."""
    from importlib import import_module

    top = argparse.ArgumentParser(prog="ms-diffsynth", allow_abbrev=False, description="Train and run diffusion models with MindSpore.")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"ms_diffsynth.cli.{name}").add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A user's mistake ends with its message and exit code, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("ms_diffsynth").setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    args, unknown = parser().parse_known_args(arguments)
    try:
        if unknown:
            flags = [f"--{name}" for name in vars(args)] + [f"--{name}" for name in getattr(args, "known_flags", ())]
            raise ConfigError(f"{args.command} does not know {' '.join(unknown)}: see ms-diffsynth {args.command} --help."
                              f"{nearest(unknown[0], flags)}")
        return args.execute(args)
    except UserError as error:
        if args.debug:
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
