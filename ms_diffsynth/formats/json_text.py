"""The one reader of JSON that is not a data set's: config.json, tokenizers, indices, manifests, cases, flags.

Python reads more than JSON has (NaN, infinity), takes the last of two equal names, numbers without end, and brackets
until its stack is full. None of that is meant in a file of settings, so all of it is refused here, in one sentence.
"""
from __future__ import annotations

import json
import math
import os
import types
import typing
from collections import Counter
from typing import Any

from ms_diffsynth.data.paths import open_regular
from ms_diffsynth.errors import DataError, UserError, listing, shortened

DEEPEST = 100  # levels of brackets
MOST_DIGITS = 40  # the model_max_length of tokenizers that have none is 10 ** 30
MOST_BYTES = 1 << 27  # a tokenizer.json has 11 million

_KINDS = {dict: "an object {...}", list: "a list [...]"}


class NotJSON(ValueError):
    """Why a text is not the JSON that was expected: what follows its name in a sentence."""


def parse_json(text: str | bytes, kind: type | None = dict) -> Any:
    """The value of a JSON text.

    Args:
        kind: dict or list, what the value must be; None takes any.

    Raises: NotJSON for what is not UTF-8 or not JSON, for NaN and infinity, numbers of more than 40 digits, a name
        that comes twice in an object, brackets deeper than 100 levels, and another kind of value.
    """
    try:
        value = _DECODER.decode(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise NotJSON(f"is nested deeper than {DEEPEST} brackets") from None
    except UnicodeDecodeError as error:
        raise NotJSON(f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})") from None
    except json.JSONDecodeError as error:
        what = "is empty" if not text.strip() else f"is not JSON ({error})"
        raise NotJSON(what) from None
    if kind is not None and not isinstance(value, kind):
        raise NotJSON(f"holds {shown(value)}, expected {_KINDS[kind]}")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))]
        if not level:
            return value
    raise NotJSON(f"is nested deeper than {DEEPEST} brackets")


def read_json(path: str | os.PathLike[str], error: type[UserError], remedy: str, kind: type | None = dict,
              most: int = MOST_BYTES) -> Any:
    """The value in a JSON file, as `parse_json` reads it; ``error`` with the file's name and ``remedy`` otherwise.

    Args:
        most: bytes; a file is refused, unread, that has more.
    """
    try:
        with open_regular(os.fspath(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise NotJSON(f"has {size} bytes, expected at most {most}")
            return parse_json(file.read(), kind)
    except NotJSON as problem:
        raise error(f"{path} {problem}. {remedy}") from None
    except (DataError, OSError) as problem:
        raise error(f"{str(problem).partition('. ')[0]}. {remedy}") from None


def shown(value: Any) -> str:
    """A value as JSON writes it, the middle of a long one left out."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str), 80)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of an annotated type: int, float, bool, str, list, tuple, and unions of these."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, one) for one in inner)
    if hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float)
    if hint is int:
        return type(value) is int and value >= 0
    if hint in (bool, str):
        return type(value) is hint
    if hint in (list, tuple) or origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and len(inner) > 1 and ... not in inner and len(value) != len(inner):
            return False
        return not inner or all(is_of(item, inner[0]) for item in value)
    return True


def words_of(hint: Any) -> str:
    """An annotated type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words_of(one) for one in inner)
    if hint in (list, tuple) or origin in (list, tuple):
        count = f" of {len(inner)}" if origin is tuple and len(inner) > 1 and ... not in inner else ""
        return f"a list{count}"
    return {int: "a whole number from 0", float: "a number", bool: "true or false", str: "a text",
            type(None): "null"}.get(hint, "a value")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise NotJSON(f"names {listing(twice)} twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise NotJSON(f"holds a number of {len(digits)} digits, expected at most {MOST_DIGITS}")
    return int(digits)


def _decimal(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise NotJSON(f"holds the number {shortened(digits, 60)}, which is too large")
    return number


def _constant(name: str) -> Any:
    raise NotJSON(f"holds {name}, which is not a number in JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_whole, parse_float=_decimal, parse_constant=_constant)
