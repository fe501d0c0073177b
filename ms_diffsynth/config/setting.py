"""One setting: what its text means, what is allowed, and how it is written to a file."""
from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ms_diffsynth.config.yaml_lines import Written
from ms_diffsynth.errors import listing, nearest


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
            return written.items
        if written.text is None:
            hint = ": put it in quotes" if self.kind is str and written.items is not None else ""
            raise Wrong(f"expected {_KINDS[self.kind]}{hint}")
        if written.text in ("null", "~") and not written.is_quoted:
            if self.is_optional:
                return None
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
            except ValueError:
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
        if self.kind not in (int, float) or self._is_within(value):
            return ""
        return f"expected {meta['range'] or 'a finite number'}" + self._other_exponent(text or "")

    def _is_within(self, value: float) -> bool:
        words = self.metadata["range"].split()  # ["0", "<", "lr", "<=", "0.1"], the first three of these, or []
        above = not words or _COMPARE[words[1]](float(words[0]), value)
        below = len(words) < 5 or _COMPARE[words[3]](value, float(words[4]))
        return above and below and (isinstance(value, int) or math.isfinite(value))

    def _other_exponent(self, text: str) -> str:
        """1e4 where 1e-4 would do, or the reverse."""
        base, letter, exponent = text.lower().partition("e")
        if not letter:
            return ""
        other = f"{base}e{exponent[1:] if exponent.startswith('-') else '-' + exponent.lstrip('+')}"
        try:
            return f". Did you mean {other}?" if self._is_within(float(other)) else ""
        except ValueError:
            return ""


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
            items = json.loads(text)
        except ValueError:
            items = [None]
        if not all(isinstance(item, str) for item in items):
            raise Wrong('expected a JSON list of texts such as ["a", "b"]')
        return tuple(items)
    return tuple(t for part in (text.split(",") if has_commas else [text]) if (t := part.strip()))
