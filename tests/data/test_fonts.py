"""Titles in any script: a font that has the letters, or a number; never the box that stands for what is not there."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from ms_diffsynth.data import fonts, grid
from ms_diffsynth.data.images import _wrapped

CHINESE = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
RUSSIAN = "\u043a\u043e\u0448\u043a\u0430"
PRIVATE = "\ue123\U0010fffd"  # no font draws these


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "_FOLDERS", ())
    monkeypatch.setattr(fonts, "_PACKAGE", "no_such_package")


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.parametrize("text, is_drawn", [
    ("a red cat, 3/4", True), ("", True), ("a red\ncat\u200b", True), (CHINESE, False), (RUSSIAN, False),
    (f"a {CHINESE}", False), ("\U0001f98b", False), (PRIVATE, False),
])
def test_letters_of_the_font_that_is_always_there(text, is_drawn):
    assert (fonts.font_for(text, 20) is not None) == is_drawn


@pytest.mark.usefixtures("no_fonts")
def test_a_title_without_a_font_is_its_number():
    images = [Image.new("RGB", (64, 64))] * 3
    sheet = grid(images, titles=["a cat", CHINESE, "a dog"])
    assert np.array_equal(np.asarray(sheet), np.asarray(grid(images, titles=["a cat", "prompt 2", "a dog"])))
    sheet, same = (grid([images, images], captions=["before", text]) for text in (CHINESE, "row 2"))
    assert np.array_equal(np.asarray(sheet), np.asarray(same))


def test_the_font_of_the_extra_is_found_without_one_of_the_system(tmp_path, monkeypatch):
    (package := tmp_path / "a_font").mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fonts, "_FOLDERS", ())
    monkeypatch.setattr(fonts, "_PACKAGE", "a_font")
    asked = []
    monkeypatch.setattr(fonts, "_file_with", lambda letters, folders: asked.append(folders))
    assert fonts.font_for(CHINESE, 20) is None and asked == [(str(package),)]


@pytest.mark.parametrize("text", [CHINESE, RUSSIAN, "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1"])
def test_a_font_of_this_system(text):
    font = fonts.font_for(text, 20)
    if font is None:
        pytest.skip("NOT TESTED, no font here has these letters")
    box = bytes(font.getmask("\U0010fffe"))
    assert all(bytes(font.getmask(letter)) != box for letter in text) and font.size == 20
    own = ImageFont.load_default(20)
    assert bytes(own.getmask(text[0])) == bytes(own.getmask("\U0010fffe")) and font.getname() != own.getname()


def test_the_files_of_a_folder_are_looked_through(tmp_path):
    """As if the font that is always there were one of the system's; damaged files are passed over."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "NotoSansCJK.ttc").write_bytes(b"no font")
    (tmp_path / "deep/a.ttf").write_bytes(ImageFont.load_default(16).path.getvalue())
    assert fonts._file_with("cat", (str(tmp_path),)) == str(tmp_path / "deep/a.ttf")
    assert fonts._file_with(CHINESE, (str(tmp_path),)) is None
    assert fonts._file_with("cat", (str(tmp_path / "nowhere"),)) is None


def test_likely_fonts_come_first(tmp_path):
    for name in ("a.ttf", "wqy-zenhei.ttc", "NotoSansCJK-Regular.otf", "readme.txt"):
        (tmp_path / name).touch()
    found = [path.rsplit("/", 1)[1] for path in fonts._files((str(tmp_path),))]
    assert found == ["NotoSansCJK-Regular.otf", "wqy-zenhei.ttc", "a.ttf"]


def test_lines_break_between_chinese_letters_and_at_spaces():
    font = ImageFont.load_default(20)
    lines = _wrapped(CHINESE * 9, 100, font).split("\n")
    assert len(lines) == 3 and all(0 < font.getlength(line) <= 100 for line in lines) and lines[-1].endswith("...")
    assert _wrapped("a red cat", 1000, font) == "a red cat"
    assert _wrapped(f"a {CHINESE[:2]} cat", 1000, font) == f"a {CHINESE[:2]} cat"
    assert "".join(_wrapped(CHINESE, 100, font).split("\n")) == CHINESE
