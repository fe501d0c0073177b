"""docs/reference/faults.md is the index of the suite: its rows name marked tests, and no test is left out."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs/reference/faults.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines()
        if re.match(r"\| [A-Z]\d+[a-z]? \|", line)]
# how many kinds of faults each area has
AREAS = {"K": 12, "L": 8, "R": 9, "D": 12, "C": 6, "N": 3, "S": 10, "P": 5, "B": 3}


def named(row: list[str]) -> list[str]:
    return re.findall(r"`([\w/]+\.py::\w+)`", row[3])


def mentions(node: ast.AST, mark: str) -> bool:
    return any(isinstance(part, ast.Attribute) and part.attr == mark for part in ast.walk(node))


def marked(path: Path) -> set[str]:
    """The tests of a file that are marked fault."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_whole = any(isinstance(node, ast.Assign) and mentions(node, "fault") and
                   [getattr(target, "id", "") for target in node.targets] == ["pytestmark"] for node in tree.body)
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            and (is_whole or any(mentions(decorator, "fault") for decorator in node.decorator_list))}


FILES = [path for path in sorted(TESTS.rglob("test_*.py")) if path != Path(__file__)]
MARKED = {f"{path.relative_to(TESTS).as_posix()}::{name}" for path in FILES for name in marked(path)}


def test_every_row_is_there_once_and_names_a_test():
    ids = [row[0] for row in ROWS]
    assert ids == sorted(set(ids), key=lambda i: (list(AREAS).index(i[0]), int(re.sub(r"\D", "", i)), i))
    kinds = {f"{area}{number}" for area, count in AREAS.items() for number in range(1, count + 1)}
    assert {re.sub(r"[a-z]$", "", i) for i in ids} == kinds
    assert len(ids) >= 60 and f"{len(ids)} rows" in TEXT
    assert all(len(row) == 4 and all(row) and named(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_a_row_names_is_there_and_marked(row):
    assert not [test for test in named(row) if test not in MARKED], "not there, or not marked fault"


def test_every_marked_test_is_in_a_row():
    assert not MARKED - {test for row in ROWS for test in named(row)}


def test_no_test_that_must_be_alone_is_run_by_the_suite():
    """``-m fault`` takes the place of the ``-m`` in pyproject.toml, which leaves these out."""
    alone = [path for path in FILES if mentions(ast.parse(path.read_text(encoding="utf-8")), "alone")]
    assert alone and not [path for path in alone if marked(path)]
