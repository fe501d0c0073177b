"""The documentation: links lead somewhere, pages and commands that are named exist, installation says what setup.py
says, and the Chinese pages say what the English ones do.
"""
from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from ms_diffsynth.cli.main import COMMANDS, parser

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"),
         *(ROOT / "examples").rglob("*.md")]
NAMED = [*PAGES, *(path for folder in ("ms_diffsynth", "tests", "examples", "benchmarks")
                   for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml"))]

CHINESE = sorted(page for page in PAGES if page.name.endswith(".zh.md"))
ENGLISH_ONLY = {  # what is looked up rather than followed
    "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/contributing/extending.md",
    "docs/explanation/ascend.md", "docs/explanation/design.md", "docs/explanation/documents.md",
    "docs/explanation/parity.md", "docs/how_to/autoencoder.md", "docs/how_to/editing.md",
    "docs/how_to/evaluation.md",
    "docs/how_to/publishing.md", "docs/how_to/replay.md", "docs/how_to/unconditional.md",
    "docs/reference/checkpoints.md", "docs/reference/errors.md", "docs/reference/faults.md",
    "docs/reference/interchange.md", "docs/reference/memory.md", "docs/reference/optimizers.md",
    "docs/reference/settings.md", "examples/data/SOURCES.md", "examples/data/photo_tiles64/SOURCES.md",
    "examples/emoji_flux/README.md", "examples/emoji_flux/model_card.md", "examples/flux2/templates/README.md"}
# those whose inline `--flags` are our own alone
PRACTICAL = [*(ROOT / "docs/families").glob("*.md"), *(ROOT / "docs/get_started").glob("install*.md"),
             *(ROOT / "docs/how_to").glob("troubleshooting*.md"), *(ROOT / "docs/how_to").glob("split_training*.md")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page, by GitHub's rule: a heading in lower case, without punctuation, blanks as hyphens."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"(?m)^#+ (.+)$", text)}


def test_every_link_leads_somewhere():
    lost = []
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            path = (page.parent / target).resolve() if target else page
            if not target.startswith("https://") and not (path.exists() and (not anchor or anchor in anchors(path))):
                lost.append(f"{name(page)}: {target}#{anchor}")
    assert not lost


def test_every_page_that_is_named_exists():
    lost = []
    for path in NAMED:
        text = path.read_text(encoding="utf-8")
        for page, anchor in re.findall(r"(?<![\w/])(docs/[\w/]+\.(?:md|py))(?:#([\w-]+))?", text):
            if not (ROOT / page).is_file() or (anchor and anchor not in anchors(ROOT / page)):
                lost.append(f"{name(path)}: {page}#{anchor}")
    assert not lost


def test_every_page_is_in_the_index():
    there = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    chinese = {page for page in there if page.endswith(".zh.md")}
    english = there - chinese - {"README.md"}
    best = {page.replace(".md", ".zh.md") if page.replace(".md", ".zh.md") in chinese else page for page in english}
    for index, pages in ("README.md", english), ("README.zh.md", best):
        text = (ROOT / "docs" / index).read_text(encoding="utf-8")
        assert pages == {target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("../")}, index


def test_the_table_of_extras_and_of_versions_is_that_of_setup():
    text = (ROOT / "docs/get_started/install.md").read_text(encoding="utf-8")
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords
             if k.arg in ("extras_require", "install_requires", "python_requires")}
    extras = {extra: {re.split("[=<>]", package)[0] for package in packages}
              for extra, packages in given["extras_require"].items()}
    rows = dict(re.findall(r"(?m)^\| `\.\[(\w+)\]` \| ([^|]+) \|", text))
    assert {extra: set(packages.strip().split(", ")) for extra, packages in rows.items()} == extras
    needs = dict(re.split("(?=[=<>])", package, maxsplit=1) for package in given["install_requires"]
                 if re.search("[=<>]", package))
    table = re.findall(r"(?m)^\| .*\| ([\d., ]+) \| ([\d.]+) to ([\d.]+) \| ([\d.]+) \| (\d)\.x \|$", text)
    assert len(table) == 2  # with an Ascend and without
    for pythons, least, most, mindone, numpy in table:
        minors = [int(version.split(".")[1]) for version in pythons.split(", ")]
        assert given["python_requires"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
        assert minors == list(range(minors[0], minors[-1] + 1))
        assert needs["mindspore"] == f">={least},<2.{int(most.split('.')[1]) + 1}"
        tried = re.findall(r"(?m)^    python3 -m venv \S+ && \S+ install .* 'mindspore==2\.(\d+)\.\d+'$", text)
        assert list(map(int, tried)) == list(range(int(least.split(".")[1]), int(most.split(".")[1]) + 1))
        assert needs["mindone"] == f"=={mindone}" and needs["numpy"] == f"<{int(numpy) + 1}"


def text_and_code(page: Path) -> tuple[str, list[str]]:
    """A page without its blocks of code; and these, as lines."""
    text = page.read_text(encoding="utf-8")
    fenced = [line for block in re.findall(r"(?ms)^```.*?^```$", text) for line in block.splitlines()]
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return re.sub(r"(?m)^ {4,}\S.*$", "", text), [*fenced, *re.findall(r"(?m)^ {4,}(\S.*)$", text)]


def test_every_page_is_there_in_chinese_or_listed_as_english_only():
    english = {name(page) for page in set(PAGES) - set(CHINESE)}
    translated = {name(page).replace(".zh.md", ".md") for page in CHINESE}
    assert translated <= english  # none is left of a page that went
    assert sorted(english - translated) == sorted(ENGLISH_ONLY)


@pytest.mark.parametrize("page", CHINESE, ids=name)
def test_a_chinese_page_has_what_the_english_one_has(page):
    """As many headings of each level, the same commands and code, the same names, the same numbers in tables."""
    english, code = text_and_code(page.with_name(page.name.replace(".zh.md", ".md")))
    chinese, same_code = text_and_code(page)
    assert code == same_code
    titles = [re.findall(r"(?m)^(#+) (.+)$", text) for text in (english, chinese)]
    levels = [[level for level, _ in found] for found in titles]
    assert levels[0] == levels[1], titles
    names = [set(re.findall(r"`([^`\n]+)`", text)) for text in (english, chinese)]
    assert names[0] == names[1]
    rows = [re.findall(r"(?m)^\|.*\|$", text) for text in (english, chinese)]
    assert len(rows[0]) == len(rows[1])
    numbers = [[sorted(re.findall(r"\d+(?:\.\d+)?", row)) for row in found] for found in rows]
    assert page.name == "README.zh.md" or numbers[0] == numbers[1]


def test_a_chinese_page_leads_to_chinese_pages_where_there_are_any():
    lost = []
    for page in CHINESE:
        text = page.read_text(encoding="utf-8").replace("[English](README.md)", "")
        for target in re.findall(r"\]\(([^)#]+\.md)", text):
            if not target.startswith("https://") and (page.parent / target.replace(".md", ".zh.md")).exists():
                lost.append(f"{name(page)}: {target}")
    assert not lost


def test_every_command_of_a_page_is_one_that_exists():
    """Command and flags are known to the parser of the command line, and values are of the right kind."""
    wrong, count = [], 0
    for page in set(PAGES) - set(CHINESE):
        for line in "\n".join(text_and_code(page)[1]).replace("\\\n", " ").splitlines():
            line = re.split(r"\s{3,}|\s+# ", line.replace(" RUN STEP", " RUN 1"))[0]
            for part in re.split(r" && | -- (?=ms-diffsynth )", line):
                words = re.fullmatch(r"(?:\w+=\S+ )*(?:\S*/)?ms-diffsynth (.+)", part)
                if not words or "..." in line or words[1] == "launch":
                    continue
                count += 1
                try:
                    parser(words[1].split()[0]).parse_args(shlex.split(words[1]))
                except Exception as error:
                    wrong.append(f"{name(page)}: {part}: {error}")
    assert not wrong and count > 100


@pytest.mark.parametrize("page", PRACTICAL, ids=name)
def test_every_command_and_flag_in_a_sentence_exists(page):
    known = {flag for command in COMMANDS for flag in flags_of(parser(command).inner)}
    spans = re.findall(r"`([^`\n]+)`", text_and_code(page)[0])
    assert not {span for span in spans if span.startswith("ms-diffsynth ") and span.split()[1] not in COMMANDS}
    ours = [span for span in spans if span.startswith(("--", "ms-diffsynth "))]
    assert not {flag for span in ours for flag in re.findall(r"(?<!\S)--\w[\w-]*", span)} - known


def flags_of(command: argparse.ArgumentParser) -> set[str]:
    """Every flag of a command, and of the commands below it."""
    found = set(command._option_string_actions)
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for below in action.choices.values() for flag in flags_of(below)}
    return found


def test_the_table_of_cann_is_what_mindspore_lists():
    file = Path(importlib.util.find_spec("mindspore").submodule_search_locations[0]) / "run_check/_check_version.py"
    accepted = re.search(r"class AscendEnvChecker.*?self\.version = (\[.*?\])", file.read_text(), re.DOTALL)[1]
    version = ".".join(importlib.metadata.version("mindspore").split(".")[:2])
    page = (ROOT / "docs/get_started/install_ascend.md").read_text(encoding="utf-8")
    row = re.search(rf"(?m)^\| {re.escape(version)}\.0 \| ([\d., ]+) \|$", page)
    assert row[1].split(", ") == ast.literal_eval(accepted)


def test_the_site_is_built_without_a_warning_and_asks_no_other_server(tmp_path):
    """Every link and anchor, by mkdocs' own check; every public name has its section."""
    import ms_diffsynth
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)], cwd=ROOT,
                          env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {p.relative_to(tmp_path).parent.as_posix(): p.read_text() for p in tmp_path.rglob("index.html")}
    english = {page for page in pages if page.partition("/")[0] != "zh"}
    sources = set((ROOT / "docs").rglob("*.md")) - set(CHINESE)
    assert len(english) == len(sources) + 3  # the reference of names, and two pages from elsewhere
    assert {f"zh/{page}".removesuffix("/.") for page in english} == set(pages) - english
    for page, text in pages.items():
        assert f'<html lang="{"en" if page in english else "zh"}"' in text, page
        places = [os.path.normpath(f"{page}/{link}") for link in re.findall(r'<a href="([^"]*)" hreflang=', text)]
        bare = page.removeprefix("zh").strip("/") or "."
        assert places == [bare, os.path.normpath(f"zh/{bare}")], page
    assert "安装" in pages["zh/get_started/install"] and "安装" not in pages["get_started/install"]
    for name in set(ms_diffsynth.__all__) - {"StaticLossScaler"}:
        assert f".{name}\"" in pages["reference/api"], name
    asked = {address for text in pages.values() for address in re.findall(r'(?:src|href)="(https?://[^"]+)"', text)
             if not re.search(rf'<a [^>]*href="{re.escape(address)}"', text)}
    assert not asked
