"""ModelLogger: names, records, strict JSON, one writer; TensorBoard when it is there."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.data import fonts
from ms_diffsynth.data.previews import webp_text
from ms_diffsynth.training.logger import COLUMNS, ModelLogger

MAIN, OTHER = SimpleNamespace(is_main_process=True), SimpleNamespace(is_main_process=False)


class Model:
    def __init__(self):
        self.saved = []

    def save_models(self, folder):
        """There are none."""

    def save(self, path, remove_prefix, metadata):
        path.write_bytes(b"weights")
        self.saved.append((path.name, remove_prefix, metadata["step"]))


def record(step, loss=0.5):
    return dict(zip(COLUMNS, (step, 0, loss, 1e-4, 1.5, int(not np.isfinite(loss)), 0.25)))


def test_files_are_named_by_steps_and_epochs(tmp_path):
    logger, model = ModelLogger(tmp_path / "run", "pipe.dit."), Model()
    logger.start({})
    for _ in range(5):
        logger.on_step_end(MAIN, model, save_steps=2)
    logger.on_training_end(MAIN, model)
    assert model.saved == [("step-2.safetensors", "pipe.dit.", "2"), ("step-4.safetensors", "pipe.dit.", "4"),
                           ("step-5.safetensors", "pipe.dit.", "5")]
    logger.on_epoch_end(MAIN, model, 3)
    logger.on_training_end(MAIN, model)  # already saved
    assert [name for name, _, _ in model.saved[3:]] == ["epoch-3.safetensors"]


def test_a_record_gives_its_float32_numbers_back(tmp_path):
    logger = ModelLogger(tmp_path)
    logger.start({})
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    for step, value in enumerate(values):
        logger.log_step(record(step, float(value)))
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,loss,learning_rate,grad_norm,is_skipped,seconds"
    assert np.array_equal([np.float32(line.split(",")[2]) for line in lines[1:]], values)


def test_events_are_strict_json_even_when_numbers_are_not_finite(tmp_path):
    logger = ModelLogger(tmp_path)
    logger.start({})
    logger.event("skipped", loss=float("nan"), grad_norm=float("-inf"), at=3)
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert (last["event"], last["loss"], last["grad_norm"], last["at"]) == ("skipped", "nan", "-inf", 3)


def test_losses_that_are_not_finite_are_recorded_but_not_drawn(tmp_path):
    logger = ModelLogger(tmp_path)
    logger.start({})
    for step, loss in enumerate([1.0, float("nan"), 0.5]):
        logger.log_step(record(step, loss))
    logger.on_training_end(MAIN, Model())
    assert logger.losses == [(0, 1.0), (2, 0.5)] and (tmp_path / "loss.png").exists()
    assert ",nan," in (tmp_path / "loss.csv").read_text()


def test_other_ranks_write_nothing(tmp_path):
    logger, model = ModelLogger(tmp_path / "run"), Model()
    logger.is_writing = False
    logger.start({})
    logger.on_step_end(OTHER, model, save_steps=1)
    logger.log_step(record(1))
    logger.on_training_end(OTHER, model)
    assert logger.num_steps == 1 and not model.saved and not (tmp_path / "run").exists()


def test_pictures_before_and_after(tmp_path):
    logger = ModelLogger(tmp_path)
    assert logger.write_comparison([]) is None
    for step in (0, 5, 9):
        logger.log_samples(step, [Image.new("RGB", (16, 16), (step * 20, 0, 0))], ["a"]) if step else \
            logger.log_samples(step, [Image.new("RGB", (16, 16))], ["a"])
    path = logger.write_comparison(["a"])
    assert path == tmp_path / "samples/before_after.png" and Image.open(path).height > 32


def test_a_save_is_complete_when_it_is_told(tmp_path):
    logger, told = ModelLogger(tmp_path), []
    logger.start({})
    logger.after_save = lambda: told.append([path.name for path in logger.saved if path.is_file()])
    for _ in range(2):
        logger.on_step_end(MAIN, Model(), save_steps=1)
    assert told == [["step-1.safetensors"], ["step-1.safetensors", "step-2.safetensors"]]


def test_secrets_are_in_no_record_and_in_no_picture(tmp_path):
    token, pictures = "hf_abcdefghijklmnop0123", [Image.new("RGB", (256, 16))]
    logger, model = ModelLogger(tmp_path), Model()
    model.save = lambda path, prefix, metadata: path.write_text(str(metadata))
    logger.metadata = {"note": token}
    logger.start({"prompt": f"a {token}", "my_api_key": "swordfish", "steps": 3, "path": tmp_path / token})
    assert json.loads((tmp_path / "training_args.json").read_text()) == logger.settings == {
        "prompt": "a [redacted]", "my_api_key": "[redacted]", "steps": 3, "path": f"{tmp_path}/[redacted]"}
    logger.event("stopped", reason=token)
    logger.on_step_end(MAIN, model, save_steps=1)
    assert all(token not in path.read_text() for path in tmp_path.iterdir())
    with_token, hidden = (logger.log_samples(k, pictures, [text]).read_bytes() for k, text in enumerate(
        (token, "[redacted]")))
    assert with_token == hidden != logger.log_samples(2, pictures, ["another"]).read_bytes()


def test_listeners_get_numbers_and_sample_images(tmp_path):
    class Listener:
        told = []

        def scalars(self, values, step):
            self.told.append((step, values))

        def images(self, images, captions, step):
            self.told.append((step, [image.size for image in images], list(captions)))

    logger = ModelLogger(tmp_path)
    logger.start({})
    logger.listeners.append(Listener())
    logger.log_step(record(1))
    logger.log_samples(1, [Image.new("RGB", (16, 8))], ["a cat"])
    assert Listener.told == [(1, {"loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.5}), (1, [(16, 8)], ["a cat"])]


def test_sample_videos_are_a_sheet_that_moves_and_whole_files(tmp_path):
    logger = ModelLogger(tmp_path)
    logger.frame_rate = 8.0
    videos = [np.zeros((5, 64, 320, 3), np.uint8), np.full((3, 64, 48, 3), 255, np.uint8)]
    for k in range(5):
        videos[0][k, :, 40 * k:40 * k + 40] = 200
    for step in (0, 4):
        path = logger.log_samples(step, videos, ["a cat", "a dog"])
        assert path == tmp_path / f"samples/step-{step}.webp"
    sheet = Image.open(path)
    sheet.load()
    assert sheet.n_frames == 5 and sheet.info["duration"] == 125 and webp_text(path.read_bytes()) == "a cat\na dog"
    whole, = (tmp_path / "samples/step-4").iterdir()  # the other one is as large in the sheet
    assert whole.stem == "1"
    small = [video.shape for video in logger.samples[4]]
    assert small == [(5, 51, 256, 3), (3, 64, 48, 3)]
    again, held = ModelLogger(tmp_path / "again"), logger.first_and_last()
    again.restore_images(held, ["a cat", "a dog"])
    assert all((again.samples[step][k] == logger.samples[step][k]).all() for step in (0, 4) for k in range(2))
    assert again.write_comparison(["a cat", "a dog"]).name == "before_after.webp"
    logger.references = [[Image.new("RGB", (16, 16))], [Image.new("RGB", (32, 16))]]
    assert Image.open(logger.log_samples(5, videos, ["a cat", "a dog"])).size[1] > sheet.size[1]  # with a row above


def test_what_is_above_the_samples_has_its_title(tmp_path, monkeypatch):
    logger, images, shown = ModelLogger(tmp_path), [Image.new("RGB", (32, 32))], []
    logger.references, logger.reference_title = [images], "control image"
    monkeypatch.setattr(logger, "_write_sheet", lambda name, rows, captions, titles: shown.append(captions) or tmp_path)
    for step in (0, 2):
        logger.log_samples(step, images, ["a cat"])
    logger.write_comparison(["a cat"])
    assert shown == [["control image", "step 0"], ["control image", "step 2"],
                     ["control image", "before (step 0)", "after (step 2)"]]


def test_prompts_that_no_font_can_write_are_in_a_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fonts, "_FOLDERS", ())
    monkeypatch.setattr(fonts, "_PACKAGE", "no_such_package")
    logger, images = ModelLogger(tmp_path), [Image.new("RGB", (32, 32))] * 2
    logger.log_samples(0, images, ["a cat", "a dog"])
    assert not (tmp_path / "samples/prompts.txt").exists() and not caplog.text
    for step in (1, 2):
        logger.log_samples(step, images, ["a cat", "\u4e00\u53ea\n\u732b"])
    assert (tmp_path / "samples/prompts.txt").read_text("utf-8") == "prompt 1: a cat\nprompt 2: \u4e00\u53ea \u732b\n"
    assert caplog.text.count("no font of this system has the letters of prompt 2:") == 1
