"""Data as users have them, from the command line: which prompt, which column, which size, and what is said of it."""
from __future__ import annotations

import csv
import json
import logging
import shutil

import pytest
from PIL import Image

from ms_diffsynth.config import load_config
from ms_diffsynth.run.build import build_datasets
from ms_diffsynth.run.pipeline import build_pipeline
from ms_diffsynth.run.samples import build_sampler
from ms_diffsynth.storage.cache import Cache
from ms_diffsynth.training.module import DiffusionTrainingModule

EAGER = ("--mode", "pynative", "--num_epochs", 1)
SHAPES = {"portrait": (256, 512), "small": (48, 64), "strip": (32, 480), "wide": (512, 256)}


@pytest.fixture
def data(tmp_path):
    """Three images without anything beside them."""
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (64, 64), (80 * k, 0, 0)).save(folder / f"00{k}.png")
    return folder


@pytest.fixture
def shapes(tmp_path):
    """Images of four shapes, with captions."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for name, size in SHAPES.items():
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}")
    return folder


@pytest.fixture
def train(run, toy_model, caplog):
    """``train(folder, word, ...)``: exit code, and everything that was said."""
    caplog.set_level(logging.INFO)

    def call(folder, *words):
        caplog.clear()
        code, _, err = run("train", "--family", "toy", "--model_paths", toy_model, "--output_path", "out",
                           "--dataset_base_path", folder, *EAGER, *words)
        shutil.rmtree("out", ignore_errors=True)
        return code, err + caplog.text

    return call


SMALL = ("--height", 32, "--width", 32)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_some_rows_without_a_prompt(train, data):
    path = jsonl(data / "m.jsonl", {"image": "000.png", "prompt": "own"}, {"image": "001.png"},
                 {"image": "002.png", "prompt": ""})
    words = ("--dataset_metadata_path", path, *SMALL)
    code, said = train(data, *words, "--instance_prompt", "a photo of sks cat")
    assert code == 0 and "1 of 3 images have a caption of their own, 2 use instance_prompt" in said
    code, said = train(data, *words)
    assert code == 65 and "row 2 (line 2): no prompt. Write one, or set instance_prompt" in said
    assert "1 of 3 captions are empty" in said and "row 3 (line 3)" in said


def test_the_layout_of_imagefolder(train, data):
    path = jsonl(data / "metadata.jsonl", *({"file_name": f"00{k}.png", "text": "a cat"} for k in range(2)))
    code, said = train(data, *SMALL)
    assert code == 0 and "metadata.jsonl was found in the folder" in said and "toy: 2 images" in said
    for words in ((), ("--data_file_keys", "file_name"), ("--image_column", "file_name", "--caption_column", "text")):
        code, said = train(data, "--dataset_metadata_path", path, *words, *SMALL)
        assert code == 0 and "toy: 2 images" in said
    code, said = train(data, "--dataset_metadata_path", path, "--instance_prompt", "a photo", *SMALL)
    assert code == 0 and "2 of 2 images have a caption of their own, instance_prompt is not used" in said
    code, said = train(data, "--dataset_metadata_path", path, "--caption_column", "", *SMALL)
    assert code == 65 and "has no column prompt" in said


def test_images_without_captions_and_links(train, data, tmp_path):
    code, said = train(data, *SMALL)
    assert code == 65 and said.count("or set instance_prompt") == 3 and "captions=False" not in said
    links = tmp_path / "links"
    links.mkdir()
    for image in data.iterdir():
        (links / image.name).symlink_to(image)
    words = ("--instance_prompt", "x", *SMALL)
    code, said = train(links, *words)
    assert code == 65 and said.count("set allow_outside_base=true") == 3
    assert train(links, *words, "--allow_outside_base")[0] == 0
    (tmp_path / "m.csv").write_text(f"image,prompt\n{data / '000.png'},a\n")
    assert train(links, "--dataset_metadata_path", tmp_path / "m.csv", *SMALL)[0] == 65
    assert train(links, "--dataset_metadata_path", tmp_path / "m.csv", *SMALL, "--allow_outside_base", "true")[0] == 0


def test_empty_captions(train, data):
    for k, text in enumerate(("a caption", "", "  \n")):
        (data / f"00{k}.txt").write_text(text)
    code, said = train(data, *SMALL)
    assert code == 0 and "2 of 3 captions are empty" in said and "row 2 (001.png), row 3 (002.png)" in said


def test_dreambooth_on_captions_alone(train, data):
    for k in range(3):
        (data / f"00{k}.txt").write_text("a caption")
    prior = ("--task", "dreambooth", "--with_prior_preservation", "--class_base_path", data)
    assert train(data, *prior, *SMALL)[0] == 0
    (data / "000.txt").unlink()
    code, said = train(data, *prior, "--instance_prompt", "sks", *SMALL)
    assert code == 65 and "or set class_prompt" in said and "or set instance_prompt" not in said


# ---- sizes

def test_images_keep_their_shapes(train, shapes):
    code, said = train(shapes, "--max_pixels", 65536)
    assert code == 0 and "4 sizes in pixels, height x width" in said and "none is enlarged" in said
    for size in ("360x176", "64x48", "480x32", "176x360"):
        assert f"{size} (1 image)" in said
    assert "at most 2.2% (portrait.png)" in said and "lose more than a fifth" not in said and "max_pixels=" not in said


def test_max_pixels_that_is_a_side(train, shapes):
    code, said = train(shapes, "--max_pixels", 512)
    assert code == 0 and "4 of 4 images are shrunk. Did you mean 262144 (512 x 512)?" in said
    code, said = train(shapes, "--max_pixels", 40000)
    assert code == 0 and "max_pixels=40000 is 200 x 200 pixels, to which 2 of 4 images are shrunk. Most" in said
    code, said = train(shapes, "--max_pixels", 50)
    assert code == 64 and "max_pixels=50: expected at least 64" in said


def test_what_one_size_costs_is_said(train, shapes):
    code, said = train(shapes, "--max_pixels", 65536, "--buckets", 1)
    assert code == 0 and "248x248 (4 images)" in said and "4 of 4 images lose more than a fifth" in said
    assert "2 of 4 images are smaller than what they are trained at, and enlarged: strip.png 7.75x" in said
    assert "Set buckets=2" in said
    code, said = train(shapes, *SMALL, "--max_pixels", 65536)
    assert code == 0 and "32x32 (4 images)" in said and "strip.png 93%" in said and "Leave out height and width" in said
    assert "max_pixels=65536 is not used" in said
    code, said = train(shapes, "--max_pixels", 65536, "--batch_size", 4)
    assert code == 0 and "to fill batches of 4, 12 images come once more in each epoch" in said


def test_class_images_have_the_size_of_the_others(train, shapes, data):
    code, said = train(shapes, "--task", "dreambooth", "--with_prior_preservation", "--class_base_path", data,
                       "--class_prompt", "a", "--max_pixels", 65536)
    assert code == 0 and " images: 1 size" in said and "class images: 1 size" in said


def test_held_out_images_and_samples_have_the_sizes_that_are_trained(shapes, toy_model):
    Image.new("RGB", (500, 260)).save(shapes / "wider.png")
    config = load_config(None, family="toy", model_paths=toy_model, dataset_base_path=shapes, num_epochs=1,
                         max_pixels=65536, buckets=3, instance_prompt="a", validation_share=0.4, validation_steps=1,
                         sample_prompts=["a"], num_inference_steps=1)
    sets = build_datasets(config)
    trained = {image["image"].size for image in sets.instance}
    assert {image["image"].size for image in sets.validation} <= {(b.width, b.height) for b in sets.instance.buckets}
    sampler, _ = build_sampler(config, build_pipeline(config), sets.instance)
    assert sampler()[0].size in trained


def test_sizes_are_part_of_what_a_run_resumes(shapes, toy_model, run):
    words = ("train", "--family", "toy", "--model_paths", toy_model, "--output_path", "out", "--dataset_base_path",
             shapes, "--max_pixels", 65536, *EAGER)
    assert run(*words)[0] == 0
    code, _, err = run(*words, "--resume", "auto", "--buckets", 2, "--num_epochs", 2)
    assert code == 78 and "  buckets: " in err and "  data.digest: " in err
    assert run(*words, "--resume", "auto", "--num_epochs", 2)[0] == 0
    assert [row["step"] for row in csv.DictReader(open("out/loss.csv"))] == [str(k + 1) for k in range(8)]


def test_a_cache_holds_rows_of_the_sizes_that_are_chosen(shapes, toy_model, run):
    """Another image changes the sizes of others only where its size is chosen for them; stage two knows the rule."""
    both = ("train", "--family", "toy", "--model_paths", toy_model, "--max_pixels", 65536)
    words = (*both, "--task", "sft:data_process", "--dataset_base_path", shapes, "--output_path", "cache")
    two = (*both, "--task", "sft:train", "--dataset_base_path", "cache", "--output_path", "out", *EAGER)
    assert run(*words)[0] == 0
    assert sorted(Cache("cache").read(row.key, row.label)[1] for row in Cache("cache").rows("instance")) == [
        (64, 48), (176, 360), (360, 176), (480, 32)]
    code, _, err = run(*words, "--buckets", 2)
    assert code == 0 and "4 prepared" in err
    code, _, err = run(*two)
    assert code == 78 and "most" in err
    assert run(*two, "--buckets", 2)[0] == 0
    Image.new("RGB", (100, 100)).save(shapes / "square.png")
    (shapes / "square.txt").write_text("a square")
    code, _, err = run(*words)
    assert code == 0 and "5 rows, 1 prepared" in err and "4 there already" in err


@pytest.fixture
def folders(data):
    """cats: one image, dogs: two; what is beside them is in neither."""
    for name, numbers in (("cats", (0,)), ("dogs", (1, 2))):
        (data / name).mkdir()
        for k in numbers:
            (data / f"00{k}.png").rename(data / name / f"00{k}.png")
            (data / name / f"00{k}.txt").write_text(f"image {k}")
    Image.new("RGB", (64, 64), "red").save(data / "beside.png")
    return data


def losses(folder="out"):
    with open(f"{folder}/loss.csv", newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def test_folders_with_repeats_of_their_own(run, toy_model, folders, monkeypatch):
    """An epoch has 3 x 1 + 2 images; each is prepared once, and a cache, its two stages and a resumed run agree."""
    command = ["train", "--family", "toy", "--model_paths", toy_model, "--dataset_folders", "cats=3,dogs",
               "--dataset_base_path", folders, *EAGER, *SMALL]
    made = []
    monkeypatch.setattr(DiffusionTrainingModule, "prepare",
                        lambda self, data, cut, then=DiffusionTrainingModule.prepare: made.append(1) or then(
                            self, data, cut))
    assert run(*command, "--output_path", "out")[0] == 0 and len(losses()) == 5 and len(made) == 3
    assert run(*command, "--output_path", "cached", "--cache_dir", "cache")[0] == 0
    assert losses("cached") == losses()
    stage = [*command, "--task", "sft:train", "--dataset_base_path", "cache"]
    assert run(*stage, "--output_path", "two")[0] == 0 and losses("two") == losses()
    code, _, err = run(*stage, "--dataset_folders", "cats", "--output_path", "three")
    assert code == 78 and "2 images of no folder that dataset_folders=cats names: dogs/001.png, dogs/002.png" in err
    first = [*command, "--output_path", "resumed", "--checkpoint_steps", 2]
    assert run(*first, "--max_train_steps", 2)[0] == run(*first, "--resume", "auto")[0] == 0
    assert losses("resumed") == losses()
    code, _, err = run(*first, "--resume", "auto", "--dataset_folders", "cats=2,dogs")
    assert code == 78 and 'dataset_folders: ["cats=3", "dogs"] when saved, ["cats=2", "dogs"] now' in err


def test_folders_and_buckets_and_held_out_rows(run, toy_model, folders):
    Image.new("RGB", (128, 64), "blue").save(folders / "cats/000.png")
    words = ["--dataset_folders", "cats=3,dogs=5", "--batch_size", 2, "--validation_share", 0.3,
             "--validation_steps", 9]
    code, _, err = run("train", "--family", "toy", "--model_paths", toy_model, "--dataset_base_path", folders, *EAGER,
                       *words, "--output_path", "out")
    assert code == 0 and "toy: 2 images, 1 held out" in err
    assert len(losses()) == 5  # three and five in twos, of two shapes; or ten of one
