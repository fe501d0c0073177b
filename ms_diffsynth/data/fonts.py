"""A font that has the letters of a text: Pillow's own one has the Latin ones, a system may have the others, and the
extra [fonts] brings those of Chinese, Japanese and Korean.
"""
from __future__ import annotations

import importlib.util
import os
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

INSTALL = ("Install a font: for Chinese, Japanese and Korean pip install 'ms_diffsynth[fonts]', or the system's "
           "package fonts-noto-cjk.")

_FOLDERS = ("~/.fonts", "~/.local/share/fonts", "/usr/local/share/fonts", "/usr/share/fonts", "/usr/share/X11/fonts",
            "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")
_PACKAGE = "cvttf_NotoSansCJK_Regular"  # of the extra [fonts]: a folder with Noto Sans CJK
_LIKELY = ("notosanscjk", "notosans-regular", "sourcehansans", "wqy", "droidsansfallback", "dejavusans.", "simhei",
           "msyh", "pingfang", "unifont")  # parts of the names of files that are tried first, in this order
_MOST = 2000  # files that are looked at
_ABSENT = "\U0010fffe"  # no character: a font draws its box for it
_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")  # categories of what has no shape of its own
_SELECTORS = tuple(map(chr, range(0xFE00, 0xFE10)))  # such as that which makes a heart an emoji


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The first font that has every letter of ``text``: Pillow's own one, else one of the system's or of the extra
    [fonts]; None if none has.

    ``size``: of the letters, in pixels. Colours (of emoji) are not drawn, so their fonts do not count.
    """
    letters = "".join(sorted({c for c in text if unicodedata.category(c) not in _UNSEEN and c not in _SELECTORS}))
    own = ImageFont.load_default(size)
    if _has(own, letters):
        return own
    package = importlib.util.find_spec(_PACKAGE)
    folders = (*_FOLDERS, *(package.submodule_search_locations or () if package else ()))
    path = _file_with(letters, tuple(os.path.expanduser(folder) for folder in folders))
    return ImageFont.truetype(path, size) if path else None


@lru_cache(maxsize=64)
def _file_with(letters: str, folders: tuple[str, ...]) -> str | None:
    for path in _files(folders):
        try:
            if _has(ImageFont.truetype(path, 16), letters):
                return path
        except (OSError, ValueError):  # damaged, or bitmaps of another size
            continue
    return None


def _files(folders: tuple[str, ...]) -> Iterator[str]:
    found = [str(path) for folder in folders for path in sorted(Path(folder).rglob("*"))
             if path.suffix.lower() in (".ttf", ".ttc", ".otf")]

    def rank(path: str) -> int:
        name = os.path.basename(path).lower()
        return next((k for k, part in enumerate(_LIKELY) if part in name), len(_LIKELY))

    return iter(sorted(found, key=rank)[:_MOST])


def _has(font: ImageFont.FreeTypeFont, letters: str) -> bool:
    """Whether no letter is drawn as the box that stands for a letter that is not there."""
    box = _drawn(font, _ABSENT)
    return all(_drawn(font, letter) != box for letter in letters)


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
