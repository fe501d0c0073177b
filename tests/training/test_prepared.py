"""Prepared rows: each once, the same for repeats, within a limit of memory."""
from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.errors import DataError, TemplateError
from ms_diffsynth.pipelines.shared.cuts import tell_cut
from ms_diffsynth.training.prepared import PreparedRows, in_bucket, prepare_all
from ms_diffsynth.training.progress import Progress


class Module:
    def __init__(self):
        self.calls, self.pipe = [], SimpleNamespace(padded_slots=(), prompt_lengths=(), optional_units={})

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
    rows = PreparedRows(Dataset(), module, None)
    prepare_all([rows], Progress(enabled=False))
    assert module.calls == [0, 1, 2] and rows.rows == 3 and len(rows) == 6
    for index in range(6):
        assert rows[index].slots["moments"].tolist() == [index % 3] * 4
        assert rows[index].size == rows.bucket_of(index) == (16, 8 * (index % 3 + 1))  # height, width
    assert module.calls == [0, 1, 2] and rows.kept_bytes == 3 * 16


def test_fewer_items_than_rows():
    module = Module()
    rows = PreparedRows(Dataset(length=2), module, None)
    prepare_all([rows], Progress(enabled=False))
    assert module.calls == [0, 1] and rows.rows == 2


def test_a_plain_list_is_a_data_set():
    rows = PreparedRows(Dataset().rows[:2], Module(), None)
    assert len(rows) == rows.rows == 2 and rows[1].slots["moments"][0] == 1


@pytest.mark.parametrize("limit, again", [(32, [2, 2]), (0, [0, 1, 2, 0, 1, 2])])
def test_rows_beyond_the_limit_are_prepared_again_and_that_is_said_once(caplog, limit, again):
    module = Module()
    rows = PreparedRows(Dataset(), module, None, limit_bytes=limit)
    with caplog.at_level(logging.WARNING):
        prepare_all([rows], Progress(enabled=False))
        for index in range(6):
            assert rows[index].slots["moments"][0] == index % 3
            rows.bucket_of(index)
    assert module.calls[3:] == again and rows.kept_bytes <= limit
    assert len(caplog.records) == 1 and "prepared again at every use" in caplog.text


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
        PreparedRows(Dataset(), module, None)[1]


@pytest.mark.parametrize("limit", [8 << 30, 0])
def test_numbers_of_one_field_have_one_dtype_in_all_rows(limit):
    """JSON has one kind of number: a row may say 1 where another says 0.5. Also where another data set says it."""
    class Numbers(Module):
        def prepare(self, data, cut):
            return {"scale": np.asarray(data["scale"]), "kind": np.asarray(3)}

    def sets(*values):
        return [PreparedRows([{"scale": v, "image": Image.new("RGB", (8, 8))} for v in own], Numbers(), None,
                             limit_bytes=limit) for own in values]

    for values in (([0, 0.5, 1],), ([0, 1], [0.5])):
        found = sets(*values)
        prepare_all(found, Progress(enabled=False))
        assert [[rows[k].slots["scale"].dtype for k in range(rows.rows)] for rows in found] == [
            [np.float32] * len(own) for own in values]
        assert [[float(rows[k].slots["scale"]) for k in range(rows.rows)] for rows in found] == [
            [float(v) for v in own] for own in values]
        assert all(rows[0].slots["kind"].dtype == np.int64 for rows in found)
    whole, = sets([0, 1])
    prepare_all([whole], Progress(enabled=False))
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
    prepare_all([PreparedRows(data, Cutting(), None)], Progress(enabled=False))
    said, = caplog.messages
    assert said == "5 prompts are longer than 77 CLIP tokens, and cut there: row 1, row 2, row 3 and 2 more (5 in all)."
