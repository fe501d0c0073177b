"""docs/explanation/documents.md: its counts are those of its rows, and what it names exists."""
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/documents.md").read_text(encoding="utf-8")
KINDS = ("import", "substitution", "deviation")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def rows_of(part):
    return [cells(line) for line in part.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]


def test_the_counts_are_those_of_the_rows():
    top, *parts = re.split(r"(?m)^## ", PAGE)
    told = {name: [int(number) for number in numbers]
            for name, *numbers in (cells(line) for line in top.splitlines() if re.search(r"\| \d+ \|$", line))}
    found = {}
    for part in parts:
        rows = rows_of(part)
        kinds = [kind.split(":")[0] for _, _, kind in rows]
        assert rows and set(kinds) <= set(KINDS)
        found[part.splitlines()[0]] = [len(rows), *(kinds.count(kind) for kind in KINDS)]
    assert len(found) == 5
    found["all"] = [sum(numbers) for numbers in zip(*found.values())]
    assert told == found


def test_each_row_shows_what_it_says_and_each_deviation_has_its_reason():
    for part in re.split(r"(?m)^## ", PAGE)[1:]:
        for promise, shown, kind in rows_of(part):
            assert promise and shown
            assert re.fullmatch(r"import|substitution: .+|deviation: .+\]\(.+\)", kind), (promise, kind)


def test_what_it_names_exists():
    names = re.findall(r"`((?:tests|examples)/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(names) > 100
    for file, test in names:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
