"""The examples load, run, and say what they do."""
from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

from ms_diffsynth import runtime
from ms_diffsynth.config import SETTINGS, load_config
from ms_diffsynth.registry import family
from ms_diffsynth.train.loop import TrainingOptions

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").rglob("*.yaml"))
SCRIPT = ROOT / "examples/flux/model_training/train.py"
CAT = ROOT / "examples/data/dreambooth_cat_fluent"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_loads_and_names_its_command_and_data(path):
    config = load_config(path)
    assert f"ms-diffsynth train {path.relative_to(ROOT)}" in path.read_text()
    assert (ROOT / config.data.dataset_metadata_path).is_file()
    assert config.data.class_base_path is None or (ROOT / config.data.class_base_path).is_dir()
    assert family(config.model.family)


def test_the_real_thing_differs_by_a_few_lines():
    tiny, real = (load_config(ROOT / "examples/flux" / name).flat()
                  for name in ("tiny_dreambooth.yaml", "dreambooth_dev_910b.yaml"))
    assert {name for name in tiny if tiny[name] != real[name]} == {
        "model_paths", "model_id_with_origin_paths", "height", "width", "max_sequence_length", "learning_rate",
        "lr_warmup_steps", "device", "dtype", "batch_size", "max_train_steps", "save_steps", "sample_steps",
        "num_inference_steps", "output_path"}


def test_the_memory_of_the_real_thing_adds_up():
    """The head's terms, from FLUX.1-dev's and T5-XXL's sizes, in GiB."""
    width, feed = 3072, 4 * 3072
    joint = 12 * width * width + 8 * width * width + 4 * width * feed + 4 * 128 + (12 + 8 + 2) * width + 2 * feed
    single = 6 * width * width + 2 * width * feed + width * width + 2 * 128 + 3 * width + 4 * width + feed
    ends = 64 * width + 4096 * width + 768 * width + 2 * 256 * width + 3 * width * width + 8 * width
    ends += 2 * width * width + width * 64 + 64
    transformer = 19 * joint + 38 * single + ends
    t5 = 32128 * 4096 + 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096) + 4096 + 32 * 64
    lora = 16 * (19 * (8 * 2 * width + 4 * (width + feed)) + 38 * 3 * 2 * width)
    activations = 57 * 24 * 2 * (1024 + 512) * width * 2
    terms = [transformer * 2, t5 * 2, (0.12e9 + 0.08e9) * 2, lora * 16, activations]
    text = (ROOT / "examples/flux/dreambooth_dev_910b.yaml").read_text()
    shown = [float(number) for number in re.findall(r" ([\d.]+) GiB$", text, re.MULTILINE)]
    assert shown[:-1] == [round(term / 2**30, 1) for term in terms]
    assert abs(shown[-1] - sum(terms) / 2**30) < 0.1
    assert f"{transformer / 1e9:.2f}e9" in text and f"{lora / 1e6:.1f}e6" in text and f"{t5 / 1e9:.2f}e9" in text


def test_the_script_honours_every_flag_and_imports_public_names_only():
    tree = ast.parse(SCRIPT.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "ms_diffsynth"}
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "args"}
    by_library = {"cache_dir", "tokenizer_path", "tokenizer_1_path", "tokenizer_2_path"}  # it takes them from args
    assert set(SETTINGS) - read - set(TrainingOptions.__dataclass_fields__) - by_library == {"family"}


def run_script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    runtime.configure("graph", "CPU")
    return end.value.code


def test_the_script_trains(monkeypatch, tmp_path):
    family("flux").write_tiny(tmp_path / "model", 0)
    code = run_script(
        monkeypatch, "--model_paths", tmp_path / "model", "--dataset_base_path", CAT, "--dataset_metadata_path",
        CAT / "metadata.csv", "--max_sequence_length", 8, "--height", 32, "--width", 32, "--max_train_steps", 2,
        "--mode", "pynative", "--lora_rank", 2, "--lora_target_modules", "to_q,to_k", "--sample_prompts", "a cat",
        "--num_inference_steps", 1, "--output_path", "out")
    assert code == 0 and Path("out/step-2.safetensors").is_file() and Path("out/samples/before_after.png").is_file()


@pytest.mark.parametrize("words, code, expected", [
    (["--learning_rat", "1"], 64, "ConfigError: train.py does not know --learning_rat 1. Did you mean '--learning_ra"),
    (["--dataset_base_path", "absent", "--num_epochs", "1"], 65, "DataError: base_path=absent is not a folder"),
    (["--dataset_base_path", str(CAT), "--instance_prompt", "a", "--num_epochs", "1"], 64, "ConfigError: neither mod"),
])
def test_the_script_tells_mistakes_without_a_traceback(monkeypatch, capsys, words, code, expected):
    assert run_script(monkeypatch, *words, "--output_path", "out") == code
    assert capsys.readouterr().err.startswith(expected) and not Path("out").exists()
