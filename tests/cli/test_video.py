"""Videos from files to samples: training in one stage and two, `plan`, `sample`; a family of two layers."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import toy_video
from films import HAS_AV, animation, copy_films, needs_av
from PIL import Image

from ms_diffsynth import registry
from ms_diffsynth.config import load_config
from ms_diffsynth.data.previews import webp_text
from ms_diffsynth.data.video import film_of
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.run.build import build_datasets
from ms_diffsynth.run.samples import planned_samples

HOW = ("--num_frames", "5,9", "--height", 16, "--width", 24, "--lora_rank", 2, "--mode", "pynative")


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setitem(registry.FAMILIES, "toy_video", "toy_video")
    monkeypatch.setitem(registry.MODEL_CLASSES, "ToyVideoPipeline", "toy_video")


@pytest.fixture(scope="session")
def video_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "toy_video"
    toy_video.write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Nine frames, five frames, and a still image, with captions."""
    folder = tmp_path_factory.mktemp("films")
    animation(folder / "long.gif", range(0, 240, 12))
    animation(folder / "short.webp", range(0, 140, 20), 63, (48, 48))
    Image.new("RGB", (48, 32), "blue").save(folder / "still.png")
    for name in ("long", "short", "still"):
        (folder / f"{name}.txt").write_text(f"a {name} one")
    return folder


@pytest.fixture
def train(run, video_model, films):
    """``train(word, ...)``: the command on these films, with further flags."""
    same = ("--family", "toy_video", "--model_paths", video_model, "--dataset_base_path", films)
    return lambda *words: run("train", *same, *words)


def sixteenths(path):
    """How long an animation is, in frames of 16 a second: equal ones that follow each other are one in the file."""
    return round(16 * film_of(path).seconds, 1)


def test_a_run_trains_on_films_and_images_and_shows_moving_samples(train, caplog):
    code, _, err = train(*HOW, "--max_train_steps", 3, "--sample_steps", 2, "--num_inference_steps", 1, "--output_path",
                         "out", "--sample_prompts", json.dumps(["a cat", {"prompt": "a dog", "num_frames": 5}]))
    assert code == 0, err
    assert "clips: 1 frame (1), 5 frames (1), 9 frames (1), from the beginning of each film" in caplog.text
    assert "toy_video: 3 videos" in err
    for step in (0, 2, 3):
        assert sixteenths(f"out/samples/step-{step}.webp") == 9  # the longest, by num_frames
        assert webp_text(open(f"out/samples/step-{step}.webp", "rb").read()) == "a cat\na dog"
    assert sixteenths("out/samples/before_after.webp") == 9
    text = open("out/report.html").read()
    assert text.count("data:image/webp;base64,") == 3 and "data:image/png" not in text
    assert [json.loads(line)["file"] for line in open("out/events.jsonl") if '"samples"' in line] == [
        f"samples/step-{step}.webp" for step in (0, 2, 3)]


def test_two_stages_are_one(train):
    same = (*HOW, "--max_train_steps", 3, "--save_steps", 3, "--sample_prompts", "[]")
    assert train(*same, "--output_path", "one")[0] == 0
    prepare, step = ("--task", "sft:data_process", "--output_path", "cache"), ("--task", "sft:train")
    code, _, err = train(*same, *prepare)
    assert code == 0 and "3 rows, 3 prepared" in err
    code, _, err = train(*same, *step, "--cache_dir", "cache", "--output_path", "two")
    assert code == 0, err
    one, two = (load_state_dict(f"{name}/step-3.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    code, _, err = train(*same, *step, "--cache_dir", "cache", "--num_frames", "5", "--output_path", "three")
    assert code != 0 and "made by another configuration" in err and "lengths" in err
    assert "0 prepared, 3 there already" in train(*same, *prepare)[2]


def test_a_run_is_resumed_with_its_samples(train):
    same = (*HOW, "--sample_prompts", "a cat", "--num_inference_steps", 1, "--output_path", "out",
            "--checkpoint_steps", 1)
    assert train(*same, "--max_train_steps", 1)[0] == 0
    before = open("out/samples/step-0.webp", "rb").read()
    code, _, err = train(*same, "--max_train_steps", 2, "--resume", "auto")
    assert code == 0, err
    assert open("out/samples/step-0.webp", "rb").read() == before and sixteenths("out/samples/before_after.webp") == 9


def test_samples_never_overwrite_and_say_how_they_were_made(run, video_model):
    words = ("sample", video_model, "--prompt", "a cat", "--height", 16, "--width", 24, "--mode", "pynative")
    code, out, err = run(*words, "--num_frames", 9, "--fps", 8, "--seed", 3)
    assert code == 0, err
    suffixes = ["webp", "mp4"] if HAS_AV else ["webp"]
    assert out.split() == [f"samples/000-seed3.{suffix}" for suffix in suffixes]
    content = open("samples/000-seed3.webp", "rb").read()
    image = Image.open("samples/000-seed3.webp")
    image.load()
    assert sixteenths("samples/000-seed3.webp") == 18 and image.size == (24, 16)
    text = webp_text(content)
    assert text.startswith("a cat\n")
    assert all(part in text for part in ("Seed: 3", "Frames: 9", "FPS: 8", "Size: 24x16"))
    assert run(*words)[1].split()[0] == "samples/001-seed0.webp"
    assert open("samples/000-seed3.webp", "rb").read() == content


def test_a_family_of_images_has_no_frames(run, train, toy_model, pictures):
    code, _, err = run("sample", toy_model, "--prompt", "a", "--num_frames", 5)
    assert code != 0 and "num_frames: the family toy has no use for it" in err
    code, _, err = run("train", "--family", "toy", "--model_paths", toy_model, "--dataset_base_path", pictures,
                       "--clips", "all", "--num_frames", "5,9", "--max_train_steps", 1)
    assert code != 0 and "num_frames=5,9, clips=all: the family toy is trained on images" in err
    code, _, err = train(*HOW, "--max_train_steps", 1, "--evaluation_steps", 1, "--sample_prompts", "a")
    assert code != 0 and "are not compared with images" in err


@pytest.mark.parametrize("value, says", [("17,x", "num_frames has 'x': expected whole numbers"),
                                         ("16", "such as 13 or 17"), ("0", "num_frames has '0'")])
def test_numbers_of_frames_that_cannot_be(train, value, says):
    code, _, err = train("--num_frames", value, "--max_train_steps", 1)
    assert code != 0 and says in err


def test_a_length_that_is_missing_is_told(train):
    code, _, err = train("--max_train_steps", 1, "--num_frames", "9")
    assert code != 0 and "short.webp" in err
    assert "expected 9 or more. Add a length that it has, num_frames=5,9" in err


@pytest.mark.parametrize("command, more", [("plan", ()), ("train", ("--output_path", "out"))])
@pytest.mark.parametrize("frames, says", [
    ("5", "still.png: one frame, and input_image gives the first frame"),
    ("1", "num_frames=1: one frame, and input_image gives the first frame")])
def test_a_film_that_is_its_given_frame_alone_is_found_at_the_start(run, films, tmp_path, command, more, frames, says):
    assert run("tiny", "wan", "wan", "--variant", "i2v")[0] == 0
    code, _, err = run(command, "--family", "wan", "--model_paths", "wan", "--dataset_base_path", films, "--height", 32,
                       "--width", 32, "--num_frames", frames, "--extra_inputs", "input_image", "--lora_base_model",
                       "dit", "--max_train_steps", 1, "--device", "CPU", *more)
    assert code != 0 and says in err and "out of extra_inputs" not in err, err
    assert not (tmp_path / "out").exists()


@needs_av
def test_plan_counts_films_frames_and_sizes(run, video_model, films, tmp_path):
    shutil.copytree(films, tmp_path / "set")
    copy_films(tmp_path / "set", "even.mp4", "long.mkv")
    code, out, err = run("plan", "--family", "toy_video", "--model_paths", video_model, "--dataset_base_path", "set",
                         "--instance_prompt", "a", "--num_frames", "5,9", "--clips", "all", "--max_train_steps", 4)
    assert code == 0, err
    flat = " ".join(out.split())
    for text in ("videos 4 and 1 image, 20 clips of them, in set", "frame rates", "trained at 16 a second",
                 "clips 1 frame (1), 5 frames (", "all there are, behind each other", "frames x height x width",
                 "steps 4 of 1 video", "is compiled"):
        assert text in flat, text


def test_a_file_of_settings_and_the_samples_it_plans(tmp_path, video_model, films):
    (tmp_path / "run.yaml").write_text(f"""\
model: {{family: toy_video, model_paths: {video_model}}}
data: {{dataset_base_path: {films}, num_frames: [1, 5], fps: 8, clips: middle, clip_start: 0.1, max_pixels: 1024}}
run: {{max_train_steps: 1, sample_prompts: [a cat, {{prompt: a dog, num_frames: 9}}]}}
""")
    file = tmp_path / "run.yaml"
    data = build_datasets(load_config(file)).instance
    assert [data.size_of(row) for row in range(3)] == [(5, 24, 32), (1, 32, 32), (1, 24, 32)]
    assert data.rows[0]["clip"] == {"start": 0.1 + 1 / 8, "frames": 5, "rate": 8.0}
    assert data[0]["video"].dtype == np.uint8
    pipe = toy_video.ToyVideoPipeline()

    def planned(**settings):
        return [call["num_frames"] for call in planned_samples(load_config(file, **settings), pipe, (16, 16))]

    assert planned() == [5, 9] and planned(sample_num_frames=13) == [13, 9]
