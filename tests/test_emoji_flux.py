"""The scripts of examples/emoji_flux: the split, the cut tokenizers, and the weights that training starts from."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ms_diffsynth import Draws
from ms_diffsynth.pipelines.shared.text import (
    CLIP_TOKENIZER,
    T5_TOKENIZER,
    build_clip_tokenizer,
    build_t5_tokenizer,
)

FOLDER = Path(__file__).parents[1] / "examples" / "emoji_flux"


@pytest.fixture
def script(monkeypatch):
    """``script(name)`` imports one of them; the package ``emoji``, which only building the images needs, is not."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(sys.modules, "emoji", SimpleNamespace(EMOJI_DATA={"\U0001f600": {"en": ":grinning_face:"}}))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_split_is_fixed(script):
    make = script("make_images")
    names = [f"thing {k}" for k in range(2000)]
    found = {vendor: {name for name in names if make.split_of(name, vendor) == "held_out"} for vendor in make.STYLES}
    assert make.split_of("koala", "fluent") == make.split_of("fox", "noto") == "train"
    assert [make.split_of("saluting face", vendor) for vendor in make.STYLES] == ["held_out", "held_out"]
    both = found["noto"] & found["fluent"]
    assert 0.015 < len(both) / 2000 < 0.025 and 0.035 < len(found["noto"]) / 2000 < 0.055
    assert make.name_of({"unified": "1F600", "name": "GRINNING FACE"}) == "grinning face"
    assert make.name_of({"unified": "1F601", "name": "OTHER FACE"}) == "other face"


def test_pairs_are_trained_on_where_both_images_were_and_held_out_where_the_result_was_not(script):
    make = script("make_images")

    def rows(*names):
        return [{"image": f"images/{name}.png", "name": name.partition("_")[2]} for name in names]

    found = list(make.style_edits({"train": rows("noto_a", "fluent_a", "noto_b", "fluent_c", "noto_d"),
                                   "held_out": rows("fluent_b", "noto_c"), "cats": rows("fluent_d")}))
    tables = {(row["kind"], row["name"]): table for table, row in found}
    assert tables == {("fluent", "a"): "edits", ("noto", "a"): "edits", ("fluent", "b"): "edits_held_out",
                      ("noto", "b"): "", ("fluent", "c"): "", ("noto", "c"): "edits_held_out",
                      ("fluent", "d"): "edits_held_out", ("noto", "d"): ""}
    assert found[0][1] == {"image": "images/fluent_a.png", "edit_image": "images/noto_a.png", "name": "a",
                           "prompt": "make it a 3d render", "kind": "fluent"}


TEXTS = ["a 3d render of grinning cat with smiling eyes", "an emoji of four o'clock", "a 3d render of sks cat", "",
         "über"]


def test_a_cut_tokenizer_gives_the_same_pieces_and_smaller_ones_for_other_texts(script, tmp_path):
    cut = script("cut_tokenizers")
    for name, write, build, source in (("clip", cut.cut_clip, build_clip_tokenizer, CLIP_TOKENIZER),
                                       ("t5", cut.cut_t5, build_t5_tokenizer, T5_TOKENIZER)):
        write(tmp_path / name, TEXTS)
        whole, small = build(source), build(tmp_path / name)
        assert [small.tokenize(text) for text in TEXTS] == [whole.tokenize(text) for text in TEXTS]
        assert len(small) < 1500 and max(small("a 3d render of cat").input_ids) < len(small)
        pieces = small.tokenize("a hippopotamus")
        assert len(pieces) > len(whole.tokenize("a hippopotamus"))
        assert "".join(pieces).replace("</w>", "").replace("▁", "") == "ahippopotamus"
    small = build_clip_tokenizer(tmp_path / "clip")
    assert small.eos_token_id == len(small) - 1  # CLIP's pooled output is at the largest id
    assert len(set(cut.common_words())) == cut.WORDS


def test_the_transformer_begins_with_half_of_every_branch_and_no_velocity(script):
    make, random = script("make_model"), np.random.default_rng(0)
    width = make.TRANSFORMER["num_attention_heads"] * make.TRANSFORMER["attention_head_dim"]
    shapes = {"transformer_blocks.0.norm1.linear.bias": (6 * width,),
              "transformer_blocks.0.norm1.linear.weight": (6 * width, width),
              "single_transformer_blocks.0.norm.linear.bias": (3 * width,), "norm_out.linear.bias": (2 * width,),
              "proj_out.weight": (64, width), "single_transformer_blocks.0.proj_out.weight": (width, 5 * width)}
    found = make.transformer_weights({name: random.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])
                                      for name, shape in shapes.items()})
    joint = found["transformer_blocks.0.norm1.linear.bias"].reshape(6, width)
    assert (joint[[2, 5]] == 0.5).all() and not joint[[0, 1, 3, 4]].any()
    assert (found["single_transformer_blocks.0.norm.linear.bias"].reshape(3, width)[2] == 0.5).all()
    for name in ("proj_out.weight", "norm_out.linear.bias", "transformer_blocks.0.norm1.linear.weight"):
        assert not found[name].any()
    deviation = found["single_transformer_blocks.0.proj_out.weight"].std()
    assert deviation == pytest.approx(np.sqrt(2 / (6 * width)), rel=0.02)


def test_a_vae_begins_as_pytorchs_layers_do(script):
    make = script("make_model")
    shapes = {"conv.weight": (32, 16, 3, 3), "conv.bias": (32,), "norm.weight": (32,), "norm.bias": (32,)}
    found = make.vae_weights(shapes, Draws(0))
    for name in ("conv.weight", "conv.bias"):
        assert 0.9 / 12 < np.abs(found[name]).max() <= 1 / 12
    assert (found["norm.weight"] == 1).all() and not found["norm.bias"].any()
