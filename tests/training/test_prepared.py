"""Prepared rows: each once and when it is needed, the same for repeats; beyond a limit of memory in files."""
from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import toy_run
from damaged_entries import flip
from PIL import Image

from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.errors import DataError, TemplateError
from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.progress import Progress
from ms_diffsynth.registry import family
from ms_diffsynth.training import kept, prepared
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.prepared import PreparedRows, in_bucket, prepare_all, unify

CUT = SimpleNamespace(cache=("moments",), prepare=())


class Module:
    def __init__(self):
        self.calls, self.texts, self.row_fields = [], None, ["image", "prompt"]
        self.pipe = SimpleNamespace(padded_slots=(), prompt_lengths=(), optional_units={})

    def prepare(self, data, cut):
        self.calls.append(data["prompt"])
        return {"moments": np.full(4, data["prompt"], np.float32)}


class Dataset:
    """Three rows, repeated as `UnifiedDataset` does."""

    def __init__(self, length=6):
        self.rows = [{"prompt": k, "image": Image.new("RGB", (8 * (k + 1), 16))} for k in range(3)]
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.rows[index % 3]


def test_each_row_is_prepared_once_however_often_it_comes():
    module = Module()
    rows = PreparedRows(Dataset(), module, CUT)
    assert module.calls == [] and rows.rows == 3 and len(rows) == 6
    for index in range(6):
        assert rows[index].slots["moments"].tolist() == [index % 3] * 4
        assert rows[index].size == rows.bucket_of(index) == (16, 8 * (index % 3 + 1))  # height, width
    assert module.calls == [0, 1, 2] and rows.kept.bytes == 3 * 16


def test_fewer_items_than_rows():
    module = Module()
    rows = PreparedRows(Dataset(length=2), module, CUT)
    prepare_all([rows], Progress(enabled=False))
    assert module.calls == [0, 1] and rows.rows == 2


def test_a_plain_list_is_a_data_set():
    rows = PreparedRows(Dataset().rows[:2], Module(), CUT)
    assert len(rows) == rows.rows == 2 and rows[1].slots["moments"][0] == 1


@pytest.mark.parametrize("limit", [32, 0])
@pytest.mark.parametrize("where", ["files", "nowhere", "a full disk"])
def test_rows_beyond_the_limit_are_in_files_and_that_is_said_once(tmp_path, monkeypatch, caplog, limit, where):
    module = Module()
    rows = PreparedRows(Dataset(), module, CUT, limit_bytes=limit)
    if where != "nowhere":
        rows.keep_in(tmp_path / "run/.prepared/instance-0")
    if where == "a full disk":
        monkeypatch.setattr(kept, "SPARE_BYTES", 1 << 62)
    with caplog.at_level(logging.WARNING):
        for index in range(6):
            assert rows[index].slots["moments"][0] == index % 3
            rows.bucket_of(index)
    again = list(range(limit // 16, 3))
    assert module.calls[3:] == ([] if where == "files" else again) and rows.kept.bytes <= limit
    first = caplog.messages[0]
    if where == "files":
        assert len(caplog.messages) == 1 and "removed when the run ends" in first
        assert len(list((tmp_path / "run/.prepared").rglob("*.safetensors"))) == len(again)
    else:
        assert "prepared again at every use. Set cache_dir" in caplog.messages[-1]
        assert len(caplog.messages) == (1 if where == "nowhere" else 2)
    rows.close()
    assert not list((tmp_path / "run").iterdir() if (tmp_path / "run").is_dir() else ())


def test_a_file_that_was_damaged_is_made_again(tmp_path, caplog):
    module = Module()
    rows = PreparedRows(Dataset(), module, CUT, limit_bytes=0)
    rows.keep_in(tmp_path)
    first = rows[0].slots["moments"]
    flip(next(tmp_path.rglob("*.safetensors")))
    assert np.array_equal(rows[0].slots["moments"], first) and module.calls == [0, 0] and "is damaged" in caplog.text
    assert np.array_equal(rows[0].slots["moments"], first) and module.calls == [0, 0]


def test_rows_whose_further_inputs_differ_in_shape_are_in_different_buckets():
    pipe = SimpleNamespace(padded_slots=("text",), prompt_lengths=(4, 8),
                           optional_units={"template_inputs": [SimpleNamespace(output_params=("template.x",))]})

    def bucket(text, x):
        return in_bucket({"text": np.zeros((text, 2)), "template.x": np.zeros((x, 3))}, (16, 8), pipe).bucket

    assert bucket(3, 5) == bucket(4, 5) == (16, 8, 4, 5, 3) and bucket(3, 6) == (16, 8, 4, 6, 3)
    with pytest.raises(DataError, match="a prompt of 9 tokens is longer than the longest"):
        bucket(9, 5)


def test_the_row_that_cannot_be_prepared_is_named():
    module = Module()
    module.prepare = lambda data, cut: (_ for _ in ()).throw(TemplateError("no scale"))
    with pytest.raises(TemplateError, match="row 2: no scale"):
        PreparedRows(Dataset(), module, CUT)[1]


@pytest.mark.parametrize("limit", [8 << 30, 0])
def test_numbers_of_one_field_have_one_dtype_in_all_rows(limit):
    """JSON has one kind of number: a row may say 1 where another says 0.5. Also where another data set says it."""
    class Numbers(Module):
        def prepare(self, data, cut):
            return {"scale": np.asarray(data["scale"]), "kind": np.asarray(3)}

    def sets(*values):
        return [PreparedRows([{"scale": v, "image": Image.new("RGB", (8, 8))} for v in own], Numbers(), CUT,
                             limit_bytes=limit) for own in values]

    for values in (([0, 0.5, 1],), ([0, 1], [0.5])):
        found = sets(*values)
        prepare_all(found, Progress(enabled=False))
        unify(found)
        assert [[rows[k].slots["scale"].dtype for k in range(rows.rows)] for rows in found] == [
            [np.float32] * len(own) for own in values]
        assert [[float(rows[k].slots["scale"]) for k in range(rows.rows)] for rows in found] == [
            [float(v) for v in own] for own in values]
        assert all(rows[0].slots["kind"].dtype == np.int64 for rows in found)
    whole, = sets([0, 1])
    prepare_all([whole], Progress(enabled=False))
    unify([whole])
    assert whole[1].slots["scale"].dtype == np.int64  # an index stays one


def test_prompts_that_are_cut_are_told_in_one_line(caplog):
    """Each by itself where an image is sampled; of the rows of a data set their number, and the first of them."""
    class Cutting(Module):
        def prepare(self, data, cut):
            tell_cut(90, "CLIP tokens", 77, "a long prompt")
            return super().prepare(data, cut)

    tell_cut(90, "CLIP tokens", 77, "a long prompt")
    assert caplog.messages == ["prompt of 90 CLIP tokens is cut to 77: 'a long prompt'"]
    caplog.clear()
    data = [{"prompt": k, "image": Image.new("RGB", (8, 8))} for k in range(5)]
    prepare_all([PreparedRows(data, Cutting(), CUT)], Progress(enabled=False))
    said, = caplog.messages
    assert said == "5 prompts are longer than 77 CLIP tokens, and cut there: row 1, row 2, row 3 and 2 more (5 in all)."


# -- in runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared_rows(monkeypatch):
    """Counts of the rows that are prepared."""
    calls, prepare_row = Counter(), prepared.prepare_row

    def counting(dataset, row, module, cut):
        calls[dataset.label(row) if hasattr(dataset, "label") else row] += 1
        return prepare_row(dataset, row, module, cut)

    monkeypatch.setattr(prepared, "prepare_row", counting)
    return calls


@pytest.mark.parametrize("limit", [8 << 30, 0])
@pytest.mark.few(1)
def test_rows_are_prepared_when_they_are_needed_and_once(folder, tmp_path, monkeypatch, prepared_rows, limit):
    """With room and without: the same weights, bit for bit, as from rows that were all prepared first."""
    def run(name, **more):
        return toy_run.train(tmp_path / name, toy_run.Module(folder), toy_run.files(tmp_path / "data", 5), "pynative",
                             **{"num_epochs": 2, "max_train_steps": None, **more})

    init = PreparedRows.__init__
    monkeypatch.setattr(PreparedRows, "__init__", lambda self, dataset, module, cut: init(
        self, dataset, module, cut, limit))
    run("few", max_train_steps=3)
    assert sum(prepared_rows.values()) == len(prepared_rows) == 3
    prepared_rows.clear()
    run("all")
    assert sorted(prepared_rows.values()) == [1] * 5 and not (tmp_path / "all/.prepared").exists()
    monkeypatch.setattr(PreparedRows, "foresees_buckets", False)
    run("first", batch_size=1)
    assert toy_run.table(tmp_path / "all") == toy_run.table(tmp_path / "first")


def test_batches_of_several_need_no_row_before_its_time(folder, tmp_path, prepared_rows):
    """Buckets follow from headers: two sizes, three batches of two, the first of which is prepared."""
    data = toy_run.files(tmp_path / "data", 6)
    sizes = UnifiedDataset.default_image_operator(str(tmp_path / "data"), max_pixels=None, height_division_factor=8,
                                                  width_division_factor=8)
    for k in (1, 4):
        Image.new("RGB", (24, 16), (k, 0, 0)).save(tmp_path / f"data/{k}.png")
    data = UnifiedDataset(data.base_path, f"{data.base_path}/metadata.csv", 1, "image", sizes)
    assert [data.size_of(k) for k in range(6)] == [data[k]["image"].size[::-1] for k in range(6)]
    toy_run.train(tmp_path / "run", toy_run.Module(folder), data, "pynative", batch_size=2, max_train_steps=1)
    assert sum(prepared_rows.values()) == 2


@pytest.mark.parametrize("name, network", [
    ("toy", "text_encoder"), ("flux", "text_encoder_2"), ("sd3", "text_encoder_1"), ("flux2", "text_encoder"),
    ("qwen_image", "text_encoder"), ("z_image", "text_encoder"), ("sdxl", "text_encoder_2")])
@pytest.mark.few(1)
def test_equal_prompts_are_encoded_once(tiny_model, tmp_path, name, network):
    """Whatever the family: one prompt of all rows, and one of the class images, are two runs of the text encoder."""
    pipe = family(name).pipeline.from_pretrained(str(tiny_model(name)))
    module = DiffusionTrainingModule()
    module.pipe = pipe
    module.switch_pipe_to_training_mode(pipe, lora_base_model=pipe.network, lora_rank=2)
    cut, side, calls = module.training_cut(), 32, []
    text_encoder = getattr(pipe, network)
    text_encoder.register_forward_pre_hook(lambda cell, inputs: calls.append(1))
    sets = [PreparedRows([{"image": Image.new("RGB", (side, side), (k, 0, 0)), "prompt": prompt} for k in range(3)],
                         module, cut) for prompt in ("a red cat", "a cat")]
    rows = [[found[k].slots for k in range(3)] for found in sets]
    assert len(calls) == 2
    module.texts = None
    for found, prompt in zip(rows, ("a red cat", "a cat")):
        for k in range(3):
            data = {"image": Image.new("RGB", (side, side), (k, 0, 0)), "prompt": prompt}
            wanted = in_bucket(module.prepare(data, cut), (side, side), pipe).slots
            assert set(found[k]) == set(wanted)
            assert all(np.array_equal(found[k][slot], wanted[slot]) for slot in wanted)
    size = sum(array.nbytes for array in rows[0][0].values())
    assert sets[0].kept.bytes < 3 * size, "the text is kept once"
