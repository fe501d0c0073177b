"""What mkdocs.yml adds to the pages of this folder: those that lie elsewhere in the repository, the navigation of
README.md's tables, and the reference of the public names.

The plugin i18n builds each language by itself: `page.zh.md` in place of `page.md`, and the English page where there is
none.
"""
from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"benchmarks/README.md": "benchmarks.md", "examples/emoji_flux/README.md": "emoji_flux.md"}
API = "reference/api.md"
PREFIX = {"en": "", "zh": "zh/"}  # of a language's pages in the site


def on_config(config: Any) -> Any:
    """Navigation: each table of docs/README.md is a section, its rows are the pages."""
    text = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    nav: list[dict[str, Any]] = [{"Home": "README.md"}]
    for heading, rows in re.findall(r"(?m)^\| ([\w ]+) \| \|\n\|---\|---\|\n((?:\|.*\n)+)", text):
        pages = [target for target in re.findall(r"\]\(([^)]+\.md)\)", rows) if not target.startswith("..")]
        nav.append({heading.capitalize(): [*pages, *([API] if heading == "reference" else [])]})
    config.nav = [*nav, {"Measured": list(ELSEWHERE.values())}]
    return config


@event_priority(-200)  # after the plugin i18n, which takes files of this folder alone
def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, the images beside them, and the reference of public names."""
    language = config.plugins["i18n"].current_language
    added = {API: api() if language == "en" else chinese_api()}
    for source, page in ELSEWHERE.items():
        added[page] = (ROOT / source).read_text(encoding="utf-8")
        added |= {image.name: image.read_bytes() for image in (ROOT / source).parent.rglob("*.png")}
    for name, content in added.items():
        file = File.generated(config, name, content=content)
        file.dest_uri = PREFIX[language] + file.dest_uri
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to pages that lie elsewhere to where they are in the site; other files are named, not linked."""
    own = PurePosixPath(next((source for source, moved in ELSEWHERE.items() if moved == page.file.src_uri),
                             f"docs/{page.file.src_uri}"))
    is_english = ".zh" not in own.suffixes
    language = config.plugins["i18n"].current_language

    def moved(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if target.startswith("http") or not target:
            return match[0]
        path = os.path.normpath(own.parent / target)
        place = ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None and mark and own.as_posix() in ELSEWHERE:
            place = PurePosixPath(path).name  # an image beside its page
        if place is None:
            return f"{text} (`{path}`)"
        translated = ROOT / "docs" / f"{place.removesuffix('.md')}.{language}.md"
        if anchor and is_english and translated.is_file():  # it takes the place of the page that is meant
            same = dict(zip(anchors(ROOT / "docs" / place), anchors(translated)))
            anchor = "#" + same.get(anchor[1:], anchor[1:])
        return f"{mark}[{text}]({os.path.relpath(place, PurePosixPath(page.file.src_uri).parent)}{anchor or ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", moved, markdown)


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    """The choice of language leads to the same page, also from the home page and from those that are added here."""
    language = config.plugins["i18n"].current_language
    place = page.url.removeprefix(PREFIX[language]).removeprefix("./")
    # as an attribute, as the plugin does: a template asks for it first
    config.extra.alternate = [other | {"link": PREFIX[other["lang"]] + place or "."}
                              for other in config.extra["alternate"]]
    return context


def anchors(page: Path) -> list[str]:
    """Of the headings of a page, in their order: as many in every language."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    return [slugify(case="lower")(heading, "-") for heading in re.findall(r"(?m)^#+ (.+)$", text)]


def public_names() -> dict[str, tuple[str, ...]]:
    """Module -> the public names in it, as `ms_diffsynth.__init__` lists them."""
    tree = ast.parse((ROOT / "ms_diffsynth/__init__.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_WHERE")


def api() -> str:
    """Every public name, by the module it is in, from its docstring."""
    parts = ["# Public names\n\nEach is imported from `ms_diffsynth`; the module is where it is defined.\n"]
    for module, names in public_names().items():
        parts.append(f"\n## {module}\n")
        parts += [f"\n::: ms_diffsynth.{module}.{name}\n" for name in names]
    return "".join(parts)


def chinese_api() -> str:
    """The same names; each leads to the English page, because docstrings are English."""
    parts = ["# 公开的类和函数\n\n都从 `ms_diffsynth` 导入。点击名称查看由 docstring 生成的英文说明。\n\n"
             "| 所在模块 | 名称 |\n|---|---|\n"]
    for module, names in public_names().items():
        links = [f'<a href="../../../reference/api/#ms_diffsynth.{module}.{name}">{name}</a>' for name in names]
        parts.append(f"| `{module}` | " + "、".join(links) + " |\n")
    return "".join(parts)
