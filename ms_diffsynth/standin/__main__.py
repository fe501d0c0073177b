"""``python -m ms_diffsynth.standin [--log FILE] [--memory GIB] [--shapes-only] -- COMMAND ...``."""
from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from ms_diffsynth.errors import UserError
from ms_diffsynth.standin import environment


def parser() -> argparse.ArgumentParser:
    """The command line before ``--``."""
    top = argparse.ArgumentParser(
        prog="python -m ms_diffsynth.standin",
        description="Run a command whose device Ascend is a stand-in on the CPU, for tests and planning. It is never a "
                    "way to train.")
    top.add_argument("--log", metavar="FILE", help="append every kernel, copy, synchronisation and allocation to FILE, "
                     "as JSON lines (an existing file is emptied first)")
    top.add_argument("--memory", type=float, default=64.0, metavar="GIB", help="memory of the device (default: 64)")
    top.add_argument("--shapes-only", action="store_true", help="record kernels and compute nothing: for counts and "
                     "memory")
    top.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")
    return top


def main() -> int:
    """Build, set the environment and become the command."""
    args = parser().parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser().error("no command: write it after --, as in  -- ms-diffsynth train CONFIG --device Ascend")
    try:
        variables = environment(args.log, memory=args.memory, shapes_only=args.shapes_only)
    except UserError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    if args.log is not None:
        Path(args.log).write_text("")
    beside = os.path.dirname(sys.executable)  # the commands of this Python's environment, activated or not
    variables["PATH"] = os.pathsep.join([beside, variables.get("PATH", "")])
    program = shutil.which(command[0], path=variables["PATH"])
    if program is None:
        parser().error(f"'{command[0]}' is not a program on PATH")
    sys.stderr.flush()
    os.execve(program, [program, *command[1:]], variables)  # a Python finds its environment by its path


if __name__ == "__main__":
    sys.exit(main())
