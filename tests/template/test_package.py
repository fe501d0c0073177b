"""A trained template as a folder to share: what is in it, and that it loads."""
from __future__ import annotations

import ast

import numpy as np
import pytest

from ms_diffsynth import load_template_model
from ms_diffsynth.errors import OutputError, UntrustedCodeError, WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.template.code import TemplateCode, with_weight_path
from ms_diffsynth.template.package import pack_template

TRUST = {"trust_template_code": True}


def trained(path, names=("frozen.weight", "frozen.bias", "mlp.weight", "mlp.bias"), prefix=""):
    shapes = {"frozen.weight": (4, 1), "frozen.bias": (4,), "mlp.weight": (32, 4), "mlp.bias": (32,)}
    weights = {name: np.random.default_rng(k).random(shapes[name], np.float32) for k, name in enumerate(names)}
    save_state_dict(path, {prefix + name: array for name, array in weights.items()})
    return weights


@pytest.mark.parametrize("prefix", ["", "pipe.template_model."])
def test_what_was_packed_is_what_was_trained(template, plain_source, tmp_path, prefix):
    folder = template(plain_source + "TEMPLATE_MODEL_PATH = None\n")
    weights = trained(tmp_path / "epoch-1.safetensors", prefix=prefix)
    packed = pack_template(folder, tmp_path / "epoch-1.safetensors", tmp_path / "packed", **TRUST)
    assert packed == tmp_path / "packed"
    assert sorted(p.name for p in packed.iterdir()) == ["model.py", "model.safetensors"]
    assert (packed / "model.py").read_text() == plain_source + 'TEMPLATE_MODEL_PATH = "model.safetensors"\n'
    loaded = state_dict(load_template_model(packed, **TRUST))
    assert loaded.keys() == weights.keys() and all(np.array_equal(loaded[n], weights[n]) for n in weights)


def test_a_part_is_packed_over_the_weights_training_began_with(template, plain_source, tmp_path):
    folder = template(plain_source + "TEMPLATE_MODEL_PATH = 'start.safetensors'\n")
    start = trained(folder / "start.safetensors", ("mlp.bias", "frozen.bias", "mlp.weight", "frozen.weight"))
    weights = trained(tmp_path / "epoch-1.safetensors", ("mlp.weight", "mlp.bias"))
    packed = pack_template(folder, tmp_path / "epoch-1.safetensors", tmp_path / "packed", **TRUST)
    loaded = state_dict(load_template_model(packed, **TRUST))
    assert all(np.array_equal(loaded[n], (start | weights)[n]) for n in start)
    assert not np.array_equal(weights["mlp.weight"], start["mlp.weight"])
    again = pack_template(packed, tmp_path / "epoch-1.safetensors", tmp_path / "again", **TRUST)
    assert load_state_dict(again / "model.safetensors").keys() == start.keys()
    assert (again / "model.py").read_bytes() == (packed / "model.py").read_bytes()


def test_the_packed_folder_is_loaded_from_a_hub(template, tmp_path, hub):
    weights = trained(tmp_path / "epoch-1.safetensors")
    packed = pack_template(template(), tmp_path / "epoch-1.safetensors", tmp_path / "packed", **TRUST)
    hub.add("team/t", {path.name: path.read_bytes() for path in packed.iterdir()} | {"README.md": b"-"})
    config = hub.config("team/t")
    with pytest.raises(UntrustedCodeError):
        load_template_model(config)
    assert hub.downloads() == ["model.py"]
    loaded = state_dict(load_template_model(config, **TRUST))
    assert all(np.array_equal(loaded[n], weights[n]) for n in weights) and "model.safetensors" in hub.downloads()


@pytest.mark.parametrize("weights, message", [
    ({"transformer.mlp.lora_A.weight": np.zeros((2, 4), np.float32)},
     r"holds transformer\.mlp\.lora_A\.weight: the template has frozen\.weight, .*Expected a checkpoint of this"),
    ({"mlp.wieght": np.zeros((32, 4), np.float32)}, r"Did you mean 'mlp\.weight'"),
    ({"mlp.weight": np.zeros((4, 32), np.float32)}, r"mlp\.weight \[4, 32\], expected \[32, 4\]"),
    ({}, "holds no weights"),
], ids=["a lora", "a typing error", "a shape", "empty"])
def test_a_checkpoint_of_something_else(template, tmp_path, weights, message):
    save_state_dict(tmp_path / "epoch-1.safetensors", weights)
    with pytest.raises(WeightError, match=message):
        pack_template(template(), tmp_path / "epoch-1.safetensors", tmp_path / "packed", **TRUST)
    assert not (tmp_path / "packed").exists()


def test_nothing_is_overwritten_and_nothing_half_written(template, tmp_path):
    trained(tmp_path / "epoch-1.safetensors")
    folder = template()
    for output in (folder, tmp_path / "epoch-1.safetensors"):
        with pytest.raises(OutputError, match="exists and is not"):
            pack_template(folder, tmp_path / "epoch-1.safetensors", output, **TRUST)
    assert [p.name for p in folder.iterdir()] == ["model.py"]
    with pytest.raises(WeightError, match="no safetensors file found"):
        pack_template(folder, tmp_path / "lost.safetensors", tmp_path / "packed", **TRUST)
    assert {p.name for p in tmp_path.iterdir()} == {"epoch-1.safetensors", "plain"}


NEW = '"w.safetensors"'


@pytest.mark.parametrize("source, wanted", [
    ("A = 1\n", f"A = 1\n\nTEMPLATE_MODEL_PATH = {NEW}\n"),
    ("A = 1", f"A = 1\nTEMPLATE_MODEL_PATH = {NEW}\n"),
    ("TEMPLATE_MODEL_PATH = None  # random\nA = 1\n", f"TEMPLATE_MODEL_PATH = {NEW}  # random\nA = 1\n"),
    ("TEMPLATE_MODEL_PATH = 'a'\nA = 1\nTEMPLATE_MODEL_PATH = [\n  'b',\n  'c',\n]\nB = 2\n",
     f"TEMPLATE_MODEL_PATH = {NEW}\nA = 1\nTEMPLATE_MODEL_PATH = {NEW}\nB = 2\n"),
    ("TEMPLATE_MODEL_PATH: str | None = None\n", f"TEMPLATE_MODEL_PATH: str | None = {NEW}\n"),
    ("TEMPLATE_MODEL_PATH: str\n", f"TEMPLATE_MODEL_PATH: str\n\nTEMPLATE_MODEL_PATH = {NEW}\n"),
    ("TEMPLATE_MODEL_PATH = (\n  'a'\n)\n", f"TEMPLATE_MODEL_PATH = (\n  {NEW}\n)\n"),
    ("A = 1; TEMPLATE_MODEL_PATH = 'a'; B = 2\n", f"A = 1; TEMPLATE_MODEL_PATH = {NEW}; B = 2\n"),
    ("A = TEMPLATE_MODEL_PATH = 'a'\n", f"A = TEMPLATE_MODEL_PATH = {NEW}\n"),
    ("A, TEMPLATE_MODEL_PATH = 1, 'a'\n", f"A, TEMPLATE_MODEL_PATH = 1, 'a'\n\nTEMPLATE_MODEL_PATH = {NEW}\n"),
    ("def f():\n    TEMPLATE_MODEL_PATH = 'a'\n",
     f"def f():\n    TEMPLATE_MODEL_PATH = 'a'\n\nTEMPLATE_MODEL_PATH = {NEW}\n"),
    ("A = '\u2028 \x0c ü'\nTEMPLATE_MODEL_PATH = 'ü'\nB = 'ü'\n",
     f"A = '\u2028 \x0c ü'\nTEMPLATE_MODEL_PATH = {NEW}\nB = 'ü'\n"),
    ("TEMPLATE_MODEL_PATH = 'a'\r\nA = 1\r\n", f"TEMPLATE_MODEL_PATH = {NEW}\r\nA = 1\r\n"),
    ("# TEMPLATE_MODEL_PATH = 'a'\n", f"# TEMPLATE_MODEL_PATH = 'a'\n\nTEMPLATE_MODEL_PATH = {NEW}\n"),
])
def test_the_path_of_the_weights_is_set_and_all_else_stays(tmp_path, source, wanted):
    found = with_weight_path(TemplateCode(tmp_path, source.encode()), "w.safetensors").decode()
    assert found == wanted
    names = {}
    exec(compile(found, "model.py", "exec"), names)
    assert names["TEMPLATE_MODEL_PATH"] == "w.safetensors" and ast.parse(found)


def test_what_the_code_may_read_is_packed_too(template, tmp_path):
    folder = template()
    (folder / "config.json").write_text("{}")
    (folder / "old.safetensors").write_bytes(b"")
    (folder / ".env").write_text("HF_TOKEN=x")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    save_state_dict(tmp_path / "c.safetensors", state_dict(load_template_model(folder, trust_template_code=True)))
    packed = pack_template(folder, tmp_path / "c.safetensors", tmp_path / "packed", trust_template_code=True)
    assert sorted(f.name for f in packed.iterdir()) == ["config.json", "model.py", "model.safetensors"]
