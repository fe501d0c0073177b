"""One setting: what its text means, what is allowed, and how it is written to a file."""
from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ms_diffsynth.config.yaml_lines import Written
from ms_diffsynth.data.paths import path_problem
from ms_diffsynth.data.prompts import prompt_problem
from ms_diffsynth.errors import listing, nearest
from ms_diffsynth.formats.json_text import NotJSON, parse_json


class Wrong(Exception):
    """The text of a value does not fit; the message says what was expected."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of a section: ``kind`` is bool, int, float, str or tuple."""

    name: str
    section: str
    kind: type
    is_optional: bool
    default: Any
    metadata: Mapping[str, Any]

    def parse(self, written: Written) -> Any:
        """The value that is meant. Nothing is rounded, cut off or guessed. Raises: Wrong."""
        if self.kind is tuple and written.items is not None:
            if not all(isinstance(item, str) for item in written.items):
                raise Wrong(f"expected {_KINDS[self.kind]}")
            return written.items
        if written.text is None:
            hint = ": put it in quotes" if self.kind is str and written.items is not None else ""
            raise Wrong(f"expected {_KINDS[self.kind]}{hint}")
        if written.text in ("null", "~") and not written.is_quoted:
            if self.is_optional:
                return None
            if self.kind is tuple:
                return ()
            raise Wrong(f"expected {_KINDS[self.kind]}, not null")
        if written.is_quoted and self.kind not in (str, tuple):
            raise Wrong(f"expected {_KINDS[self.kind]}, not text in quotes")
        value = self._convert(written.text)
        if expected := self.expected(value, written.text):
            raise Wrong(expected)
        return value

    def _convert(self, text: str) -> Any:
        if self.kind is bool:
            if text.lower() not in ("true", "false"):
                raise Wrong("expected true or false")
            return text.lower() == "true"
        if self.kind in (int, float):
            try:
                return self.kind(text)
            except ValueError:  # also for more digits than Python converts
                raise Wrong(f"expected {_KINDS[self.kind]}{_whole(text) if self.kind is int else ''}") from None
        if self.kind is tuple:
            return _texts(text, self.metadata["has_commas"])
        choices = {choice.lower(): choice for choice in self.metadata["choices"]}
        return choices.get(text.lower(), text)

    def expected(self, value: Any, text: str | None = None) -> str:
        """What was expected when ``value`` is not allowed, else an empty string."""
        meta = self.metadata
        if meta["choices"] and value not in meta["choices"]:
            hint = nearest(value, meta["choices"])
            return f"expected one of {listing(meta['choices'], 20)}" + ("." + hint if hint else "")
        if meta["holds"]:
            items = value if self.kind is tuple else [value] if value else []
            if meta["holds"] == "path":
                return next((problem for item in items if (problem := path_problem(item))), "")
            texts = [text for item in items for text in (
                [item] if isinstance(item, str) else [item["prompt"], item.get("negative_prompt", "")])]
            return next((f"it {problem}" for text in texts if (problem := prompt_problem(text))), "")
        if self.kind not in (int, float) or not (wrong := out_of_range(value, meta["range"])):
            return ""
        return wrong + self._other_exponent(text or "")

    def _other_exponent(self, text: str) -> str:
        """1e4 where 1e-4 would do, or the reverse."""
        base, letter, exponent = text.lower().partition("e")
        if not letter:
            return ""
        other = f"{base}e{exponent[1:] if exponent.startswith('-') else '-' + exponent.lstrip('+')}"
        try:
            is_within = not out_of_range(self.kind(float(other)), self.metadata["range"])
            return f". Did you mean {other}?" if is_within else ""
        except (ValueError, OverflowError):
            return ""


def out_of_range(value: float, allowed: str) -> str:
    """What was expected of a number that is not finite, not within ``allowed`` ("0 < lr <= 0.1"), or 0 in float32, in
    which everything is computed, though not by itself; else an empty string."""
    words = allowed.split()  # ["0", "<", "lr", "<=", "0.1"], the first three of these, or []
    is_within = not words or _COMPARE[words[1]](float(words[0]), value)
    is_within &= len(words) < 5 or _COMPARE[words[3]](value, float(words[4]))
    if not is_within or not (isinstance(value, int) or math.isfinite(value)):
        return f"expected {allowed or 'a finite number'}"
    if words and float(words[0]) == 0 < value < SMALLEST:
        return f"expected {allowed}, and at least {SMALLEST}: what is smaller is 0 where it is computed with"
    return ""


SMALLEST = 1.2e-38  # of float32's normal numbers; devices take those below for 0
_COMPARE = {"<": operator.lt, "<=": operator.le}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}


def _whole(text: str) -> str:
    """A hint for a whole number that is written as another one."""
    try:
        value = float(text)
    except ValueError:
        return ""
    return f". Did you mean {int(value)}?" if math.isfinite(value) and value == int(value) else ""


def _texts(text: str, has_commas: bool) -> tuple[str, ...]:
    if text.lstrip().startswith("["):
        try:
            items = parse_json(text, list)
        except NotJSON:
            items = [None]
        if not all(isinstance(item, str) for item in items):
            raise Wrong('expected a JSON list of texts such as ["a", "b"]')
        return tuple(items)
    return tuple(t for part in (text.split(",") if has_commas else [text]) if (t := part.strip()))
