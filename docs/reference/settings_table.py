"""Writes the table of settings into docs/reference/settings.md: ``python docs/reference/settings_table.py``."""
from __future__ import annotations

from pathlib import Path

from ms_diffsynth.config import SECTIONS, SETTINGS
from ms_diffsynth.config.flags import default_of

PAGE = Path(__file__).with_name("settings.md")
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"


def table() -> str:
    """One Markdown table a section: every setting with its type, default, range and meaning."""
    parts = []
    for section, cls in SECTIONS.items():
        parts.append(f"## {section}\n\n{(cls.__doc__ or '').splitlines()[0]}\n\n"
                     "| setting | default | allowed | meaning |\n|---|---|---|---|\n")
        for name, setting in SETTINGS.items():
            if setting.section == section:
                meta = setting.metadata
                kind = {"bool": "true, false", "int": "whole number", "float": "number", "str": "text",
                        "tuple": "list of texts"}[setting.kind.__name__]
                choices = ", ".join(f"`{choice}`" for choice in meta["choices"])
                allowed = choices or (f"`{meta['range']}`" if meta["range"] else kind)
                parts.append(f"| `{name}` | `{default_of(name)}` | {allowed} | {meta['help']} |\n")
        parts.append("\n")
    return "".join(parts)


def page(text: str) -> str:
    """``text`` with the present table between its marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
