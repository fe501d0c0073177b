"""Tables of names: what is no row of one is an error that says which row of which file."""
from __future__ import annotations

import re

import pytest
import yaml

from ms_diffsynth.errors import ConfigError
from ms_diffsynth.formats.interchange import read_table

HEAD = {"title": "a family", "architecture": "a", "base_version": "a", "default": "diffusers",
        "layouts": {"diffusers": "diffusers", "kohya": "original"}, "only_read": ["xlabs"]}
RIGHT = ["blocks.N.attn.{to_q,to_k}", {"diffusers": "a.N.{q,k}", "original": "b.N.qk", "rows": [1, 2]}]


def table(folder, layers, **model):
    file = folder / "interchange.yaml"
    models = {"dit": {"begins": {"diffusers": ""}, "layers": layers, **model}}
    file.write_text(yaml.safe_dump(HEAD | {"models": models}, sort_keys=False))
    return read_table(file)


def test_right_rows_are_read(tmp_path):
    rows = table(tmp_path, RIGHT).models["dit"].rows
    assert [row.members for row in rows] == [("blocks.N.attn.to_q",), ("blocks.N.attn.to_k",), ("a.N.q", "a.N.k")]
    assert rows[2].names == {"original": "b.N.qk"} and rows[2].shares == (1, 2)


@pytest.mark.parametrize("row, text", [
    ("blocks.N.attn.{to_q,to_k", "is no template: expected words with dots"), ("blocks..N", "is no template"),
    ("to_q, to_k", "is no template"), ("", "is no template"), ("blocks.*.to_q", "is no template"),
    (7, "expected a name, or names by column"), (["to_q"], "expected a name, or names by column"),
    ({"diffusers": "a", "orignal": "b"}, "'orignal' is no column of this table: .*Did you mean 'original'"),
    ({"diffusers": "a", "original": 3}, "3 is no template"),
    ({"diffusers": "a"}, "expected a name in the column diffusers, and one in another"),
    ({"original": "a", "xlabs": "b"}, "expected a name in the column diffusers, and one in another"),
    ({"diffusers": "a.N.b", "original": "c.b"}, "c.b: expected 1 N, as in a.N.b"),
    ({"diffusers": "a.{b,c}", "original": "a.{d,e}"}, "original has 2 names: expected 1, one for all of diffusers' 2"),
    ({"each": True, "diffusers": "a.{b,c}", "original": "d"}, "original has 1 names: expected 2, one for each"),
    ({"diffusers": "a.{b,c}", "original": "d", "rows": [1]}, "rows has 1 numbers: expected one for each"),
    ({"diffusers": "a", "original": "b", "swap": "halves"}, "swap is 'halves': expected true"),
    ({"within": {"a": "b"}, "layers": "to_q"}, "expected within, .* and layers, a list"),
    ({"within": {"a": "b"}, "layers": ["to_q {"]}, "is no template"),
])
def test_what_is_no_row_is_refused_with_its_place(tmp_path, row, text):
    place = f"{re.escape(str(tmp_path / 'interchange.yaml'))}: row 3 of models.dit.layers, {re.escape(repr(row))}: "
    with pytest.raises(ConfigError, match=f"^{place}.*{text}"):
        table(tmp_path, [*RIGHT, row])


def test_layers_that_are_one_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"models\.dit\.layers is 'to_q': expected a list of rows"):
        table(tmp_path, "to_q")


def test_a_row_that_several_families_share_is_named_with_its_own_file(tmp_path):
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump([*RIGHT, "a b"]))
    with pytest.raises(ConfigError, match=r"shared\.yaml: row 3 of it, 'a b': "):
        table(tmp_path, [], shared="shared.yaml")
