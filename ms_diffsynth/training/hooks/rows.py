"""A CSV file of a hook, with a row for each step at which it was at work: written anew each time, read to resume."""
from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ms_diffsynth.storage.files import write_file


def write_rows(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the whole file. Raises: OutputError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(file, text.getvalue().encode())


def read_rows(file: Path, step: int) -> list[dict[str, float]]:
    """The rows up to ``step``, as numbers; none when there is no file."""
    if not file.is_file():
        return []
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file.open())]
    return [row | {"step": int(row["step"])} for row in rows if row["step"] <= step]
