"""``ms-diffsynth completion bash|zsh|fish``: a script that completes commands, flags and their values in a shell."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ms_diffsynth.config import SETTINGS
from ms_diffsynth.registry import FAMILIES


class Flag(NamedTuple):
    """A flag of a command, what it is for in a few words, and its values where they are known."""

    name: str
    text: str
    values: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of which shell."""
    parser.description += " It is printed; docs/get_started/install.md says where each shell looks for it."
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def execute(args: argparse.Namespace) -> int:
    """Print the script."""
    from ms_diffsynth.cli.main import COMMANDS, parser

    flags, words = {}, {}
    for command in COMMANDS:
        actions = parser(command).inner._actions
        flags[command] = list(_flags(actions))
        words[command] = [str(word) for action in actions if not action.option_strings for word in action.choices or ()]
    sys.stdout.write({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](COMMANDS, flags, words))
    return 0


def _flags(actions: list[argparse.Action]) -> Iterator[Flag]:
    for action in actions:
        text = getattr(action, "whole_help", None) or action.help or ""
        for option in action.option_strings:
            if not option.startswith("--") or text == argparse.SUPPRESS:
                continue
            setting = SETTINGS.get(action.dest)
            values = tuple(map(str, action.choices or ()))
            if setting is not None:
                values = setting.metadata["choices"] or (("true", "false") if setting.kind is bool else ())
            if action.dest == "family":
                values = tuple(sorted(FAMILIES))
            short = text.split(";")[0].split(" (")[0].replace("%%", "%")
            yield Flag(option, "".join(c for c in short if c not in "'\"\\`$:[]\n")[:70], tuple(values))


def _bash(commands: dict[str, str], flags: dict[str, list[Flag]], words: dict[str, list[str]]) -> str:
    values = [f'        "{command} {flag.name}") words="{" ".join(flag.values)}" ;;' for command in commands
              for flag in flags[command] if flag.values]
    names = [f'            {command}) words="{" ".join(flag.name for flag in flags[command])}" ;;'
             for command in commands]
    others = [f'            {command}) words="{" ".join(words[command])}" ;;' for command in commands if words[command]]
    return "\n".join((
        "_ms_diffsynth() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} words=",
        '    [[ $command == launch && " ${COMP_WORDS[*]} " == *" train "* ]] && command=train',
        "    if [[ $COMP_CWORD -eq 1 ]]; then",
        f'        words="{" ".join(commands)}"',
        '    else case "$command ${COMP_WORDS[COMP_CWORD-1]}" in', *values,
        "        *) if [[ $current == -* ]]; then case $command in", *names,
        "        esac; else case $command in", *others,
        "        esac; fi ;;",
        "    esac; fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _ms_diffsynth ms-diffsynth", ""))  # default: files, where nothing else fits


def _zsh(commands: dict[str, str], flags: dict[str, list[Flag]], words: dict[str, list[str]]) -> str:
    values = [f"        '{command} {flag.name}') compadd -- {' '.join(flag.values)}; return ;;" for command in commands
              for flag in flags[command] if flag.values]
    names = [f"            {command}) found=({' '.join(_colon(flag.name, flag.text) for flag in flags[command])}) ;;"
             for command in commands]
    others = [f"        {command}) compadd -- {' '.join(words[command])} ;;" for command in commands if words[command]]
    return "\n".join((
        "_ms_diffsynth() {",
        "    local command=$words[2]; local -a found",
        '    [[ $command == launch && " $words " == *" train "* ]] && command=train',
        "    if (( CURRENT == 2 )); then",
        f"        found=({' '.join(_colon(name, text) for name, text in commands.items())})",
        "        _describe command found; return",
        "    fi",
        '    case "$command $words[CURRENT-1]" in', *values,
        "    esac",
        "    if [[ $words[CURRENT] == -* ]]; then",
        "        case $command in", *names,
        "        esac",
        "        _describe -o flag found; return",
        "    fi",
        "    case $command in", *others,
        "    esac",
        "    _files",
        "}",
        "compdef _ms_diffsynth ms-diffsynth", ""))


def _colon(name: str, text: str) -> str:
    return f"'{name}:{text.replace(chr(39), '')}'"


def _fish(commands: dict[str, str], flags: dict[str, list[Flag]], words: dict[str, list[str]]) -> str:
    begin = "complete -c ms-diffsynth"
    lines = [f"{begin} -n __fish_use_subcommand -f -a {name} -d '{text.replace(chr(39), '')}'"
             for name, text in commands.items()]
    for command in commands:
        here = f"{begin} -n '__fish_seen_subcommand_from {command}'"
        lines += [f"{here} -a '{' '.join(words[command])}'"] if words[command] else []
        lines += [f"{here} -l {flag.name[2:]} -d '{flag.text}'" + (f" -x -a '{' '.join(flag.values)}'" if flag.values
                                                                   else "") for flag in flags[command]]
    return "\n".join((*lines, ""))
