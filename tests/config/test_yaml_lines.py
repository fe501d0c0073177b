"""Sections of a YAML file: texts and their lines, and nothing else."""
from __future__ import annotations

import pytest

from ms_diffsynth.config.yaml_lines import Written, read_sections
from ms_diffsynth.errors import ConfigError


def read(tmp_path, text):
    problems: list[str] = []
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = [(s, n, w) for s, n, w in read_sections(path, ("one", "two"), problems.append)]
    return found, [p.replace(str(tmp_path) + "/", "") for p in problems]


def test_values_keep_the_text_they_were_written_in(tmp_path):
    text = "one:\n  a: 1e-4\n  b: no\n  c: 010\n  d: '5'\n  e:\n  f: [x, 'y, z']\n  g: {h: 1}\ntwo:\n"
    found, problems = read(tmp_path, text)
    assert problems == []
    place = [f"in {tmp_path}/c.yaml line {k}" for k in range(2, 9)]
    assert found == [
        ("one", "a", Written(place=place[0], text="1e-4")), ("one", "b", Written(place=place[1], text="no")),
        ("one", "c", Written(place=place[2], text="010")),
        ("one", "d", Written(place=place[3], text="5", is_quoted=True)),
        ("one", "e", Written(place=place[4], text="null")), ("one", "f", Written(place=place[5], items=("x", "y, z"))),
        ("one", "g", Written(place=place[6], what="(a mapping)"))]


def test_what_stands_outside_of_a_section_has_none(tmp_path):
    found, problems = read(tmp_path, "a: 1\none:\n")
    assert [(s, n) for s, n, _ in found] == [(None, "a")] and problems == []


@pytest.mark.parametrize("text, problem", [
    ("twoo:\n  a: 1\n", "twoo in c.yaml line 1: expected one of the sections one, two. Did you mean 'two'?"),
    ("one:\n  a: 1\n  a: 2\n", "a in c.yaml line 3: it is set already in line 2. Keep one."),
    ("one: {}\ntwo: {}\none: {}\n", "one in c.yaml line 3: it is set already in line 1. Keep one."),
    ("- a\n", "c.yaml line 1: expected sections, each as 'name: value'."), ("text", "c.yaml line 1: expected sections"),
])
def test_problems_name_the_line(tmp_path, text, problem):
    assert read(tmp_path, text)[1][0].startswith(problem)


@pytest.mark.parametrize("text", ["", "# nothing\n", "one: {}\n", "one:\n"])
def test_empty_files_and_sections(tmp_path, text):
    assert read(tmp_path, text) == ([], [])


@pytest.mark.parametrize("text, message", [
    ("one:\n  a: [1\n", r"c.yaml line 3 is not YAML: expected"),
    ("one:\n\ta: 1\n", "c.yaml line 2 is not YAML: found char"),
    (b"\xff\xfe\x00", "c.yaml is not YAML"), ("a: *b\n", "c.yaml line 1 is not YAML: found undefined alias"),
    ("a: 1\n---\nb: 2\n", "c.yaml line 2 is not YAML: but found another document"),
])
def test_files_that_are_no_yaml(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            list(read_sections(path, (), lambda _: None))
