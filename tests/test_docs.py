"""The documentation: links lead somewhere, pages that are named exist, installation says what setup.py says."""
from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"),
         *(ROOT / "examples").rglob("*.md")]
NAMED = [*PAGES, *(path for folder in ("ms_diffsynth", "tests", "examples", "benchmarks")
                   for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml"))]


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
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages == {target for target in re.findall(r"\]\(([^)]+)\)", index) if not target.startswith("../")}


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


def test_the_site_is_built_without_a_warning_and_asks_no_other_server(tmp_path):
    """Every link and anchor, by mkdocs' own check; every public name has its section."""
    import ms_diffsynth
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)], cwd=ROOT,
                          env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {p.relative_to(tmp_path).parent.as_posix(): p.read_text() for p in tmp_path.rglob("index.html")}
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md"))) + 3
    for name in set(ms_diffsynth.__all__) - {"StaticLossScaler"}:
        assert f".{name}\"" in pages["reference/api"], name
    asked = {address for text in pages.values() for address in re.findall(r'(?:src|href)="(https?://[^"]+)"', text)
             if not re.search(rf'<a [^>]*href="{re.escape(address)}"', text)}
    assert not asked
