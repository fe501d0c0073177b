"""Trackers: what they are told, with the real clients in offline mode where these are installed, and when they fail."""
from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toy_run import Module, rows, toy_model, train

from ms_diffsynth import registry
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.training import trackers
from ms_diffsynth.training.trackers import Tracked, tracker_class, with_captions

folder = pytest.fixture(scope="module")(toy_model)
TWO = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in (1, 200)]


class Noting:
    package, extra = "json", "noting"
    told = []

    def __init__(self, run):
        self.told.append(("begin", run.name, run.after, run.settings["learning_rate"], run.id))

    def scalars(self, values, step):
        self.told.append((step, *values))

    def images(self, images, captions, step):
        self.told.append((step, len(images), *captions))

    def close(self):
        self.told.append("end")


@pytest.fixture
def noting(monkeypatch):
    monkeypatch.setattr(Noting, "told", [])
    monkeypatch.setattr(trackers, "Noting", Noting, raising=False)
    monkeypatch.setitem(registry.TRACKERS, "noting", "ms_diffsynth.training.trackers:Noting")
    return Noting.told


def run(folder, path, **options):
    return train(path, Module(folder), rows(2), args=SimpleNamespace(trackers=("noting",)), max_train_steps=2,
                 sampler=lambda: TWO, sample_captions=["a cat", "a dog"], checkpoint_steps=1, **options)


def test_a_tracker_sees_the_run_from_begin_to_end(folder, tmp_path, noting):
    run(folder, tmp_path / "run")
    (begin, name, after, rate, identity), *told = noting
    assert (begin, name, after, rate) == ("begin", "run", 0, 1e-2) and len(identity) == 21
    numbers = ("loss", "learning_rate", "grad_norm")
    assert told == [(0, 2, "a cat", "a dog"), (1, *numbers), (2, *numbers), (2, 2, "a cat", "a dog"), "end"]
    noting.clear()
    train(tmp_path / "run", Module(folder), rows(2), args=SimpleNamespace(trackers=("noting",)), max_train_steps=3,
          resume="auto", num_epochs=None)
    assert noting == [("begin", "run", 2, 1e-2, identity), (3, *numbers), "end"], "the same run, resumed"


def test_a_tracker_that_fails_does_not_end_the_run(folder, tmp_path, noting, monkeypatch, caplog):
    def fail(self, *values):
        raise OSError("the server is away")

    monkeypatch.setattr(Noting, "scalars", fail)
    assert run(folder, tmp_path / "run").num_steps == 2
    assert caplog.text.count("noting is given up: OSError: the server is away. Training goes on") == 1


def test_a_package_that_is_not_installed_is_told_before_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"trackers=wandb, but wandb cannot be imported.*\[wandb\]"):
        train(tmp_path / "run", Module(folder), rows(2), args=SimpleNamespace(trackers=("wandb",)))
    assert not (tmp_path / "run").exists()


def begin(name, tmp_path):
    cls = trackers.tracker_class(name)
    pytest.importorskip(cls.package)
    tracker = cls(Tracked(folder=tmp_path, name="run", project="tests", id="abcdefghijklmnopqrstu",
                          settings={"learning_rate": 1e-4, "sample_prompts": ["a cat"]}))
    tracker.scalars({"loss": 0.5}, 1)
    tracker.images(TWO, ["a cat", "a dog"], 1)
    tracker.scalars({"loss": 0.25}, 2)
    tracker.close()


def test_tensorboard_holds_curves_images_and_text(tmp_path):
    begin("tensorboard", tmp_path)
    from tensorboardX.proto.event_pb2 import Event

    data, values = next((tmp_path / "tensorboard").iterdir()).read_bytes(), []
    while data:  # length, its checksum, an event, its checksum
        length = int.from_bytes(data[:8], "little")
        values += [(value, event.step) for event in [Event.FromString(data[12:12 + length])]
                   for value in event.summary.value]
        data = data[16 + length:]
    assert [(v.tag, step, v.simple_value) for v, step in values if v.tag == "loss"] == [("loss", 1, 0.5),
                                                                                       ("loss", 2, 0.25)]
    assert [v.tag for v, _ in values if v.image.width == 8] == ["samples/1", "samples/2"]
    text = b"".join(v.tensor.string_val[0] for v, _ in values if v.tensor.string_val).decode()
    assert '"learning_rate": 0.0001' in text and "1. a cat\n2. a dog" in text


def test_tensorboard_plays_sample_videos(tmp_path):
    pytest.importorskip("tensorboardX")
    video = np.zeros((5, 8, 16, 3), np.uint8)
    for k in range(5):
        video[k, :, 3 * k] = 255
    tracker = tracker_class("tensorboard")(Tracked(folder=tmp_path, name="run", project="tests", id="a", settings={},
                                                   frame_rate=10.0))
    tracker.images([video, video], ["a cat", "a dog"], 3)
    tracker.close()
    content = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    begin = content.index(b"GIF89a")
    image = Image.open(io.BytesIO(content[begin:]))
    assert image.size == (16, 8) and image.n_frames == 5 and image.info["duration"] == 100
    assert content.count(b"GIF89a") == 2


def test_what_shows_no_videos_gets_some_of_their_frames():
    video = np.zeros((9, 8, 16, 3), np.uint8)
    found = with_captions([video, Image.new("RGB", (4, 4))], ["a", "b"])
    assert [(image.size, text) for image, text in found] == [((5 * 16 + 4, 8), "a"), ((4, 4), "b")]


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    begin("wandb", tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and sum(p.suffix == ".png" for p in files) == 2


def test_swanlab_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    begin("swanlab", tmp_path)
    files = [p for p in (tmp_path / "swanlab").rglob("*") if p.is_file()]
    assert sum(p.suffix == ".png" for p in files) == 2
    assert any(b"loss" in p.read_bytes() for p in files)
