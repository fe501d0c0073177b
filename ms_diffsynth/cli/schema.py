"""``ms-diffsynth schema``: what a configuration file may say, for editors that complete and check YAML."""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING
from typing import Any

from ms_diffsynth.config import SAMPLE_OVERRIDES, SECTIONS, SETTINGS
from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.config.setting import Setting
from ms_diffsynth.registry import FAMILIES
from ms_diffsynth.storage.files import write_file

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", tuple: "array"}
BOUNDS = {"<": "exclusive", "<=": ""}  # of a range: "0 < lr <= 0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument("--output", type=path_argument, help="file to write (default: to the terminal)")


def execute(args: argparse.Namespace) -> int:
    """Write the schema."""
    text = json.dumps(schema(), indent=2) + "\n"
    if args.output:
        write_file(args.output, text.encode())
    else:
        sys.stdout.write(text)
    return 0


def schema() -> dict[str, Any]:
    """JSON Schema, draft 7, of a whole configuration file."""
    sections = {}
    for name, cls in SECTIONS.items():
        own = [s for s in SETTINGS.values() if s.section == name and not s.metadata["is_flag_only"]]
        sections[name] = {"type": "object", "description": (cls.__doc__ or "").splitlines()[0],
                          "additionalProperties": False, "properties": {s.name: of(s) for s in own}}
        if required := [s.name for s in own if s.default is MISSING]:
            sections[name]["required"] = required
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "a training run of ms_diffsynth",
            "type": "object", "additionalProperties": False, "properties": sections}


def of(setting: Setting) -> dict[str, Any]:
    """The schema of one setting: type, default, range, choices and meaning."""
    found: dict[str, Any] = {"type": [TYPES[setting.kind], "null"] if setting.is_optional else TYPES[setting.kind],
                             "description": setting.metadata["help"]}
    if setting.default is not MISSING:
        found["default"] = list(setting.default) if setting.kind is tuple else setting.default
    if setting.kind is tuple:
        found["type"] = ["array", "string"]  # one text, or several with commas
        found["items"] = {"type": "string"}
        if setting.name == "num_frames":
            found["type"], found["items"] = [*found["type"], "integer"], {"type": ["string", "integer"]}
        if setting.name == "sample_prompts":
            own = {name: of(SETTINGS[other]) for name, other in SAMPLE_OVERRIDES.items()}
            found["items"] = {"anyOf": [{"type": "string"}, {
                "type": "object", "additionalProperties": False, "required": ["prompt"],
                "properties": {"prompt": {"type": "string"}, **own}}]}
    choices = tuple(sorted(FAMILIES)) if setting.name == "family" else setting.metadata["choices"]
    if choices:
        found["enum"] = [*choices, *([None] if setting.is_optional else [])]
    words = setting.metadata["range"].split()  # "0 < lr <= 0.1", "0 < lr", or nothing
    for bound, number, sign in (("minimum", 0, 1), ("maximum", 4, 3)):
        if len(words) > number and words:
            name = f"{BOUNDS[words[sign]]}{bound.capitalize()}" if BOUNDS[words[sign]] else bound
            found[name] = float(words[number]) if setting.kind is float else int(words[number])
    return found
