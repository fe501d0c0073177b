"""Odd metadata: every wrong row is named by its number, in one message, at once, before a model is read. What is not
wrong is taken to the letter."""
from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.data import Loader, LoadImage, ToAbsolutePath, UnifiedDataset
from ms_diffsynth.errors import DataError

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("not_for_ever")]


@pytest.fixture
def folder(tmp_path):
    """Three pictures, and beside the folder a picture and a secret that no row may reach."""
    base = tmp_path / "set"
    (base / "sub").mkdir(parents=True)
    (tmp_path / "set2").mkdir()
    for place in ("set/0.png", "set/1.png", "set/sub/2.png", "set2/0.png", "outside.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / place)
    (tmp_path / "secret.txt").write_text("the secret")
    (base / "link.png").symlink_to("../outside.png")
    (base / "inside.png").symlink_to("sub/2.png")
    (base / "folder").symlink_to("..")
    (base / "loop.png").symlink_to("loop.png")
    os.mkfifo(base / "pipe.png")
    return base


def csv(*rows):
    return "\n".join(["image,prompt", "0.png,zero", *rows, ""])


def jsonl(*rows):
    return "\n".join(['{"image": "0.png", "prompt": "zero"}', *rows, ""])


def listed(*rows):
    return "[" + ",\n".join(['{"image": "0.png", "prompt": "zero"}', *rows]) + "]"


def row(prompt="a", image="1.png", **more):
    return json.dumps({"image": image, "prompt": prompt, **more})


def nested(levels):
    """A row of so many brackets."""
    return '{"image": "1.png", "prompt": "a", "x": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


def sparse(path):
    path.write_text(csv())
    os.truncate(path, 1 << 40)


MEGABYTE = "a cat " * 170_000
MANY = [f"{k % 2}.png,row {k}" if k % 20 else f"no{k}.png,row {k}" for k in range(10_000)]
TOO_LONG = "has 1020000 characters; expected at most 10000", "Shorten it"
NO_TEXT = "control characters or half a pair", "Remove them"
NO_NAME = "is not a file name", "in UTF-8 and without control characters. Correct it"
LEAVES = "leaves the data folder", "Move the file into the folder"
REGULAR = "expected a regular file. Name a file"

# what is wrong -> (file name, its content or what makes it at a path, what the message says)
REFUSED = {
    # bytes and letters
    "not UTF-8": ("m.csv", csv("1.png,f\xfcr", "1.png,ja", "1.png,na\xefve").encode("latin-1"),
                  "line 3 is not UTF-8 (byte 0xfc at offset 31); the same in line 5", "Save the file as UTF-8"),
    "mark and not UTF-8": ("m.csv", b"\xef\xbb\xbf" + csv("1.png,f\xfcr").encode("latin-1"),
                           "line 3 is not UTF-8 (byte 0xfc at offset 34). Save"),
    "UTF-16": ("m.csv", csv().encode("utf-16"), "line 1 is not UTF-8 (byte 0xff", "Save the file as UTF-8"),
    "UTF-16 without mark": ("m.csv", csv().encode("utf-16-le"), "line 1 holds a NUL", "Save the file as plain UTF-8"),
    "NUL": ("m.csv", csv("1.png,a\0b", "1.png,a", "1.png,\0"), "line 3 holds a NUL character; the same in line 5"),
    "NUL in JSON": ("m.jsonl", jsonl(row("a\0b")), r"row 2 (line 2): prompt='a\x00b' holds U+0000", *NO_TEXT),
    "megabyte": ("m.csv", csv(f"1.png,{MEGABYTE}", "9.png,"), "row 2 (line 3): prompt='a cat a cat", *TOO_LONG,
                 "row 3 (line 4): image='9.png'"),
    "megabyte in JSON": ("m.jsonl", jsonl(row(MEGABYTE), row(None)), "row 2 (line 2): prompt='a cat a cat", *TOO_LONG,
                         "row 3 (line 3): no prompt. Write one, or set instance_prompt"),
    "control": ("m.csv", csv("1.png,\a\x1b[2J", "1.png,a\x7f", "1.png,a\x85b"), "3 of 4 rows",
                "row 2 (line 3): prompt='\\x07\\x1b[2J' holds U+0007, U+001B", "U+007F", "U+0085", *NO_TEXT),
    "half pairs": ("m.jsonl", jsonl(row("\ud83d"), row(image="\udc80.png"), row(image="\ud83d.png")), "3 of 4 rows",
                   r"row 2 (line 2): prompt='\ud83d' holds U+D83D", *NO_TEXT, r"row 3 (line 3): image='\udc80.png'",
                   r"row 4 (line 4): image='\ud83d.png'", *NO_NAME),
    # the table
    "no image": ("m.csv", "picture,prompt\n0.png,a\n", "has no column image; it has picture, prompt",
                 "Name the column of the images by image_column, for example image_column=picture"),
    "no prompt": ("m.csv", "image,title\n0.png,a\n", "has no column prompt; it has image, title",
                  "Name the column of the prompts by caption_column, or set instance_prompt"),
    "two prompts": ("m.csv", "image,text,caption\n0.png,a,b\n", "has the columns text, caption, each of which may be",
                    "Say which by caption_column, for example caption_column=text"),
    "semicolons": ("m.csv", "image;prompt\n0.png;a\n", "has no column image, prompt; it has image;prompt"),
    "header twice": ("m.csv", "image,prompt,image\n0.png,a,1.png\n", "line 1", "['image'] are empty, repeated"),
    "header of blanks": ("m.csv", "image, prompt,\n0.png,a,b\n", "line 1", "['', ' prompt'] are empty", "Correct the"),
    "header of 1 MB": ("m.csv", MEGABYTE + "\n", "line 1: the column names ['a cat a cat", "...", "Correct the header"),
    "column of 1 MB": ("m.csv", f"images,{MEGABYTE}a\n0.png,a\n", "has no column image, prompt; it has images, 'a cat",
                       "Did you mean 'images'?"),
    "ragged": ("m.csv", csv("1.png", "1.png,a,b", "1.png,a", ",,,"), "3 of 5 rows", "row 2 (line 3): 1 cells ['1.png']",
               "row 3 (line 4): 3 cells", "row 5 (line 6): 4 cells", "Put quotes around a cell that holds a comma"),
    "quotes": ("m.csv", csv('1.png,"a" cat', "9.png,", '1.png,"a', "1.png,b"), "3 of 4 rows", "row 2 (line 3): broken",
               "row 3 (line 4): image='9.png'", "row 4 (line 5): broken CSV (unexpected end of data)"),
    "empty file": ("m.csv", "", "has zero bytes"),
    "header only": ("m.csv", "image,prompt\n", "is an empty data set: it has no rows", "Add some"),
    "mark only": ("m.csv", "\ufeff", "is an empty data set", "Add some"),
    "blank lines": ("m.jsonl", "\n \n\n", "is an empty data set", "Add some"),
    "empty list": ("m.json", "[]", "is an empty data set", "Add some"),
    "all rows": ("m.csv", "image,prompt\n2.png,\n3.png,b\n", "2 of 2 rows", "row 1 (line 2): image='2.png': ",
                 "row 2 (line 3): image='3.png'"),
    "10000 rows": ("m.csv", csv(*MANY), "500 of 10001 rows", "row 2 (line 3): image='no0.png'", "row 182 (line 183)",
                   "  and 490 more\n", "Correct or remove these rows"),
    # JSON
    "null": ("m.jsonl", jsonl(row(None), row(image=None), row(image=[]), row(image=["0.png", None]), "null"),
             "5 of 6 rows", "row 2 (line 2): no prompt. Write one, or set", "row 3 (line 3): image=None is empty",
             "row 4 (line 4): image=[] is empty", "row 5", "row 6 (line 6): a NoneType, None; expected an object"),
    "types": ("m.json", listed(row(3), row(["a"]), row(image=3), row(image={"a": 1}), "[1]", row(True, [["0.png"]])),
              "6 of 7 rows", "row 2: prompt=3 is of type int", "row 3: prompt=['a'] is of type list",
              "row 4: image=3: 3 is not a file name", "row 5: image={'a': 1}", "row 6: a list, [1]; expected an object",
              "row 7: prompt=True is of type bool"),
    "NaN": ("m.json", listed(row(x=[float("nan")]), row(x={"y": float("-inf")}), row(x=1).replace("1}", "1e999}")),
            "3 of 4 rows", "row 2: NaN is not a JSON number", "row 3: -Infinity is not", "row 4: '1e999' is too large"),
    "key missing": ("m.jsonl", jsonl('{"image": "1.png"}', '{"prompt": "a"}', row(seed=1)), "3 of 4 rows",
                    "row 2 (line 2): no prompt. Write one", "; no seed, which other rows have. Add it",
                    "row 3 (line 3): no image, seed, which other rows have"),
    "key twice": ("m.json", listed('{"image": "1.png", "prompt": "a", "image": "0.png"}', row(image="9.png")),
                  "2 of 3 rows", "row 2: 'image' comes twice. Remove one", "row 3: image='9.png'"),
    "deep": ("m.jsonl", jsonl(nested(101), nested(100_000), row(None)), "3 of 4 rows", "row 2 (line 2): nested deeper",
             "row 3 (line 3): not JSON", "row 4 (line 4): no prompt"),
    "deep in JSON": ("m.json", listed(nested(101), nested(900), row(None)), "3 of 4 rows", "row 2: nested deeper than",
                     "row 3: nested deeper than 100 brackets; expected a flat object", "row 4: no prompt"),
    "deepest": ("m.json", "[" * 1_000_000, "is not usable JSON (nested deeper than 100 brackets)"),
    "digits": ("m.jsonl", jsonl(row(x=1).replace("1}", "1" * 1_000_000 + "}"), row(None)), "2 of 3 rows",
               "row 2 (line 2): a number of 1000000 digits", "row 3"),
    "digits in JSON": ("m.json", listed(row(), row(x=1).replace("1}", "1" * 1_000_000 + "}")), "1 of 3 rows",
                       "row 3: a number of 1000000 digits. Correct it"),
    "cut": ("m.jsonl", jsonl(row(), row()[:20])[:-1], "row 3 (line 3): not JSON (Unterminated string", "one whole"),
    "cut in JSON": ("m.json", listed(row())[:60], "line 2 column 20 is not JSON (Unterminated", "may be cut short"),
    "object": ("m.json", row(), "holds one dict; expected a list of objects", "Put brackets around it"),
    # the file itself
    "folder": ("m.csv", Path.mkdir, "m.csv is a folder", REGULAR),
    "pipe": ("m.csv", os.mkfifo, "m.csv is a named pipe", REGULAR),
    "device": ("m.csv", lambda path: path.symlink_to("/dev/zero"), "m.csv is a device", REGULAR),
    "terabyte": ("m.csv", sparse, "m.csv has 1099511627776 bytes; expected at most 1073741824"),
    "absent": ("m.csv", lambda path: None, "m.csv does not exist. Put the file there, or correct its name"),
    "loop": ("m.csv", lambda path: path.symlink_to(path), "m.csv cannot be opened"),
    "other kind": ("m.tsv", csv(), "ends in '.tsv'; expected .csv, .json or .jsonl. Convert or rename"),
}
# the name of a picture -> what the message says
PATHS = {
    **dict.fromkeys(["../secret.txt", "../../../../../../../etc/passwd", "/etc/passwd", "//etc//passwd", "..", ".",
                     "sub/../../outside.png", "folder/outside.png", "../set2/0.png", "link.png",
                     "/proc/self/environ"], LEAVES),
    **dict.fromkeys(["file:///etc/passwd", "http://127.0.0.1/a.png", "data:image/png;base64,iVBO"],
                    ("is a URL", "Download it and name the local file")),
    **dict.fromkeys(["a\0.png", "0.png\n", "\x1b[2J.png", "\x85.png", "a/" * 3000, "a" * 1_000_000], NO_NAME),
    **dict.fromkeys(["~/a.png", "$HOME/a.png", "%2e%2e/outside.png"], ("does not exist. Put the file there",)),
    **dict.fromkeys(["sub\\2.png", "C:\\pictures\\0.png"], ("a \\ is a part of a name here. Write / between",)),
    **dict.fromkeys(["0.png/", "loop.png"], ("cannot be opened", "Make it a readable regular file")),
    "sub": ("is a folder", REGULAR), "sub/": ("is a folder", REGULAR), "pipe.png": ("is a named pipe", REGULAR),
    "a" * 300 + ".png": ("File name too long", "Make it a readable"), "": ("is empty; expected the name of a file",),
}


def sound(err):
    """What is printed is short, and cannot play tricks on a terminal."""
    return len(err) < 8000 and all(letter == "\n" or letter.isprintable() for letter in err)


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_row_before_any_model_is_read(train, folder, what):
    name, content, *words = REFUSED[what]
    if callable(content):
        content(folder / name)
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, err, seconds = train(folder, name)
    assert code == 65 and "DataError: " in err and f"{folder}/{name}" in err, err
    assert all(word in err for word in words), (words, err)
    assert seconds < 1 and sound(err)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path[:30]))
def test_a_path_that_leads_elsewhere_is_refused_by_row(train, folder, path):
    (folder / "m.json").write_text(json.dumps([{"image": "0.png", "prompt": "a"}, {"image": path, "prompt": "b"}]))
    code, err, seconds = train(folder, "m.json")
    assert code == 65 and "1 of 2 rows" in err and f"row 2: image={path!r}"[:100] in err, err
    assert all(word in err for word in PATHS[path]), err
    assert seconds < 1 and sound(err) and "secret" not in err.replace("secret.txt", "") and "root:" not in err


def test_all_paths_at_once(train, folder):
    (folder / "m.json").write_text(f"[{row(image=[*filter(None, PATHS)])}, {row(image='2.png')}]")
    code, err, _ = train(folder, "m.json")
    assert code == 65 and "2 of 2 rows" in err and "row 2: image='2.png'" in err and sound(err)
    assert err.count("leaves the data folder") == 3 and f"; and {len(PATHS) - 4} more.\n" in err


# ---- what is taken as it stands

BIDI = "\u202eevil\u202c \u05d0\u200f \U0001f468\u200d\U0001f469 e\u0301\ufeff"
ACCEPTED = {
    "mark": ("m.csv", "\ufeff" + csv("1.png,a"), ["a"]),
    "mark in JSON": ("m.json", "\ufeff" + listed(row()), ["a"]),
    "line ends of Windows": ("m.csv", csv("1.png,a").replace("\n", "\r\n"), ["a"]),
    "line ends of old": ("m.csv", csv("1.png,a").replace("\n", "\r"), ["a"]),
    "no last line end": ("m.csv", csv("1.png,a")[:-1], ["a"]),
    "writing direction": ("m.csv", csv(f"1.png,{BIDI}"), [BIDI]),
    "pair": ("m.jsonl", jsonl(row("\U0001f600")), ["\U0001f600"]),
    "lines and tabs": ("m.csv", csv('1.png,"a\n\tcat"'), ["a\n\tcat"]),
    "longest": ("m.csv", csv(f"1.png,{'a' * 10_000}"), ["a" * 10_000]),
    "words of other programs": ("m.csv", csv("1.png,nan", "1.png,null", "1.png,=1+1"), ["nan", "null", "=1+1"]),
    "empty": ("m.csv", csv("1.png,", "1.png,  \t", "1.png,\u3000\u00a0"), ["", "", ""]),
    "further column": ("m.csv", csv("1.png,a").replace("\n", ",x\n"), ["a"]),
    "100 brackets": ("m.json", "[" + nested(100) + "]", []),
    "paths inside": ("m.csv", csv("sub/../1.png,a", "./sub//2.png,b", "inside.png,c"), ["a", "b", "c"]),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_taken_to_the_letter(folder, what):
    name, content, prompts = ACCEPTED[what]
    (folder / name).write_bytes(content.encode())
    dataset = UnifiedDataset(str(folder), str(folder / name), data_file_keys="image",
                             main_data_operator=ToAbsolutePath(str(folder)) >> LoadImage())
    items = [dataset[k] for k in range(len(dataset))]
    assert [item["prompt"] for item in items][len(items) - len(prompts):] == prompts
    assert all(item["image"].getpixel((0, 0)) == (255, 0, 0) for item in items)


def test_an_absolute_path_inside(folder):
    (folder / "m.csv").write_text(csv(f"{folder}/1.png,a"))
    assert len(UnifiedDataset(str(folder), str(folder / "m.csv"), data_file_keys="image")) == 2


def test_equal_rows_are_kept_with_a_warning(folder, caplog):
    (folder / "m.csv").write_text(csv("1.png,a", "0.png,zero", "0.png,other", "1.png,a", "1.png,a"))
    with caplog.at_level(logging.WARNING):
        assert len(UnifiedDataset(str(folder), str(folder / "m.csv"), data_file_keys="image")) == 6
    assert ("row 3 (line 4) is row 1 (line 2), row 5 (line 6) is row 2 (line 3), row 6 (line 7) is row 2 (line 3)."
            in caplog.text)


def test_ten_thousand_rows_are_read_in_a_second(folder):
    (folder / "m.jsonl").write_text(jsonl(*(row(f"row {k}") for k in range(10_000))))
    start = time.thread_time()
    assert len(UnifiedDataset(str(folder), str(folder / "m.jsonl"), data_file_keys="image")) == 10_001
    assert time.thread_time() - start < 1


# ---- folders with captions

def test_captions_beside_pictures(train, folder):
    for name in ("link.png", "loop.png", "pipe.png", "folder"):
        (folder / name).unlink()
    (folder / "inside.txt").write_bytes(b"f\xfcr")
    (folder / "1.txt").symlink_to("../secret.txt")
    os.mkfifo(folder / "0.txt")
    (folder / "sub/2.txt").write_text(MEGABYTE)
    code, err, seconds = train(folder, None)
    assert code == 65 and "4 of 4 rows" in err and seconds < 1 and sound(err), err
    for words in ("row 1 (0.png): ", "0.txt is a named pipe", "row 2 (1.png): 1.txt leaves the data folder",
                  "row 3 (inside.png): ", "inside.txt line 1 is not UTF-8", "row 4 (sub/2.png): prompt='a cat",
                  "has 1019999 characters"):
        assert words in err, err


def test_what_a_folder_leaves_out_is_told(folder, caplog):
    for name in ("link.png", "loop.png", "pipe.png"):
        (folder / name).unlink()
    for name in ("0.txt", "1.txt", "inside.txt", "sub/2.txt", "sub/3.txt", "4.heic", "m.csv", ".hidden", "\x1b.md"):
        (folder / name).write_text("a")
    with caplog.at_level(logging.WARNING):
        dataset = UnifiedDataset(str(folder))
    assert [row["image"] for row in dataset.rows] == ["0.png", "1.png", "inside.png", "sub/2.png"]
    assert "not used: '4.heic', '\\x1b.md', 'folder', 'm.csv', 'sub/3.txt'." in caplog.text


def test_a_folder_that_cannot_be_read(train, folder, monkeypatch):
    scan = os.scandir

    def denied(path):
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)  # the permissions of a file mean nothing to the superuser
    code, err, _ = train(folder, None)
    assert code == 65 and f"{folder}/sub cannot be read (Permission denied). Make it a readable folder" in err


def test_odd_file_names_in_a_folder(train, folder):
    for name in ("link.png", "loop.png", "pipe.png", "0.png", "1.png", "inside.png", "sub/2.png"):
        (folder / name).unlink()
    for name in (b"\x1b[2J\n", b"f\xfcr"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name + b".png")).write_bytes(b"")
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name + b".txt")).write_text("a")
    code, err, _ = train(folder, None)
    assert code == 65 and "2 of 2 rows" in err and sound(err), err
    for name in (r"\x1b[2J\n", r"f\udcfcr"):
        assert f"('{name}.png'): '{name}.txt' is not a file name" in err and NO_NAME[1] in err, err


# ---- few rows

def test_one_row_and_more_ranks_than_rows(folder):
    (folder / "m.csv").write_text(csv())
    dataset = UnifiedDataset(str(folder), str(folder / "m.csv"), data_file_keys="image",
                             main_data_operator=ToAbsolutePath(str(folder)) >> LoadImage())
    batches = [[*Loader(dataset, batch_size=2, rank=rank, world_size=4)] for rank in range(4)]
    assert [[len(batch.items) for batch in rank] for rank in batches] == [[2]] * 4
    samples = np.concatenate([rank[0].sample_indices for rank in batches])
    assert sorted(samples) == list(range(8)), "each has draws of its own"
    with pytest.raises(DataError, match="too few for one batch of batch_size x world_size = 8 with last='drop'"):
        Loader(dataset, batch_size=2, world_size=4, last="drop")
