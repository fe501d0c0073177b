"""Entry point of the command ``ms-diffsynth``."""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from ms_diffsynth import __version__
from ms_diffsynth.cli.run_main import run_main
from ms_diffsynth.config.flags import Parser
from ms_diffsynth.errors import ConfigError, nearest, shortened

# One file of this folder each, imported when it is asked for: MindSpore takes seconds to import, a help text must not.
COMMANDS = {
    "init": "look at a folder of images, and write a configuration that trains on it",
    "examples": "copy the example configurations and their images to here",
    "train": "train from a configuration file",
    "doctor": "check that this machine is ready: versions, devices, memory, disk, hub, a step in both modes",
    "launch": "train in several processes, on one machine or more, and end all of them together",
    "sample": "generate images",
    "replay": "make a recorded step of a run again, and find where it stopped being finite",
    "cache": "inspect a cache of split training, or remove entries that are no longer needed",
    "describe": "print a run's two halves as straight-line code, loading no weights",
    "report": "one page of HTML about a run, or about several beside each other",
    "evaluate": "compare generated images with real ones, and look for copies",
    "convert": "a base model from its publisher's single file to diffusers' folder, or back",
    "lora": "look at LoRA files: convert, inspect, merge, extract, resize",
    "push": "publish a folder on a hub",
    "schema": "print what a configuration file may say, as JSON Schema, for editors",
    "completion": "print what completes commands and flags in a shell: bash, zsh or fish",
    "template": "look at a template's code, or pack a trained one to share it",
    "tiny": "write a tiny model with random weights, for first runs and tests",
    "parity": "compare with recorded cases of the PyTorch reference implementations",
}


class Formatter(argparse.HelpFormatter):
    """With room for the longest command: argparse does not count how far commands are indented."""

    def __init__(self, prog: str):
        super().__init__(prog)
        self._action_max_length = 4 + max(map(len, COMMANDS))


def parser(command: str | None) -> Parser:
    """The command line; only ``command`` gets its flags."""
    top = Parser(prog="ms-diffsynth", formatter_class=Formatter,
                 description="Train and run diffusion models with MindSpore.",
                 epilog="Every kind of error, by the word its message begins with, and every exit code are in "
                        "docs/reference/errors.md.")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.add_argument("--version", action="version", version=f"ms-diffsynth {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="the same")
        if name == command:
            top.inner = sub
            module = import_module(f"ms_diffsynth.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(execute=module.execute)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("ms_diffsynth").setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _run(arguments), debug="--debug" in arguments)


def _run(arguments: list[str]) -> int:
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        raise ConfigError(f"'{shortened(command)}' is an unknown command: expected one of {', '.join(COMMANDS)}."
                          f"{nearest(command, COMMANDS)}")
    if set(arguments) <= {"--debug"}:
        parser(None).print_help()
        return 0
    args = parser(command).parse_args(arguments)
    return args.execute(args)


if __name__ == "__main__":
    sys.exit(main())
