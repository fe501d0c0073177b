"""A flag that a message names is one that the command line has."""
from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import ms_diffsynth
from ms_diffsynth.cli.main import COMMANDS, parser

ROOT = Path(ms_diffsynth.__file__).parent
OTHERS = {"--setting", "--flag", "--find_unused_parameters"}  # which stand for any, and a flag of the scripts
PROGRAMS = ("standin/", "evaluate/weights.py", "ops/cpu/native/build.py")  # with flags of their own


def flags(of: argparse.ArgumentParser) -> set[str]:
    found = set(of._option_string_actions)
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(flags, action.choices.values()))
    return found


def named(path: Path) -> set[str]:
    """The flags in the texts of a source that are raised, logged or written; not in docstrings, nor parts of names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    quiet = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node.value for node in ast.walk(tree)
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet]
    return {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_]+", text)}


def test_flags_in_messages_exist():
    known = set().union(*(flags(parser(command)) for command in COMMANDS)) | OTHERS
    names = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
    found = {name: named(path) for name, path in names.items() if not name.startswith(PROGRAMS)}
    assert "--resume" in set().union(*found.values()) and "--resume" in known
    assert {path: odd for path, names in found.items() if (odd := names - known)} == {}
