"""FLUX.1: tokenizers, loading from folders, shards and a hub, packing, inference."""
from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hub_server import HubServer, only_this_machine
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import FluxImagePipeline, ModelConfig
from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.errors import DataError, DeviceError
from ms_diffsynth.formats.weights import load_state_dict, save_sharded
from ms_diffsynth.pipelines.flux.denoise import image_ids

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe(tiny_flux):
    pipe = FluxImagePipeline.from_pretrained(str(tiny_flux))
    pipe.max_sequence_length = 16
    return pipe


# Ids of the original tokenizers, computed with transformers 4.57.1 from the files of black-forest-labs/FLUX.1-dev.
@pytest.mark.parametrize(("name", "ids"), [
    ("tokenizer_1", [49406, 320, 1125, 539, 48136, 1929, 49407]),
    ("tokenizer_2", [3, 9, 1202, 13, 3, 7, 157, 7, 1782, 1]),
])
def test_shipped_tokenizers_are_the_real_ones(pipe, name, ids):
    assert getattr(pipe, name)("a photo of sks dog").input_ids == ids


# transformers 4.57.1, CLIPTokenizer with ftfy 6.3: what DiffSynth-Studio requires
@pytest.mark.parametrize(("text", "ids"), [
    ("a sign that says “hello world” and ‘bye’ – it’s fine…",
     [49406, 320, 2292, 682, 1563, 257, 3306, 1002, 257, 537, 262, 4460, 262, 1224, 585, 568, 3797, 959, 49407]),
    ("一只红色的猫在海边，背景是日落。",
     [49406, 19759, 222, 34517, 103, 163, 118, 95, 164, 231, 110, 163, 248, 226, 163, 234, 104, 37746, 101, 162, 113,
      115, 164, 122, 373, 267, 164, 225, 234, 48132, 107, 42891, 107, 39121, 164, 238, 377, 38000, 49407]),
    ("ＡＢＣ １２３", [49406, 5334, 272, 273, 274, 49407]),
    ("a &amp; b &lt;c&gt; cat &quot;x&quot;", [49406, 320, 261, 321, 283, 322, 285, 2368, 257, 343, 257, 49407]),
    ("ﬁne oﬃce", [49406, 3797, 2171, 49407]),
    ("a cat 🐱 with hearts ❤️ and 👨\u200d👩\u200d👧\u200d👦",
     [49406, 320, 2368, 22979, 593, 5516, 1752, 537, 25023, 26304, 48938, 4244, 964, 355, 49407]),
])
def test_clip_reads_quotes_chinese_and_emoji_as_the_reference(pipe, text, ids):
    assert pipe.tokenizer_1(text).input_ids == ids


def test_clip_without_ftfy_is_refused(tiny_flux, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(DeviceError, match=r"ftfy is not installed: CLIP's tokenizer needs it.* pip install ftfy"):
        FluxImagePipeline.from_pretrained(str(tiny_flux)).tokenizer_1  # noqa: B018


def test_prompts_are_padded_and_what_is_cut_is_logged(pipe, caplog):
    slots = pipe.run(pipe.units[:1], {"prompt": "a cat"})
    assert slots["clip_ids"].shape == (1, 77) and slots["t5_ids"].shape == (1, 16)
    with caplog.at_level("WARNING"):
        pipe.run(pipe.units[:1], {"prompt": "cat " * 100})
    assert "101 T5 tokens is cut to 16" in caplog.text and "102 CLIP tokens is cut to 77" in caplog.text


def test_packing_is_its_own_inverse_and_matches_the_layout():
    x = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    tokens = pack(Tensor(x))
    assert tokens.shape == (2, 6, 12)
    # the second patch of the first row
    np.testing.assert_array_equal(tokens.asnumpy()[0, 1], x[0, :, 0:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpack(tokens, 4, 6).asnumpy(), x)


def test_image_ids_are_row_and_column():
    ids = image_ids(4, 6).asnumpy()
    assert ids.shape == (6, 3) and ids[4].tolist() == [0, 1, 1]


def sharded(tiny_flux, folder):
    """The transformer's folder, its weights in several shards."""
    save_sharded(folder, load_state_dict(tiny_flux / "transformer" / WEIGHTS), max_shard_bytes=3_000_000,
                 config=json.loads((tiny_flux / "transformer" / "config.json").read_text()))
    return sorted(folder.glob("*.safetensors"))


def test_from_a_hub_by_id_and_pattern_with_a_pinned_revision(tiny_flux, pipe, tmp_path, monkeypatch):
    only_this_machine(monkeypatch)
    sharded(tiny_flux, tmp_path / "shards")
    files = {f"transformer/{f.name}": f.read_bytes() for f in (tmp_path / "shards").iterdir()}
    with HubServer() as hub:
        commit = hub.add("black-forest-labs/FLUX.1-dev", files | {"README.md": b"hello"})
        named = {"model_id": "black-forest-labs/FLUX.1-dev", "endpoint": hub.endpoint, "cache_dir": tmp_path / "cache",
                 "origin_file_pattern": "transformer/diffusion_pytorch_model*.safetensors"}
        config = ModelConfig(**named)
        loaded = FluxImagePipeline.from_pretrained([config])
        assert config.revision == commit and "README.md" not in hub.downloads()
        np.testing.assert_array_equal(loaded.dit.proj_out.weight.asnumpy(), pipe.dit.proj_out.weight.asnumpy())
    offline = FluxImagePipeline.from_pretrained([ModelConfig(**named)])  # the server is gone
    np.testing.assert_array_equal(offline.dit.proj_out.weight.asnumpy(), pipe.dit.proj_out.weight.asnumpy())


def test_a_picture_of_odd_size_is_refused(pipe):
    with pytest.raises(DataError, match="100 x 64 pixels cannot be encoded: expected sides that are multiples of 16"):
        pipe.run(pipe.units[2:3], {"input_image": Image.new("RGB", (100, 64))})
