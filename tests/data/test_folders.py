"""Several folders as one data set, each with repeats of its own; and a trigger word."""
from __future__ import annotations

import logging
import os
from collections import Counter

import pytest
from PIL import Image

from ms_diffsynth.config import load_config
from ms_diffsynth.data import UnifiedDataset
from ms_diffsynth.data.folders import Epoch, folder_of, parse_folders
from ms_diffsynth.errors import ConfigError, DataError

NEEDED = {"family": "toy", "dataset_base_path": "pictures", "num_epochs": 1}
TRAIN = {"data_file_keys": "image", "required": ("image", "prompt")}


@pytest.fixture
def base(tmp_path):
    """cats: two images with sidecars. dogs: three in metadata. others: one, without anything."""
    for name, count in (("cats", 2), ("sub/dogs", 3), ("others", 1)):
        (tmp_path / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (32 + 16 * k, 32), (k, 0, 0)).save(tmp_path / name / f"{k}.png")
    for k in range(2):
        (tmp_path / f"cats/{k}.txt").write_text(f"cat {k}")
    rows = "".join(f"{k}.png,dog {k}\n" for k in range(3))
    (tmp_path / "sub/dogs/metadata.csv").write_text(f"file_name,text\n{rows}")
    return tmp_path


def of(base, *texts, **options):
    return UnifiedDataset.of_folders(str(base), parse_folders(texts), **TRAIN | options)


@pytest.mark.parametrize("repeat, order", [
    (1, [0, 1, 2]), (2, [0, 1, 2, 0, 1, 2]), ([1, 1, 1], [0, 1, 2]), ([2, 2, 2], [0, 1, 2, 0, 1, 2]),
    ([1, 3, 2], [0, 1, 2, 1, 2, 1]),
])
def test_an_epoch_shows_every_row_once_and_then_those_that_come_again(repeat, order):
    epoch = Epoch(3, repeat)
    assert len(epoch) == len(order) and [epoch.row_of(k) for k in range(2 * len(order))] == order * 2


def test_folders_have_captions_of_their_own_and_are_shown_as_often_as_they_say(base):
    dataset = of(base, "cats=3", "sub/dogs", repeat=2)
    assert [row["prompt"] for row in dataset.rows] == ["cat 0", "cat 1", "dog 0", "dog 1", "dog 2"]
    assert [row["image"] for row in dataset.rows][1:3] == ["cats/1.png", "sub/dogs/0.png"]
    shown = Counter(dataset[k]["prompt"] for k in range(len(dataset)))
    assert shown == {"cat 0": 6, "cat 1": 6, "dog 0": 2, "dog 1": 2, "dog 2": 2}
    assert dataset.image_size(4) == (64, 32) == dataset.image_size(dataset.rows.index(dataset.rows[4]))
    assert dataset.label(2) == "sub/dogs/0.png" and dataset.content(0)["image"][0] != dataset.content(1)["image"][0]
    assert len(of(base, "cats=3", max_data_items=3)) == 3


def test_a_row_that_is_held_out_is_never_shown_however_often_others_are(base):
    train, held_out = of(base, "cats=3", "sub/dogs").split(0.4, 0)
    shown = {train[k]["image"] for k in range(len(train))}
    assert len(held_out.rows) == 2 and not shown & {row["image"] for row in held_out.rows} and len(shown) == 3
    counts = Counter(train[k]["image"] for k in range(len(train)))
    assert all(counts[name] == (3 if name.startswith("cats") else 1) for name in counts)


def test_what_is_wrong_in_two_folders_is_told_at_once(base):
    (base / "cats/0.txt").unlink()
    with pytest.raises(DataError) as caught:
        of(base, "cats", "others")
    assert "1 of 2 rows" in str(caught.value) and f"1 of 1 rows of {os.path.join(base, 'others')}" in str(caught.value)
    with pytest.raises(DataError, match="absent is not a folder"):
        of(base, "absent")


def test_a_bad_image_is_named_with_its_folder(base):
    dataset = of(base, "cats", "sub/dogs", main_data_operator=UnifiedDataset.default_image_operator(str(base)))
    (base / "sub/dogs/1.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"sub/dogs row 2 .*image='sub/dogs/1.png'"):
        dataset[3]


@pytest.mark.parametrize("texts, expected", [
    ("cats=0", "expected to show its images 1 to 1000000 times, as in cats=10"),
    ("cats=" + "9" * 5000, "1 to 1000000 times"),
    ("/cats", "a folder inside dataset_base_path"), ("../cats", "a folder inside"), (".", "a folder inside"),
    ("cats,cats=2", "names cats twice"), ("a,a/b", "names a/b and a, which it is in"),
])
def test_folders_that_cannot_be_meant(texts, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(**NEEDED, flags={"dataset_folders": texts})


@pytest.mark.parametrize("settings, expected", [
    ({"dataset_metadata_path": "m.csv"}, "dataset_metadata_path=m.csv with dataset_folders"),
    ({"evaluation_steps": 3, "sample_prompts": ["a"]}, "say what images are compared with, by evaluation_reference"),
    ({"trigger_word": " "}, "trigger_word is empty"),
])
def test_what_does_not_go_together(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(**NEEDED, dataset_folders=["cats"], **settings)


def test_names_of_folders():
    assert parse_folders(("a=5=1", "10_sks cat=10", " b = 2", "c/", "d=x")) == {
        "a=5": 1, "10_sks cat": 10, "b": 2, "c": 1, "d=x": 1}
    assert folder_of("a/b/c.png", {"a": 1}) == "a" and folder_of("ab/c.png", {"a": 1}) is None


def test_a_trigger_word_is_put_in_front_of_prompts_without_it(base, caplog):
    caplog.set_level(logging.INFO)
    for k, text in enumerate(("an asks cat", "SKS, asleep")):
        (base / f"cats/{k}.txt").write_text(text)
    dataset = UnifiedDataset(str(base / "cats"), trigger_word="sks", **TRAIN)
    assert [row["prompt"] for row in dataset.rows] == ["sks, an asks cat", "SKS, asleep"]
    assert "the trigger word sks is in 1 of 2 prompts, and was put in front of 1" in caplog.text
    (base / "cats/0.txt").write_text("")
    assert [row["prompt"] for row in UnifiedDataset(str(base / "cats"), trigger_word="sks", **TRAIN).rows] == [
        "", "SKS, asleep"]
    dataset = UnifiedDataset(str(base / "cats"), trigger_word="sks", instance_prompt="a cat", **TRAIN)
    assert dataset.rows[0]["prompt"] == "sks, a cat"
