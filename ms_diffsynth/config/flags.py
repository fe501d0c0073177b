"""Settings as command-line flags, and the parser of the command line and of training scripts."""
from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from ms_diffsynth.config.loading import NO_TOKEN, TOKEN_FLAGS, load_config
from ms_diffsynth.config.settings import SECTIONS, SETTINGS, TrainConfig
from ms_diffsynth.data.paths import path_problem
from ms_diffsynth.errors import ConfigError, nearest, shortened


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError instead of ending the process, and abbreviates nothing.

    Attributes:
        inner: the parser of the subcommand that was asked for, when there is one.
    """

    inner: Parser | None = None

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{shortened(message, 1000)}. See {self.prog} --help.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            own = self.inner or self
            known = [flag for flag, action in own._option_string_actions.items() if not isinstance(action, NoToken)]
            raise ConfigError(f"{own.prog} does not know {shortened(' '.join(unknown))}."
                              f"{nearest(unknown[0].partition('=')[0], known)} See {own.prog} --help.")
        return found


class NoToken(argparse.Action):
    """A flag that is there to be refused, so that its value is never repeated."""

    def __call__(self, *_: object) -> NoReturn:
        raise ConfigError(f"{self.option_strings[0]}: {NO_TOKEN}")


def refuse_tokens(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the flags that a token might be typed into, to refuse them."""
    for name in TOKEN_FLAGS:
        parser.add_argument(f"--{name}", action=NoToken, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def path_argument(text: str) -> Path:
    """The type of an argument that is a path. Raises: what a parser tells, for one that the system cannot look for."""
    if not text.strip():  # which would be the current folder
        raise argparse.ArgumentTypeError("it is empty: expected the name of a file or folder")
    if problem := path_problem(text):
        raise argparse.ArgumentTypeError(f"{shortened(text)}: {problem}")
    return Path(text)


def model_path_and_factor(text: str) -> tuple[str | None, Path, float]:
    """The type of an argument ``[MODEL=]FILE[:FACTOR]``: the model that is named, if one is, and `path_and_factor`."""
    model, equals, rest = text.partition("=")
    if not equals or not model.isidentifier() or Path(text).exists():
        return None, *path_and_factor(text)
    return model, *path_and_factor(rest)


def path_and_factor(text: str) -> tuple[Path, float]:
    """The type of an argument ``FILE[:FACTOR]``: the path, and the factor, which is 1 where there is none.

    Raises: as `path_argument`, and for a factor that is not from -1000 to 1000.
    """
    name, colon, factor = text.rpartition(":")
    if not colon or Path(text).exists() or not re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", factor):
        return path_argument(text), 1.0
    value = float(factor) if factor.count(".") <= 1 and factor.strip("+-.") else math.nan
    if not -1000 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{shortened(text)}: expected a factor from -1000 to 1000 behind the colon")
    return path_argument(name), value


class TrainingParser(Parser):
    """The flags of a training script: every setting of `config.settings`, checked, and those the script adds itself."""

    def __init__(self, fixed: dict[str, str], defaults: dict[str, str], **options: Any):
        super().__init__(usage="%(prog)s [CONFIG.yaml] [--setting value ...]",
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.fixed, self.settings = fixed, defaults
        self.add_argument("config", nargs="?", type=path_argument, metavar="CONFIG.yaml",
                          help="file of settings; flags win")
        add_flags(self, defaults, without=tuple(fixed))
        self.add_argument("--find_unused_parameters", action="store_true",
                          help="no effect: weights without a gradient get zeros (DiffSynth-Studio's commands pass it)")

    def parse_config(self, args: Sequence[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
        """The checked configuration, and the values of the flags that the script added."""
        given = super().parse_args(args)
        config = load_config(given.config, self.fixed | self.settings | overrides_of(given))
        return config, argparse.Namespace(**{name: value for name, value in vars(given).items()
                                             if name not in SETTINGS and name != "config"})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Every setting by its name, and the values of the flags that the script added."""
        config, own = self.parse_config(args)
        return argparse.Namespace(**config.flat(), **vars(own))


class HelpAll(argparse.Action):
    """Print the help with every setting, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        for action in parser._actions:
            action.help = getattr(action, "whole_help", action.help)
        parser.print_help()
        parser.exit()


# what --help shows; --help-all shows the others too
USUAL = frozenset((
    "family", "model_paths", "model_id_with_origin_paths", "lora_base_model", "lora_rank", "trainable_models",
    "fp8_models", "use_gradient_checkpointing", "dataset_base_path", "dataset_metadata_path", "instance_prompt",
    "height", "width", "max_pixels", "cache_dir", "task", "optimizer", "learning_rate", "gradient_accumulation_steps",
    "mode", "seed", "batch_size", "num_epochs", "max_train_steps", "output_path", "save_steps", "sample_prompts",
    "sample_steps", "validation_steps", "resume"))
_METAVARS = {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT", tuple: "LIST"}


def training_parser(family: str | None = None, description: str | None = None, **defaults: str) -> TrainingParser:
    """The parser of a training script; ``add_argument`` adds flags of your own.

    Args:
        family: the model family the script is for; None leaves it to the file or the flag.
        defaults: settings, as text, that differ from the usual defaults, e.g. ``num_epochs="1"``.

    Raises: ConfigError from ``parse_config``, naming what is wrong and the nearest flag.
    """
    return TrainingParser({} if family is None else {"family": family}, defaults, description=description)


def add_flags(parser: argparse.ArgumentParser, defaults: dict[str, str] | None = None,
              without: Sequence[str] = ()) -> None:
    """Give ``parser`` one flag for every setting, in one group a section, and refuse tokens. Its help shows those of
    USUAL.
    """
    refuse_tokens(parser)
    parser.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS,
                        help=f"show this and the other {len(SETTINGS.keys() - USUAL - {*without})} settings, and exit")
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").splitlines()[0])
        for setting in (s for s in SETTINGS.values() if s.section == section and s.name not in without):
            default = (defaults or {}).get(setting.name) or default_of(setting.name)
            choices = f"one of {', '.join(setting.metadata['choices'])}; " if setting.metadata["choices"] else ""
            switch = {"nargs": "?", "const": "true"} if setting.kind is bool else {}
            shown = default if default == "required" else f"default: {default}"
            text = f"{setting.metadata['help']} ({choices}{shown})".replace("%", "%%")
            action = group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, **switch,
                                        metavar=_METAVARS[setting.kind],
                                        help=text if setting.name in USUAL else argparse.SUPPRESS)
            action.whole_help = text


def default_of(name: str) -> str:
    """A setting's default as it is shown: ``required``, ``null`` or its value."""
    value = SETTINGS[name].default
    return "required" if value is MISSING else "null" if value is None else json.dumps(value)


def overrides_of(args: argparse.Namespace) -> dict[str, str]:
    """The settings given as flags, for `load_config`."""
    return {name: value for name, value in vars(args).items() if name in SETTINGS and isinstance(value, str)}
