"""Where the prompt of an image comes from: its caption, else instance_prompt; and what its columns may be called."""
from __future__ import annotations

import json
import logging
import unicodedata

import pytest
from PIL import Image

from ms_diffsynth.data import UnifiedDataset
from ms_diffsynth.errors import ConfigError, DataError

TRAIN = {"data_file_keys": "image", "required": ("image", "prompt")}  # what a run of a family with prompts asks for


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "set"
    base.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (number, number, number)).save(base / f"{number}.png")
    return base


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def prompts(dataset):
    return [row["prompt"] for row in dataset.rows]


def jsonl(folder, *rows, name="m.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


# ---- captions and instance_prompt

OWN = [{"image": "0.png", "prompt": "own"}, {"image": "1.png"}, {"image": "2.png", "prompt": None},
       {"image": "3.png", "prompt": " "}]


def test_metadata_and_instance_prompt(folder, told):
    dataset = UnifiedDataset(str(folder), jsonl(folder, *OWN), instance_prompt="sks", **TRAIN)
    assert prompts(dataset) == ["own", "sks", "sks", "sks"]
    assert "1 of 4 images have a caption of their own, 3 use instance_prompt" in told.text
    assert "empty" not in told.text


def test_cells_and_instance_prompt(folder):
    (folder / "m.csv").write_text("image,prompt\n0.png,own\n1.png,\n2.png,\"  \"\n")
    dataset = UnifiedDataset(str(folder), str(folder / "m.csv"), instance_prompt="sks", **TRAIN)
    assert prompts(dataset) == ["own", "sks", "sks"]


def test_captions_beside_images_and_instance_prompt(folder, told):
    for name, text in (("0.txt", "own\n"), ("1.caption", "too"), ("2.txt", "")):
        (folder / name).write_text(text)
    dataset = UnifiedDataset(str(folder), instance_prompt="sks", prompt_setting="class_prompt", **TRAIN)
    assert prompts(dataset) == ["own", "too", "sks", "sks"]
    assert "2 of 4 images have a caption of their own, 2 use class_prompt" in told.text and "not used" not in told.text


def test_an_instance_prompt_that_nothing_needs_is_told(folder, told):
    UnifiedDataset(str(folder), jsonl(folder, {"image": "0.png", "prompt": "a"}), instance_prompt="sks", **TRAIN)
    assert "1 of 1 images have a caption of their own, instance_prompt is not used" in told.text


def test_without_it_a_row_without_a_prompt_is_refused_and_an_empty_one_is_empty(folder, told):
    with pytest.raises(DataError) as error:
        UnifiedDataset(str(folder), jsonl(folder, *OWN), **TRAIN)
    assert "2 of 4 rows" in str(error.value) and str(error.value).count("set instance_prompt") == 2
    assert "row 2 (line 2): no prompt" in str(error.value) and "row 3 (line 3): no prompt" in str(error.value)
    (folder / "m.csv").write_text("image,prompt\n0.png,own\n1.png,\n2.png,\"  \"\n")
    assert prompts(UnifiedDataset(str(folder), str(folder / "m.csv"), **TRAIN)) == ["own", "", ""]
    assert "2 of 3 captions are empty" in told.text and "row 2 (line 3), row 3 (line 4)" in told.text


def test_empty_caption_files(folder, told):
    for name, content in (("0.txt", b"own"), ("1.txt", b""), ("2.txt", b" \n\t"), ("3.txt", b"\xef\xbb\xbf")):
        (folder / name).write_bytes(content)
    assert prompts(UnifiedDataset(str(folder), **TRAIN)) == ["own", "", "", ""]
    assert "3 of 4 captions are empty" in told.text and "row 2 (1.png), row 3 (2.png), row 4 (3.png)" in told.text


def test_an_image_without_a_caption_file(folder):
    (folder / "0.txt").write_text("own")
    with pytest.raises(DataError) as error:
        UnifiedDataset(str(folder), **TRAIN)
    assert "3 of 4 rows" in str(error.value) and "expected 1.txt beside it" in str(error.value)
    assert str(error.value).count("or set instance_prompt") == 3


def test_the_empty_instance_prompt_serves_too(folder, told):
    (folder / "0.txt").write_text("own")
    assert prompts(UnifiedDataset(str(folder), instance_prompt="", **TRAIN)) == ["own", "", "", ""]
    assert "3 use instance_prompt" in told.text


def test_an_instance_prompt_that_is_no_text(folder):
    with pytest.raises(ConfigError, match=r"instance_prompt=.*control characters"):
        UnifiedDataset(str(folder), instance_prompt="a\x1b[2J", **TRAIN)


def test_captions_that_are_not_wanted(folder, told):
    (folder / "0.txt").write_text("own")
    assert prompts(UnifiedDataset(str(folder), instance_prompt="sks", caption_column="", **TRAIN)) == ["sks"] * 4
    assert "not used: '0.txt'" in told.text
    dataset = UnifiedDataset(str(folder), jsonl(folder, *OWN), instance_prompt="sks", caption_column="", **TRAIN)
    assert prompts(dataset) == ["sks"] * 4


def test_prompts_that_are_no_text_are_named_by_their_column(folder):
    with pytest.raises(DataError, match=r"row 1 \(line 1\): text=\['a', 'b'\] is of type list; expected text"):
        UnifiedDataset(str(folder), jsonl(folder, {"image": "0.png", "text": ["a", "b"]}), **TRAIN)


# ---- columns

@pytest.mark.parametrize("columns, options", [
    (("image", "prompt"), {}), (("file_name", "text"), {}), (("Image", "Prompt"), {}), (("file_name", "caption"), {}),
    (("FILE_NAME", "Caption"), {}), (("image", "text"), {}),
    (("file_name", "text"), {"data_file_keys": "file_name"}), (("video", "prompt"), {"data_file_keys": "video"}),
    (("photo", "words"), {"image_column": "photo", "caption_column": "words"}),
    (("photo", "words"), {"data_file_keys": "photo", "caption_column": "words"}),
], ids=str)
def test_usual_and_given_names(folder, columns, options):
    image, prompt = columns
    path = jsonl(folder, *({image: f"{k}.png", prompt: f"number {k}"} for k in range(2)))
    dataset = UnifiedDataset(str(folder), path, main_data_operator=len, **TRAIN | options)
    assert [(item["image"], item["prompt"]) for item in dataset] == [(5, "number 0"), (5, "number 1")]
    assert dataset.data_file_keys == ("image",)


def test_a_given_name_wins_over_the_usual_one(folder):
    path = jsonl(folder, {"image": "0.png", "file": "1.png", "prompt": "short", "long": "a longer one"})
    dataset = UnifiedDataset(str(folder), path, image_column="file", caption_column="long", **TRAIN)
    assert dataset.rows[0]["image"] == "1.png" and prompts(dataset) == ["a longer one"]


@pytest.mark.parametrize("row, options, says", [
    ({"picture": "0.png", "prompt": "a"}, {}, "Name the column of the images by image_column, for example "
     "image_column=picture"),
    ({"image": "0.png", "title": "a"}, {}, "Name the column of the prompts by caption_column, or set instance_prompt"),
    ({"image": "0.png", "text": "a", "Caption": "b"}, {}, "columns text, Caption, each of which may be that of the"),
    ({"image": "0.png", "prompt": "a"}, {"caption_column": "promt"}, "no column promt, which caption_column names; it "
     "has image, prompt. Did you mean 'prompt'?"),
    ({"image": "0.png", "prompt": "a"}, {"image_column": "img"}, "no column img, which image_column names"),
    ({"image": "0.png", "prompt": "a"}, {"data_file_keys": "image,edit_image"}, "no column edit_image; it has image, "
     "prompt.* Correct data_file_keys"),
    ({"photo": "0.png", "edit_image": "1.png", "prompt": "a"}, {"data_file_keys": "image,edit_image"},
     "no column image; .*image_column=photo"),
    ({"edit_image": "1.png", "photo": "0.png", "prompt": "a"}, {"data_file_keys": "image,edit_image"},
     "it has edit_image, photo, prompt. Name .*for example image_column=photo$"),
    ({"file": "0.png", "edit_image": "1.png", "prompt": "a"}, {"image_column": "images"},
     "it has file, edit_image, prompt. Correct image_column"),
    ({"image": "0.png", "edit_image": "1.png", "prompt": "a"}, {"data_file_keys": "image,edit_imgae"},
     "no column edit_imgae; .* Did you mean 'edit_image'?"),
    ({"image": "0.png", "edit_image": "1.png", "prompt": "a"}, {"data_file_keys": "image,control_image"},
     "no column control_image; it has image, edit_image, prompt. Correct data_file_keys"),
])
def test_names_that_are_not_there(folder, row, options, says):
    with pytest.raises(DataError, match=says):
        UnifiedDataset(str(folder), jsonl(folder, row), **TRAIN | options)


def test_a_caption_column_that_is_not_used_is_told(folder, told):
    path = jsonl(folder, {"image": "0.png", "prompt": "", "text": "the caption"})
    assert prompts(UnifiedDataset(str(folder), path, instance_prompt="sks", **TRAIN)) == ["sks"]
    assert "the column text is not used. Set caption_column=text" in told.text


def test_a_script_keeps_the_columns_it_names(folder):
    path = jsonl(folder, {"file_name": "0.png", "text": "a"})
    dataset = UnifiedDataset(str(folder), path, data_file_keys="file_name")
    assert dataset[0] == {"file_name": "0.png", "text": "a", "prompt": "a"}


def test_a_folder_has_no_columns_of_other_names(folder, told):
    dataset = UnifiedDataset(str(folder), instance_prompt="sks", image_column="photo", caption_column="words", **TRAIN)
    assert prompts(dataset) == ["sks"] * 4 and "here photo, words, are not used" in told.text


# ---- metadata that are found in the folder

@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_the_layout_of_imagefolder(folder, told, name):
    if name == "metadata.csv":
        (folder / name).write_text("file_name,text\n0.png,a red cat\n2.png,a blue cat\n")
    else:
        rows = [{"file_name": "0.png", "text": "a red cat"}, {"file_name": "2.png", "text": "a blue cat"}]
        jsonl(folder, *rows, name=name)
    dataset = UnifiedDataset(str(folder), **TRAIN)
    assert [(row["image"], row["prompt"]) for row in dataset.rows] == [("0.png", "a red cat"), ("2.png", "a blue cat")]
    assert f"{name} was found in the folder and is used" in told.text
    assert "does not list 2 of the 4 images of the folder, which are not used: '1.png', '3.png'" in told.text


def test_caption_files_speak_before_metadata_that_are_not_named(folder, told):
    jsonl(folder, {"file_name": "0.png", "text": "a red cat"}, name="metadata.jsonl")
    (folder / "1.txt").write_text("own")
    assert prompts(UnifiedDataset(str(folder), instance_prompt="sks", **TRAIN)) == ["sks", "own", "sks", "sks"]
    assert "not used: 'metadata.jsonl'" in told.text


def test_two_metadata_files_in_a_folder(folder):
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).write_text("file_name\n0.png\n")
    with pytest.raises(DataError, match=r"has metadata\.csv and metadata\.jsonl.*dataset_metadata_path="):
        UnifiedDataset(str(folder), **TRAIN)


def test_metadata_of_something_else_in_a_folder(folder, told):
    (folder / "metadata.csv").write_text("camera,year\nold,1970\n")
    assert prompts(UnifiedDataset(str(folder), instance_prompt="sks", **TRAIN)) == ["sks"] * 4
    assert "metadata.csv is not used: it has no column of images" in told.text


# ---- names that differ in case or in Unicode form only

def test_a_caption_file_whose_name_differs_in_case(folder, told):
    Image.new("RGB", (32, 32)).save(folder / "cat.png")
    for name in ("0.txt", "1.txt", "2.txt", "3.txt", "Cat.txt"):
        (folder / name).write_text("own")
    with pytest.raises(DataError, match=r"the image cat\.png has no caption file.*There is 'Cat.txt', which"):
        UnifiedDataset(str(folder), **TRAIN)
    told.clear()
    assert prompts(UnifiedDataset(str(folder), instance_prompt="sks", **TRAIN)) == ["own"] * 4 + ["sks"]
    assert "not read as captions" in told.text and "'Cat.txt' of 'cat.png'" in told.text


def test_images_whose_names_differ_in_case_only(folder, told):
    for name in ("a.png", "A.png"):
        Image.new("RGB", (32, 32)).save(folder / name)
    assert len(UnifiedDataset(str(folder), instance_prompt="sks", **TRAIN)) == 6
    assert "each is an image of its own: 'A.png', 'a.png'" in told.text


CAFE = "caf\u00e9.png"
CAFE_OF_MAC = unicodedata.normalize("NFD", CAFE)


@pytest.mark.parametrize("there, named, says", [
    ("IMG.PNG", "img.png", r"There is 'IMG\.PNG', which differs in case"),
    ("Sub/a.png", "sub/A.png", r"There is 'Sub/a\.png', which differs in case"),
    (CAFE_OF_MAC, CAFE, r"There is 'cafe\\u0301\.png', which differs in Unicode form from 'caf\\xe9\.png'"),
    (CAFE, CAFE_OF_MAC, r"There is 'caf\\xe9\.png', which differs in Unicode form from 'cafe\\u0301\.png'"),
])
def test_a_file_that_is_there_by_a_similar_name(folder, there, named, says):
    (folder / "Sub").mkdir()
    Image.new("RGB", (32, 32)).save(folder / there)
    with pytest.raises(DataError, match=rf"does not exist.*{says}"):
        UnifiedDataset(str(folder), jsonl(folder, {"image": named, "prompt": "a"}), **TRAIN)
    with pytest.raises(DataError, match=r"does not exist.*correct its name\.\n"):
        UnifiedDataset(str(folder), jsonl(folder, {"image": f"x{named}", "prompt": "a"}), **TRAIN)


# ---- links

def test_links_that_lead_out(folder, tmp_path, told):
    base = tmp_path / "links"
    base.mkdir()
    (base / "one.png").symlink_to(folder / "1.png")
    (base / "all").symlink_to(folder)
    (base / "loop").symlink_to(base)
    (folder / "loop").symlink_to(folder)
    with pytest.raises(DataError, match=r"leaves the data folder.*set allow_outside_base=true"):
        UnifiedDataset(str(base), instance_prompt="sks", **TRAIN)
    assert "not used: 'all', 'loop'" in told.text
    dataset = UnifiedDataset(str(base), instance_prompt="sks", allow_outside_base=True, **TRAIN)
    assert [row["image"] for row in dataset.rows] == [*(f"all/{k}.png" for k in range(4)), "one.png"]
    absolute = jsonl(folder, {"image": str(folder / "2.png"), "prompt": "a"})
    assert len(UnifiedDataset(str(base), absolute, allow_outside_base=True, **TRAIN)) == 1
