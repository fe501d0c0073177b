"""Reading the rows of a data set from CSV, JSON, JSON lines, or a folder of pictures with caption files."""
from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field

from ..errors import DataError
from .images import SUFFIXES
from .paths import read_text, resolve

CAPTION_SUFFIXES = (".txt", ".caption")


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
        """Raise one DataError that names the first ten bad rows and counts them all."""
        if not self.problems:
            return
        bad = sorted(self.problems)
        lines = [f"  {self.places[i]}: {'; '.join(self.problems[i])}" for i in bad[:10]]
        more = [f"  and {len(bad) - 10} more"] if len(bad) > 10 else []
        raise DataError("\n".join([
            f"{len(bad)} of {len(self.rows)} rows of {self.source} cannot be used; every row must be sound:",
            *lines, *more, "Mend these rows or remove them, then start again.",
        ]))


def read_metadata(path: str) -> Table:
    """The rows of a .csv, .json (one list of objects) or .jsonl (one object a line) file, UTF-8 with or without BOM.

    Raises: DataError when the file as a whole cannot be read; single bad rows are noted in the table.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise DataError(f"{path} ends in '{suffix}'; expected .csv, .json or .jsonl. Convert or rename the metadata")
    table = Table(path)
    readers[suffix](read_text(path), table)
    return table


def read_folder(base: str, captions: bool = True) -> Table:
    """A row for every picture below ``base``, sorted: ``image`` and, with ``captions``, ``prompt`` from its sidecar.

    The sidecar of ``cat.png`` is ``cat.txt`` or ``cat.caption``. Names that begin with a dot are left out.
    """
    if not os.path.isdir(base):
        raise DataError(f"base_path={base} is not a folder; expected a folder of pictures. Correct base_path")
    table = Table(base)
    names = []
    for folder, folders, files in os.walk(base):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [
            os.path.relpath(os.path.join(folder, name), base)
            for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    for number, name in enumerate(sorted(names), 1):
        place = f"row {number} ({name})"
        try:
            table.add({"image": name, **({"prompt": _caption(base, name)} if captions else {})}, place)
        except DataError as error:
            table.add(None, place, str(error))
    return table


def _caption(base: str, name: str) -> str:
    stem = os.path.splitext(name)[0]
    found = [stem + suffix for suffix in CAPTION_SUFFIXES if os.path.lexists(os.path.join(base, stem + suffix))]
    if not found:
        raise DataError(
            f"the picture {name} has no caption file; expected {stem}.txt beside it. Write one, or pass captions=False "
            "to train without captions"
        )
    if len(found) > 1:
        raise DataError(f"the picture {name} has two caption files, {' and '.join(found)}. Remove one")
    return read_text(resolve(base, found[0])).strip()


def _read_csv(text: str, table: Table) -> None:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, start = None, 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, table.source)
                continue
            fits = len(cells) == len(header)
            table.add(
                dict(zip(header, cells)) if fits else None,
                f"row {len(table.rows) + 1} (line {line})",
                "" if fits else f"{len(cells)} cells {_short(cells)}; expected {len(header)} as in the header "
                f"{','.join(header)}. Put quotes around a cell that holds a comma",
            )
    except csv.Error as error:
        table.add(None, f"row {len(table.rows) + 1} (line {start})",
                  f"broken CSV ({error}); expected quotes in pairs and cells below 131072 characters")


def _checked_header(cells: list[str], source: str) -> list[str]:
    odd = sorted({name for name in cells if not name or name != name.strip() or cells.count(name) > 1})
    if odd:
        raise DataError(
            f"{source} line 1: the column names {odd} are empty, repeated or have spaces around them; "
            f"expected plain different names such as image,prompt. Correct the header {','.join(cells)}"
        )
    return cells


def _read_json(text: str, table: Table) -> None:
    try:
        rows = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{table.source} line {error.lineno} column {error.colno} is not JSON ({error.msg}); the file may be cut "
            "short. Expected a list of objects. Correct it there"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{table.source} is not usable JSON ({error}); expected a list of flat objects") from None
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
            row = json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            table.add(None, place, f"not JSON ({error}): {_short(content)}; expected one whole object on each line")
            continue
        _add_object(table, row, place)


def _add_object(table: Table, row: object, place: str) -> None:
    good = isinstance(row, dict)
    table.add(row if good else None, place, "" if good else
              f"a {type(row).__name__}, {_short(row)}; expected an object such as {{\"image\": \"a.png\"}}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
