"""What mkdocs.yml adds to the pages of this folder: those that lie elsewhere in the repository, the navigation of
README.md's tables, and the reference of the public names.
"""
from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"benchmarks/README.md": "benchmarks.md", "examples/emoji_flux/README.md": "emoji_flux.md"}
API = "reference/api.md"


def on_config(config: Any) -> Any:
    """Navigation: each table of docs/README.md is a section, its rows are the pages."""
    text = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    nav: list[dict[str, Any]] = [{"Home": "README.md"}]
    for heading, rows in re.findall(r"(?m)^\| ([\w ]+) \| \|\n\|---\|---\|\n((?:\|.*\n)+)", text):
        pages = [target for target in re.findall(r"\]\(([^)]+\.md)\)", rows) if not target.startswith("..")]
        nav.append({heading.capitalize(): [*pages, *([API] if heading == "reference" else [])]})
    config.nav = [*nav, {"Measured": list(ELSEWHERE.values())}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, the images beside them, and the reference of public names."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
        for image in (ROOT / source).parent.glob("*.png"):
            files.append(File.generated(config, image.name, content=image.read_bytes()))
    files.append(File.generated(config, API, content=api()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to pages that lie elsewhere to where they are in the site; other files are named, not linked."""
    own = PurePosixPath(next((source for source, moved in ELSEWHERE.items() if moved == page.file.src_uri),
                             f"docs/{page.file.src_uri}"))

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
        return f"{mark}[{text}]({os.path.relpath(place, PurePosixPath(page.file.src_uri).parent)}{anchor or ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", moved, markdown)


def api() -> str:
    """Every public name, by the module it is in; `ms_diffsynth.__init__` lists them."""
    tree = ast.parse((ROOT / "ms_diffsynth/__init__.py").read_text(encoding="utf-8"))
    where = next(ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_WHERE")
    parts = ["# Public names\n\nEach is imported from `ms_diffsynth`; the module is where it is defined.\n"]
    for module, names in where.items():
        parts.append(f"\n## {module}\n")
        parts += [f"\n::: ms_diffsynth.{module}.{name}\n" for name in names]
    return "".join(parts)
