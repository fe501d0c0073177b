"""From a YAML file, flags and Python values to a checked configuration, and back to a file."""
from __future__ import annotations

import contextlib
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from typing import Any

import yaml

from ms_diffsynth.config.rules import rules
from ms_diffsynth.config.setting import Wrong
from ms_diffsynth.config.settings import SAMPLE_OVERRIDES, SECTIONS, SETTINGS, TrainConfig
from ms_diffsynth.config.yaml_lines import Written, read_sections
from ms_diffsynth.errors import ConfigError, listing, nearest, shortened
from ms_diffsynth.formats.json_text import NotJSON, parse_json
from ms_diffsynth.redact import without_secrets

WIDTH, LONGEST_VALUE = 118, 80  # characters of a line, and of a list with commas that stands on one
TOKEN_FLAGS = ("hub_token", "token")  # known, so that they are refused and their value is never repeated
NO_TOKEN = ("a token is never a flag and never a setting: it would stay in files, in the shell's history and in the "
            "list of processes. Log in with 'hf auth login', or set HF_TOKEN (for ModelScope: MODELSCOPE_API_TOKEN), "
            "and replace the token that was written here.")


def load_config(path: str | os.PathLike[str] | None = None, flags: Mapping[str, str] | None = None,
                **settings: Any) -> TrainConfig:
    """The configuration of a YAML file, overruled by settings, checked: ``load_config("run.yaml", lora_rank=8)``.

    Args:
        path: a file of the sections in `config.settings`; None takes every setting from the arguments.
        flags: name -> text of the command line.
        settings: name -> value; text, numbers, None, true, false, or a list of texts.

    Raises: ConfigError listing every unknown, misplaced, repeated, mistyped, impossible and missing setting.
    """
    problems: list[str] = []
    given = {} if path is None else _read(path, problems.append)
    written = {name: Written(text=text, place=f"from the flag --{name}") for name, text in (flags or {}).items()}
    written |= {name: _written(value) for name, value in settings.items()}
    for name, value in written.items():
        if name in TOKEN_FLAGS:
            problems.append(f"{name}: {NO_TOKEN}")
        elif name not in SETTINGS:
            what = f"--{name} is not a flag" if name in (flags or {}) else f"{name} is not a setting"
            problems.append(f"{what}.{nearest(name, SETTINGS)}")
        else:
            given[name] = value
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, setting in SETTINGS.items():
        if name in given:
            try:
                values[setting.section][name] = (_sample_prompts(given[name]) if name == "sample_prompts"
                                                 else setting.parse(given[name]))
            except Wrong as error:
                problems.append(f"{name}={given[name]} {given[name].place}: {error}")
        elif setting.default is MISSING:
            problems.append(f"{name} is not set ({setting.metadata['help']}): set it in section '{setting.section}' of "
                            f"the configuration, or by --{name}.")
    _raise(problems)
    return validate(TrainConfig(**{section: cls(**values[section]) for section, cls in SECTIONS.items()}))


def validate(config: TrainConfig) -> TrainConfig:
    """Check ranges and what settings mean together. Raises: ConfigError listing everything that is wrong."""
    problems = [f"{name}={shortened(str(value))}: {expected}." for name, value in config.flat().items()
                if value is not None and (expected := SETTINGS[name].expected(value))]
    problems += [text for condition, text in rules(config) if condition]
    _raise(problems)
    return config


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as a file that `load_config` reads back to the same, but for what is a flag only, and
    for secrets."""
    sections = {name: {k: list(v) if isinstance(v, tuple) else v for k, v in vars(getattr(config, name)).items()
                       if not SETTINGS[k].metadata["is_flag_only"]} for name in SECTIONS}
    return yaml.safe_dump(without_secrets(sections), sort_keys=False, allow_unicode=True, width=math.inf)


def commented_yaml(head: Iterable[str], settings: Mapping[str, tuple[Any, str]]) -> str:
    """A configuration with comments, which `load_config` reads.

    Args:
        head: lines of the comment at its beginning.
        settings: name -> value and comment, in the order of each section: text, as a flag would have it, or a number,
            true, false, or a list of texts.
    """
    lines = [f"# {' '.join(line.splitlines())}" for line in head]
    for section in SECTIONS:
        own = {name: given for name, given in settings.items() if SETTINGS[name].section == section}
        lines += [f"{section}:"] if own else []
        for name, (value, comment) in own.items():
            comment = f"  # {comment}" if comment else ""
            if isinstance(value, str) and len(value) > LONGEST_VALUE and "," in value and " " not in value:
                folded = textwrap.wrap(value.replace(",", ", "), WIDTH - 4, break_long_words=False,
                                       break_on_hyphens=False)
                lines += [f"  {name}: >-{comment}", *(f"    {line}" for line in folded)]
                continue
            is_text = isinstance(value, list) or (
                SETTINGS[name].kind in (str, tuple) and not (SETTINGS[name].is_optional and value in ("null", "~")))
            text = _in_one_line(value) if is_text else str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"  {name}: {text}{comment}")
    return "\n".join(lines) + "\n"


def _in_one_line(value: str | list[str]) -> str:
    """A text or a list of texts in YAML: plain where that can be, else in quotes, so that no line ends in it."""
    for quotes in (None, '"'):
        text = yaml.safe_dump(value, default_flow_style=True, default_style=quotes, width=math.inf, allow_unicode=True)
        text = text.strip().removesuffix("...").strip()
        if len(text.splitlines()) == 1:
            break
    return text


def _sample_prompts(written: Written) -> tuple[str | dict[str, Any], ...]:
    """Prompts, and mappings of a prompt and of `SAMPLE_OVERRIDES`. Raises: Wrong."""
    if (written.text or "").lstrip().startswith("["):
        with contextlib.suppress(NotJSON):
            items = parse_json(written.text, list)
            written = _written(items, written.place) if any(isinstance(item, dict) for item in items) else written
    if not any(isinstance(item, dict) for item in written.items or ()):
        return SETTINGS["sample_prompts"].parse(written)
    known, entries = ("prompt", *SAMPLE_OVERRIDES), []
    for number, item in enumerate(written.items, 1):
        if isinstance(item, str):
            entries.append(item)
            continue
        where = f"entry {number}"
        if not isinstance(item, dict) or "prompt" not in item:
            raise Wrong(f"{where}: expected a text, or a mapping of prompt and of some of {listing(known[1:])}")
        entry: dict[str, Any] = {}
        for name, value in item.items():
            if name not in known:
                raise Wrong(f"{where} has '{name}': expected prompt and some of {listing(known[1:])}"
                            f".{nearest(name, known)}")
            setting = SETTINGS[SAMPLE_OVERRIDES.get(name, "sample_negative_prompt")]  # a prompt is a text too
            try:
                entry[name] = setting.parse(value)
            except Wrong as error:
                raise Wrong(f"{where}, {name}={value} {value.place}: {error}") from None
        if ("height" in entry) != ("width" in entry):
            raise Wrong(f"{where} has only one of height and width: set both, or neither")
        entries.append({name: entry[name] for name in known if name in entry})
    return tuple(entries)


def _written(value: Any, place: str = "from Python") -> Written:
    """A Python value as if it had been written in a file."""
    if isinstance(value, (list, tuple)):
        items = tuple({name: _written(inner, place) for name, inner in item.items()} if isinstance(item, dict) else item
                      for item in value)
        is_plain = all(isinstance(item, str) for item in items)
        return Written(items=items, place=place, what="" if is_plain else "(a list that holds more than texts)")
    if isinstance(value, dict):
        return Written(place=place, what="(a mapping)")
    if value is None or isinstance(value, bool):
        return Written(text={None: "null", True: "true", False: "false"}[value], place=place)
    return Written(text=os.fspath(value) if isinstance(value, os.PathLike) else str(value), place=place,
                   is_quoted=False)


def _read(path: str | os.PathLike[str], report: Callable[[str], None]) -> dict[str, Written]:
    """Name -> what a file says; what is not a setting of its section goes to ``report``."""
    given: dict[str, Written] = {}
    for section, name, written in read_sections(path, SECTIONS, report):
        if section is None and name in SECTIONS:
            report(f"{name} {written.place}: expected the settings of the section '{name}' below it.")
        elif name in TOKEN_FLAGS:
            report(f"{name} {written.place}: {NO_TOKEN}")
        elif name not in SETTINGS:
            report(f"{name} {written.place} is not a setting.{nearest(name, SETTINGS)}")
        elif SETTINGS[name].section != section:
            report(f"{name} {written.place}: it belongs into section '{SETTINGS[name].section}'.")
        elif SETTINGS[name].metadata["is_flag_only"]:
            report(f"{name} {written.place}: a file cannot say that code is trusted. Pass --{name} when you start the "
                   "run.")
        else:
            given[name] = written
    return given


def _raise(problems: list[str]) -> None:
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems)} settings are wrong:\n  "
        raise ConfigError(head + "\n  ".join(p if p.endswith((".", "?")) else p + "." for p in problems))
