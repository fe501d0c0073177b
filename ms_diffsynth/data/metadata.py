"""Reading the rows of a data set from CSV, JSON, JSON lines, or a folder of images with caption files."""
from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, listing
from .images import SUFFIXES
from .paths import LONGEST_TEXT, plain, read_text, resolve, shorten

logger = logging.getLogger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption")
DEEPEST = 100  # levels of brackets in a row


@dataclass
class Table:
    """Rows as they were read. An unreadable row is None and has a problem; ``places`` says where each row stands."""

    source: str
    rows: list[dict | None] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: dict[int, list[str]] = field(default_factory=dict)

    def add(self, row: dict | None, place: str, problem: str = "") -> None:
        """Append a row, with what is wrong with it."""
        self.rows.append(row)
        self.places.append(place)
        if problem:
            self.blame(len(self.rows) - 1, problem)

    def blame(self, index: int, problem: str) -> None:
        """Note what is wrong with row ``index``."""
        self.problems.setdefault(index, []).append(problem)

    def refuse_bad_rows(self) -> None:
        """Raise one DataError that names the first ten bad rows, three problems of each, and counts them all."""
        if not self.problems:
            return
        bad = sorted(self.problems)
        lines = []
        for i in bad[:10]:
            found = self.problems[i]
            tail = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            lines.append(f"  {self.places[i]}: {'; '.join(found[:3])}{tail}")
        more = [f"  and {len(bad) - 10} more"] if len(bad) > 10 else []
        raise DataError("\n".join([
            f"{len(bad)} of {len(self.rows)} rows of {self.source} cannot be used; every row must be sound:",
            *lines, *more, "Correct or remove these rows, then start again.",
        ]))


def read_metadata(path: str) -> Table:
    """The rows of a .csv, .json (one list of objects) or .jsonl (one object a line) file, UTF-8 with or without BOM.

    Raises: DataError when the file as a whole cannot be read; single bad rows are noted in the table.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise DataError(f"metadata_path={path} ends in '{suffix}'; expected .csv, .json or .jsonl. Convert or rename "
                        "the metadata")
    table = Table(path)
    readers[suffix](read_text(path), table)
    return table


def read_folder(base: str, captions: bool = True) -> Table:
    """A row for every image below ``base``, sorted: ``image`` and, with ``captions``, ``prompt`` from its sidecar.

    The sidecar of ``cat.png`` is ``cat.txt`` or ``cat.caption``. Names that begin with a dot are left out; a warning
    names what else is there and left out: other files, and folders that are links.
    """
    if not os.path.isdir(base):
        raise DataError(f"base_path={base} is not a folder; expected a folder of images. Correct base_path")
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}). Make it a readable folder, or remove it")

    table = Table(base)
    names, others = [], []
    for folder, folders, files in os.walk(base, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += [os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in files:
            if not name.startswith("."):
                (names if name.lower().endswith(SUFFIXES) else others).append(os.path.join(folder, name))
    names = sorted(os.path.relpath(name, base) for name in names)
    for number, name in enumerate(names, 1):
        place = f"row {number} ({plain(name, 200)})"
        try:
            table.add({"image": name, **({"prompt": _caption(base, name)} if captions else {})}, place)
        except DataError as error:
            table.add(None, place, str(error))
    sidecars = {os.path.splitext(name)[0] + suffix for name in names for suffix in CAPTION_SUFFIXES if captions}
    left = sorted(repr(name) for other in others if (name := os.path.relpath(other, base)) not in sidecars)
    if left:
        logger.warning("%s: neither images nor the captions of one, and not used: %s.", base, listing(left))
    return table


def _caption(base: str, name: str) -> str:
    stem = os.path.splitext(name)[0]
    found = [stem + suffix for suffix in CAPTION_SUFFIXES if os.path.lexists(os.path.join(base, stem + suffix))]
    if not found:
        raise DataError(
            f"the image {plain(name, 200)} has no caption file; expected {plain(stem, 200)}.txt beside it. Write "
            "one, or set instance_prompt, which serves images without a caption (captions=False of UnifiedDataset)"
        )
    if len(found) > 1:
        raise DataError(f"the image {plain(name, 200)} has two caption files, {' and '.join(map(plain, found))}. "
                        "Remove one")
    return read_text(resolve(base, found[0])).strip()


def _read_csv(text: str, table: Table) -> None:
    before = csv.field_size_limit(LONGEST_TEXT)  # of the whole process; other packages change it too
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = None
    try:
        while True:
            place = f"row {len(table.rows) + 1} (line {reader.line_num + 1})"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                table.add(None, place, f"broken CSV ({error}); expected quotes in pairs around whole cells")
                if header is None:
                    return
                continue
            if cells and header is None:
                header = cells
                odd = sorted({*(name for name in cells if not name or name != name.strip()), *_repeated(cells)})
                if odd:
                    raise DataError(
                        f"{table.source} line 1: the column names {shorten(odd)} are empty, repeated or have spaces "
                        "around them; expected plain different names such as image,prompt. Correct the header "
                        f"{plain(','.join(cells), 200)}"
                    )
            elif cells:
                fits = len(cells) == len(header)
                table.add(dict(zip(header, cells)) if fits else None, place, "" if fits else
                          f"{len(cells)} cells {shorten(cells)}; expected {len(header)} as in the header "
                          f"{plain(','.join(header), 200)}. Put quotes around a cell that holds a comma")
    finally:
        csv.field_size_limit(before)


def _read_json(text: str, table: Table) -> None:
    try:
        rows = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{table.source} line {error.lineno} column {error.colno} is not JSON ({error.msg}); the file may be cut "
            "short. Expected a list of objects. Correct it there"
        ) from None
    except RecursionError:
        raise DataError(f"{table.source} is not usable JSON (nested deeper than {DEEPEST} brackets); expected a list "
                        "of flat objects. Correct it") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{table.source} holds one {type(rows).__name__}; expected a list of objects, [{{\"image\": ...}}, ...]. "
            "Put brackets around it, or name the file .jsonl"
        )
    for number, row in enumerate(rows, 1):
        _add_object(table, row, f"row {number}")


def _read_jsonl(text: str, table: Table) -> None:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        place = f"row {len(table.rows) + 1} (line {line})"
        try:
            row = _DECODER.decode(content)
        except (json.JSONDecodeError, RecursionError) as error:
            table.add(None, place, f"not JSON ({error}): {shorten(content)}; expected one whole object on each line")
            continue
        _add_object(table, row, place)


def _add_object(table: Table, row: object, place: str) -> None:
    problem = _wrong_in(row)
    if not problem and not isinstance(row, dict):
        problem = f"a {type(row).__name__}, {shorten(row)}; expected an object such as {{\"image\": \"a.png\"}}"
    table.add(None if problem else row, place, problem)


class _Wrong(str):
    """Replaces, in a row, a value that Python reads as JSON although JSON does not have it; describes the value."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict | _Wrong:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    return _Wrong(f"{listing(map(shorten, _repeated(key for key, _ in pairs)))} comes twice. Remove one")


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _whole(digits: str) -> int | _Wrong:
    try:
        return int(digits)
    except ValueError:  # Python refuses more than 4300 digits, which take long
        return _Wrong(f"a number of {len(digits)} digits. Correct it")


def _decimal(digits: str) -> float | _Wrong:
    number = float(digits)
    return number if math.isfinite(number) else _Wrong(f"{shorten(digits)} is too large for a number. Correct it")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_whole, parse_float=_decimal,
                            parse_constant=lambda name: _Wrong(f"{name} is not a JSON number. Correct it"))


def _wrong_in(value: object, depth: int = 1) -> str:
    """The first thing that is wrong in a JSON value, or an empty string."""
    if isinstance(value, _Wrong):
        return str(value)
    if not isinstance(value, (dict, list)):
        return ""
    if depth > DEEPEST:
        return f"nested deeper than {DEEPEST} brackets; expected a flat object. Correct it"
    inner = value.values() if isinstance(value, dict) else value
    return next((problem for element in inner if (problem := _wrong_in(element, depth + 1))), "")
