"""A pipeline saved whole is the pipeline: here, and by the names and files that diffusers looks for."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from device import DEVICE
from low_rank import inject_lora

from ms_diffsynth import runtime
from ms_diffsynth.errors import OutputError, WeightError
from ms_diffsynth.formats.adapters import LORA, A, B
from ms_diffsynth.formats.lora import AdapterFile, save_adapters
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import family, family_of, interchange

MODULES = {"z_image": "layers.0.attention.to_q", "wan": "blocks.0.attn1.to_q",
           "sdxl": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"}


@pytest.fixture(params=["flux", "flux2", "qwen_image", "sd3", pytest.param("sdxl", marks=pytest.mark.slow), "wan",
                        "z_image"])
def pipe(request, tiny_model):
    runtime.configure("pynative", DEVICE)
    return family(request.param).pipeline.from_pretrained(str(tiny_model(request.param)))


@pytest.mark.few(2)
def test_every_model_is_written_and_what_was_added_is_in_it(pipe, tmp_path):
    name = family_of(next(iter(pipe.sources.values())).folder.parent)
    module, network = MODULES.get(name, "transformer_blocks.0.attn.to_q"), pipe.network
    own = pipe.store.component(network).folder
    weights = load_state_dict(pipe.sources[network].folder)
    outs, ins = weights[f"{module}.weight"].shape
    parts = {A: np.ones((1, ins), np.float32), B: np.full((outs, 1), 0.5, np.float32)}
    save_adapters(tmp_path / "l.safetensors", {network: AdapterFile({module: parts}, {module: 1.0}, {module: LORA})},
                  interchange(name), "diffusers")
    pipe.load_lora(None, tmp_path / "l.safetensors")
    pipe.save_pretrained(tmp_path / "whole", max_shard_bytes=sum(array.nbytes for array in weights.values()) // 3)
    theirs = pipe.sources[network].folder.parent
    index, expected = (json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path / "whole", theirs))
    assert index == expected and family_of(tmp_path / "whole") == name
    for folder in (folder for folder in expected if not folder.startswith("_") and folder != "scheduler"):
        if (theirs / folder / "config.json").is_file():
            assert json.loads((tmp_path / "whole" / folder / "config.json").read_text()) == json.loads(
                (theirs / folder / "config.json").read_text())
            before, after = load_state_dict(theirs / folder), load_state_dict(tmp_path / "whole" / folder)
            assert before.keys() == after.keys()
            for key, array in before.items():
                change = 0.5 if (folder, key) == (own, f"{module}.weight") else 0
                np.testing.assert_array_equal(after[key], array + np.float32(change), err_msg=key)
        else:
            files = {p.name: p.read_bytes() for p in (theirs / folder).iterdir()}
            assert {p.name: p.read_bytes() for p in (tmp_path / "whole" / folder).iterdir()} == files
    assert list((tmp_path / "whole" / own).glob("*.index.json"))
    again = type(pipe).from_pretrained(str(tmp_path / "whole"))
    assert again.scheduler_config() == pipe.scheduler_config()
    for key, array in state_dict(getattr(pipe, network)).items():
        np.testing.assert_array_equal(state_dict(getattr(again, network))[key], array, err_msg=key)
    with pytest.raises(OutputError, match="is not empty"):
        pipe.save_pretrained(tmp_path / "whole")


def test_weights_of_a_training_are_saved_and_an_adapter_is_not(tiny_model, tmp_path):
    runtime.configure("pynative", DEVICE)
    pipe = family("flux").pipeline.from_pretrained(str(tiny_model("flux")))
    trained = {"x_embedder.bias": np.full(load_state_dict(pipe.sources["dit"].folder)["x_embedder.bias"].shape, 7,
                                          np.float32)}
    save_state_dict(tmp_path / "w.safetensors", trained)
    pipe.load_weights(tmp_path / "w.safetensors")
    pipe.save_pretrained(tmp_path / "whole")
    assert (load_state_dict(tmp_path / "whole/transformer")["x_embedder.bias"] == 7).all()
    inject_lora(pipe.dit, ["to_q"], 2)
    with pytest.raises(WeightError, match="'dit' has an adapter"):
        pipe.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_diffusers_alone_needs_and_how_it_is_sampled_stay_with_the_model(tiny_model, tmp_path):
    """Qwen-Image-Edit has a processor, without which diffusers does not load it."""
    runtime.configure("pynative", DEVICE)
    base = tmp_path / "base"
    shutil.copytree(tiny_model("qwen_image"), base)
    (base / "processor").mkdir()
    (base / "processor/preprocessor_config.json").write_text("{}")
    (base / "sampling_config.json").write_text('{"height": 64, "width": 48}')
    index = json.loads((base / "model_index.json").read_text())
    index |= {"processor": ["transformers", "Qwen2VLProcessor"], "image_encoder": [None, None],
              "lost": ["transformers", "A"], "../base": ["transformers", "A"]}
    (base / "model_index.json").write_text(json.dumps(index))
    family("qwen_image").pipeline.from_pretrained(str(base)).save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole/processor/preprocessor_config.json").read_text() == "{}"
    assert json.loads((tmp_path / "whole/sampling_config.json").read_text()) == {"height": 64, "width": 48}
    saved = json.loads((tmp_path / "whole/model_index.json").read_text())
    assert saved == {key: value for key, value in index.items() if key not in ("lost", "../base")}
