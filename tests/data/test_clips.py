"""Rows of films: lengths, rates and places of clips, mixed with images; captions; what is said, and what is refused."""
from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from films import animation, brightness, copy_films, film, folder_of_frames, needs_av
from PIL import Image

from ms_diffsynth.data import Bucket, Clip, Clips, UnifiedDataset
from ms_diffsynth.data.clips import describe_clips
from ms_diffsynth.data.operators import describe
from ms_diffsynth.data.video import Film
from ms_diffsynth.errors import ConfigError, DataError


def rule(*lengths, rate=16.0, **more):
    return Clips(lengths=lengths, rate=rate, **more)


def dataset(folder, *lengths, metadata=None, rows=None, size=(48, 64), **more):
    """``rows`` are written as JSON lines; ``more`` are for `Clips` or for the data set."""
    of_clips = {name: more.pop(name) for name in ("rate", "place", "skip", "factor") if name in more}
    if rows is not None:
        metadata = folder / "m.jsonl"
        metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = rule(*lengths, **of_clips)
    operator = UnifiedDataset.default_video_operator(str(folder), clips, height=size[0], width=size[1])
    return UnifiedDataset(str(folder), metadata and str(metadata), data_file_keys="video", main_data_operator=operator,
                          clips=clips, **{"required": "video", **more})


# -- which frames ------------------------------------------------------------------------------------------------------


def test_a_film_gets_the_longest_clip_that_it_has():
    clips = rule(5, 9, 17)
    for frames, expected in ((5, 5), (8, 5), (9, 9), (16, 9), (17, 17), (500, 17)):
        assert [clip.frames for clip in clips.of("a", Film(64, 48, frames, frames / 16))] == [expected]
    assert clips.of("a", Film(64, 48)) == [Clip("a", 0.0, 1, 16.0)]  # an image
    # 30 frames a second for 0.9 s: 15 of 16 a second
    assert clips.frames_in(Film(64, 48, 27, 0.9), 0.0) == 15 and clips.of("a", Film(64, 48, 27, 0.9))[0].frames == 9
    # a folder of frames has no rate: its frames are taken as they are
    assert clips.of("a", Film(64, 48, 17, None))[0].frames == 17


def test_where_clips_begin():
    film = Film(64, 48, 80, 5.0)
    assert rule(17).of("a", film) == [Clip("a", 0.0, 17, 16.0)]
    assert rule(17, place="middle").of("a", film) == [Clip("a", 31 / 16, 17, 16.0)]
    found = rule(17, 33, place="all").of("a", film)
    assert [(clip.start * 16, clip.frames) for clip in found] == [(0, 33), (33, 33)]  # 14 frames are left
    assert [(c.start * 16, c.frames) for c in rule(5, 33, place="all").of("a", film)] == [
        (0, 33), (33, 33), (66, 5), (71, 5)]
    assert [c.start for c in rule(17, place="all", skip=3.0).of("a", film)] == [3.0]
    assert rule(17, place="all").of("a", film, 2.5) == [Clip("a", 2.5, 17, 16.0)]
    assert rule(17, rate=8.0).of("a", film)[0].times[:3] == [0, 1 / 8, 2 / 8]
    assert [float(t) for t in Clip("a", 0.5, 3, 29.97).times] == pytest.approx([0.5, 0.5 + 1 / 29.97, 0.5 + 2 / 29.97])


@pytest.mark.parametrize("length, says", [(16, "such as 13 or 17"), (2, "such as 1 or 5"), (0, "such as 1 or 5")])
def test_lengths_are_four_n_and_one(length, says):
    with pytest.raises(ConfigError, match=f"num_frames={length}: expected a multiple of 4 and one more, {says}"):
        rule(length)
    assert Clips(lengths=(length or 1,), rate=16.0, factor=1)


def test_a_film_that_is_too_short_says_what_it_has():
    with pytest.raises(DataError) as raised:
        rule(17, 33).of("a", Film(64, 48, 12, 0.75))
    assert "0.75 s long, which is 12 frames at 16 a second; expected 17 or more. Add a length that it has, " \
           "num_frames=9,17,33" in str(raised.value)
    with pytest.raises(DataError, match=r"1 frame at 16 a second behind second 0\.9; expected 17 or more. Raise fps"):
        rule(17).of("a", Film(64, 48, 15, 15 / 16), 0.9)


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_films_and_images_in_a_folder_with_captions_beside_them(tmp_path):
    animation(tmp_path / "cat.gif", range(0, 200, 10))
    (tmp_path / "cat.txt").write_text("a cat")
    folder_of_frames(tmp_path / "walk", range(0, 190, 10))
    (tmp_path / "walk.txt").write_text("a walk")  # beside a folder: it is a film
    folder_of_frames(tmp_path / "run.frames", range(0, 90, 10))
    (tmp_path / "run.caption").write_text("a run")
    (tmp_path / "stills").mkdir()  # of images
    Image.new("RGB", (64, 48), "red").save(tmp_path / "stills/red.png")
    (tmp_path / "stills/red.txt").write_text("red")
    data = dataset(tmp_path, 9, 17, required="video,prompt")
    assert [(row["video"], row["prompt"]) for row in data.rows] == [
        ("cat.gif", "a cat"), ("run.frames", "a run"), ("stills/red.png", "red"), ("walk", "a walk")]
    assert [data.size_of(k) for k in range(4)] == [(9, 48, 64), (9, 48, 64), (1, 48, 64), (17, 48, 64)]
    for k in range(4):
        video = data[k]["video"]
        assert video.dtype == np.uint8 and video.shape == (*data.size_of(k), 3) and video.flags.c_contiguous
    assert brightness(data[3]["video"]) == [10.0 * k for k in range(17)]
    assert data.label(0) == "cat.gif" and data.image_size(0) == (64, 48)


def test_columns_of_films_and_images_are_one(tmp_path):
    animation(tmp_path / "a.gif", range(0, 200, 10), 63)
    Image.new("RGB", (64, 48)).save(tmp_path / "b.png")
    data = dataset(tmp_path, 17, rows=[{"video": "a.gif", "prompt": "x"}, {"image": "b.png", "prompt": "y"}])
    assert [row["video"] for row in data.rows] == ["a.gif", "b.png"]
    (tmp_path / "m.csv").write_text("video,image,prompt\na.gif,,x\n,b.png,y\n")
    data = dataset(tmp_path, 17, metadata=tmp_path / "m.csv")
    assert [row["video"] for row in data.rows] == ["a.gif", "b.png"] and "image" not in data.rows[1]
    (tmp_path / "m.csv").write_text("clip,still,prompt\na.gif,,x\n,b.png,y\n")
    data = dataset(tmp_path, 17, metadata=tmp_path / "m.csv", video_column="clip", image_column="still")
    assert [row["video"] for row in data.rows] == ["a.gif", "b.png"]
    (tmp_path / "m.csv").write_text("file_name,text\na.gif,x\n")
    assert dataset(tmp_path, 17, metadata=tmp_path / "m.csv").rows[0]["prompt"] == "x"


@pytest.mark.parametrize("rows, says", [
    ([{"video": "a.gif", "image": "b.png"}], "expected a film or an image"),
    ([{"video": "a.gif"}, {"prompt": "x"}], "no video"), ([{"video": ["a.gif", "a.gif"]}], "is a list"),
    ([{"video": "absent.gif"}], "does not exist"), ([{"video": "b.txt"}], "is not an image"),
    ([{"film": "a.gif"}], "Name the column of the videos by video_column, for example video_column=film"),
    ([{"video": "a.gif", "start": "soon"}], "start='soon': expected seconds"),
    ([{"video": "a.gif", "start": -1}], "start=-1"), ([{"video": "../a.gif"}], "leaves the data folder"),
    ([{"video": "a.gif", "start": 0.9}], "expected 9 or more")])
def test_rows_that_cannot_be_meant(tmp_path, rows, says):
    animation(tmp_path / "a.gif", range(0, 200, 10))
    Image.new("RGB", (64, 48)).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("no film")
    with pytest.raises(DataError) as raised:
        dataset(tmp_path, 9, rows=rows)
    assert says in str(raised.value)


def test_all_clips_of_a_film_are_rows_and_start_names_one(tmp_path):
    animation(tmp_path / "a.gif", range(0, 240, 6))  # 40 frames of 20 a second: 2 s, 32 of 16 a second
    data = dataset(tmp_path, 9, place="all", rows=[{"video": "a.gif", "prompt": "x"}, {"video": "a.gif", "start": 0.25,
                                                                                       "prompt": "y"}])
    assert [data.label(k) for k in range(4)] == ["a.gif", "a.gif from 0.5625 s", "a.gif from 1.125 s",
                                                 "a.gif from 0.25 s"]
    assert [row["prompt"] for row in data.rows] == ["x", "x", "x", "y"] and len(data) == 4
    assert [round(b / 6) for b in brightness(data[3]["video"])][:3] == [5, 6, 7]  # 0.25, 0.3125, 0.375 s
    assert "clip at 0.5625 s" in data.table.places[1]
    parts = data.split(0.25, 0)
    assert len(parts[0]) == 3 and len(parts[1]) == 1 and parts[1].size_of(0) == (9, 48, 64)


def test_what_a_cache_knows_a_clip_by(tmp_path):
    animation(tmp_path / "a.gif", range(0, 240, 6))
    animation(tmp_path / "b.gif", range(0, 240, 6))
    animation(tmp_path / "c.gif", range(0, 240, 5))

    def of(*lengths, **more):
        data = dataset(tmp_path, *lengths, instance_prompt="a", **more)
        return [json.dumps(data.content(row, ["video", "prompt"])) for row in range(len(data.rows))]

    first = of(9)
    assert first[0] == first[1] != first[2] and of(9) == first  # by what is in the file
    for other in (of(17), of(9, skip=0.5), of(9, rate=8.0), of(9, place="middle")):
        assert not set(other) & set(first)
    assert len(set(of(9, place="all"))) == 3 + 4 and set(first) < set(of(9, place="all"))
    folder_of_frames(tmp_path / "d.frames", range(9))
    before = of(9)[3]
    Image.new("RGB", (64, 48), "red").save(tmp_path / "d.frames/3.png")
    assert of(9)[3] != before
    operator = dataset(tmp_path, 9, instance_prompt="a").operators()["video"]
    assert operator == describe(UnifiedDataset.default_video_operator("elsewhere", rule(9), height=48, width=64))
    assert operator != describe(UnifiedDataset.default_video_operator("elsewhere", rule(17), height=48, width=64))


def test_buckets_count_frames_and_size(tmp_path):
    animation(tmp_path / "a.gif", range(0, 200, 10))
    animation(tmp_path / "b.gif", range(0, 100, 10), size=(48, 64))
    data = dataset(tmp_path, 5, 9, instance_prompt="a")
    buckets = [Bucket(32, 48), Bucket(48, 32)]
    data.use_buckets(buckets, UnifiedDataset.default_video_operator(str(tmp_path), rule(5, 9), buckets=buckets))
    assert [data.size_of(k) for k in range(2)] == [(9, 32, 48), (5, 48, 32)]
    assert [data[k]["video"].shape for k in range(2)] == [(9, 32, 48, 3), (5, 48, 32, 3)]
    assert "32x48" in json.dumps(data.content(0))


def test_folders_of_films_each_with_its_repeats(tmp_path):
    animation(tmp_path / "one/a.gif", range(0, 200, 10))
    animation(tmp_path / "two/b.gif", range(0, 200, 10))
    data = UnifiedDataset.of_folders(str(tmp_path), {"one": 2, "two": 1}, clips=rule(9), instance_prompt="a",
                                     data_file_keys="video", required="video",
                                     main_data_operator=UnifiedDataset.default_video_operator(str(tmp_path), rule(9)))
    assert [row["video"] for row in data.rows] == ["one/a.gif", "two/b.gif"] and len(data) == 3
    assert data.size_of(1) == (9, 48, 64) and data[0]["video"].shape == (9, 48, 64, 3)


@pytest.mark.fault
@needs_av
def test_damaged_films_are_all_named_before_anything_begins(tmp_path):
    copy_films(tmp_path, "even.mp4", "cut.mp4", "sound.mp4", "empty.mp4")
    with pytest.raises(DataError) as raised:
        dataset(tmp_path, 9, instance_prompt="a")
    text = str(raised.value)
    assert "3 of 4 rows" in text and all(f"{name}.mp4" in text for name in ("cut", "sound", "empty"))
    assert "even.mp4:" not in text


@needs_av
def test_clips_of_files_are_their_frames(tmp_path):
    copy_films(tmp_path, "even.mp4", "long.mkv")
    data = dataset(tmp_path, 9, instance_prompt="a", place="middle")
    assert [round(b / 8) for b in brightness(data[0]["video"])] == [6, 7, 9, 11, 13, 15, 17, 19, 21]
    assert data.rows[0]["clip"] == {"start": 3 / 16, "frames": 9, "rate": 16.0}
    assert data.image_size(1) == (16, 16) and film("long.mkv").endswith("long.mkv")


# -- what is said ------------------------------------------------------------------------------------------------------


def test_a_report_counts_and_warns():
    films = {"a.mp4": Film(64, 48, 80, 5.0), "b.mp4": Film(64, 48, 24, 2.0, False), "c": Film(64, 48, 20, None),
             "d.png": Film(64, 48)}
    clips = rule(9, 17)
    chosen = [clip for name, film in films.items() for clip in clips.of(name, film)]
    lines, warnings = describe_clips(clips, films, chosen)
    assert dict(lines) == {
        "lengths": "8.25 s in all, from 1.25 s (c) to 5 s (a.mp4)",
        "frame rates": "16 (1), about 12, variable (1), not known: taken as they are (1); trained at 16 a second",
        "clips": "1 frame (1), 17 frames (3), from the beginning of each film"}
    assert warnings == [
        "5.06 s of 8.25 s of film (61%) are in no clip, most of a.mp4. clips=all trains on them, a row for each clip"]
    slow = {"a.mp4": Film(64, 48, 24, 2.0), "b.mp4": Film(64, 48, 40, 2.5)}
    assert describe_clips(clips, slow, [Clip("a.mp4", 0, 9, 16), Clip("b.mp4", 0, 9, 16)])[1][1] == (
        "1 of 2 films have fewer than 16 frames a second, so that frames come twice: a.mp4 12. Set fps=12, or leave "
        "them out")
    alone = {"d.png": Film(64, 48)}
    assert describe_clips(clips, alone, clips.of("d.png", alone["d.png"])) == ([("clips", "1 frame (1)")], [])


def test_films_beside_images_are_told_of_where_none_are_trained(tmp_path, caplog):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "b.mp4").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        UnifiedDataset(str(tmp_path), instance_prompt="a")
    assert "neither images nor the captions of one, and not used: 'b.mp4'" in caplog.text
