"""YAML files of two levels, sections and settings, read as text with the line of each setting.

Texts, not values: YAML 1.1 takes 1e-4 for a text, ``no`` for false and 010 for eight. What a text means is for the
reader to decide, who knows what is expected. Nothing in a file is executed or expanded.
"""
from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import yaml

from ms_diffsynth.errors import ConfigError, listing, nearest, shortened

MOST_BYTES = 1 << 20  # a configuration has a few thousand; reading a million takes 4 s

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp")}

_TAGGED = {_TAG + "set": "(a set)", _TAG + "binary": "(binary data)", _TAG + "omap": "(an ordered mapping)"}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A value as it was written, and where: a text, a list of texts and of mappings of values, or neither of the two:
    then ``what`` it is.
    """

    place: str
    text: str | None = None
    items: tuple[str | dict[str, Written], ...] | None = None
    is_quoted: bool = False
    what: str = ""

    def __str__(self) -> str:
        return self.what or shortened(self.text if self.items is None else str(list(self.items)))


def read_sections(path: str | os.PathLike[str], sections: Collection[str],
                  report: Callable[[str], None]) -> Iterator[tuple[str | None, str, Written]]:
    """(section, name, value) of every setting of a file; the section is None for what stands outside of one.

    Args:
        sections: the sections there are; another one, and a name that comes twice, go to ``report``.

    Raises: ConfigError for a file that cannot be read or is not YAML, with the line.
    """
    try:
        size = os.path.getsize(path)
        if size > MOST_BYTES:
            raise ConfigError(f"{path} has {size} bytes, expected at most {MOST_BYTES}: give the path of a "
                              "configuration.")
        if not os.path.isfile(path):  # reading a pipe would wait for ever
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give the path of a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an escape that is no letter is a ValueError
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        text = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line} is not YAML: {text}. Correct the file.") from error
    if root is None:
        return
    for section, node, place in _pairs(root, path, "sections", report):
        if not isinstance(node, yaml.MappingNode):
            if section not in sections or not _is_null(node):
                yield None, section, _written(node, place)
        elif section not in sections:
            report(f"{section} {place}: expected one of the sections {listing(sections)}.{nearest(section, sections)}")
        else:
            for name, value, where in _pairs(node, path, "settings", report):
                yield section, name, _written(value, where)


def _pairs(node: yaml.Node, path: str | os.PathLike[str], what: str,
           report: Callable[[str], None]) -> Iterator[tuple[str, yaml.Node, str]]:
    """(key, value, place) of a mapping."""
    if not isinstance(node, yaml.MappingNode):
        report(f"{path} line {node.start_mark.line + 1}: expected {what}, each as 'name: value'.")
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            report(f"{name} in {path} line {line}: it is set already in line {lines[name]}. Keep one.")
        lines[name] = line
        yield name, value, f"in {path} line {line}"


def _written(node: yaml.Node, place: str) -> Written:
    if _is_text(node):
        return Written(place=place, text="null" if _is_null(node) else node.value, is_quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode) and all(_is_text(item) or _is_flat(item) for item in node.value):
        items = tuple(item.value if _is_text(item) else {key.value: _written(value, _place_of(key, place))
                                                         for key, value in item.value} for item in node.value)
        is_plain = all(isinstance(item, str) for item in items)
        return Written(place=place, items=items, what="" if is_plain else "(a list that holds more than texts)")
    kinds = {yaml.MappingNode: "(a mapping)", yaml.SequenceNode: "(a list that holds more than texts)"}
    tagged = f"(a value tagged {node.tag.replace(_TAG, '!!')})"
    return Written(place=place, what=_TAGGED.get(node.tag) or kinds.get(type(node)) or tagged)


def _place_of(node: yaml.Node, place: str) -> str:
    return f"{place.rpartition(' ')[0]} {node.start_mark.line + 1}"


def _is_flat(node: yaml.Node) -> bool:
    """Whether a node is a mapping of texts, none of them twice."""
    return (isinstance(node, yaml.MappingNode) and all(_is_text(part) for pair in node.value for part in pair)
            and len({key.value for key, _ in node.value}) == len(node.value))


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null"
